"""The commands ``secateur passes`` and ``secateur recipes``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from secateur.passes import IMPORTANCES, PASSES, recipes
from secateur.passes.language.options import options_table
from secateur.tools.commands.common import Json
from secateur.tools.report import pass_tables, recipe_tables
from secateur.tools.report.console import CommandConsole, before_work


def passes_command(as_json: Json = False) -> None:
    """The passes and importances that a pipeline may name, with their options."""
    listed = {}
    for kind, table in (("passes", PASSES), ("importances", IMPORTANCES)):
        listed[kind] = [
            {
                "name": cls.name,
                "summary": cls.summary(),
                "options": [
                    dict(zip(("name", "default", "meaning"), row, strict=True))
                    for row in options_table(cls)
                ],
            }
            for cls in table
        ]
    CommandConsole(as_json).result(listed, pass_tables())


def recipes_command(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe's file, to be copied and changed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The recipes that --recipe knows by name, each with what it is for and where it was
    published."""
    with before_work():
        if name is None:
            names = recipes.recipe_names()
        else:
            names = [name]
        listed = [
            {"name": one, **recipes.describe_recipe(one), "text": recipes.recipe_text(one)}
            for one in names
        ]
    if name is not None and not as_json:
        sys.stdout.write(listed[0]["text"])
    else:
        CommandConsole(as_json).result(listed, recipe_tables(listed))
