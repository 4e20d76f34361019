"""The command line.

Exit codes: 0 done, 1 the job failed, 2 the request was wrong and nothing was begun, 70 a fault of
    secateur itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from secateur.graph import SecateurError
from secateur.passes import IMPORTANCES, PASSES, recipes
from secateur.passes.language.options import options_table
from secateur.passes.registry import add_plugin
from secateur.runtime.save.target import check_files, new_file
from secateur.tools.commands import common as opening
from secateur.tools.commands.bench import bench_command
from secateur.tools.commands.common import Debug, Json, ModelArgument, Overwrite, Verbose
from secateur.tools.commands.compress import compress_command
from secateur.tools.commands.evaluate import evaluate_command
from secateur.tools.commands.generate import generate_command, package_command
from secateur.tools.commands.verify import verify_command
from secateur.tools.demo.command import demo_command
from secateur.tools.inspect import groups_of_block, inspect_program
from secateur.tools.report import draw_groups, inspection_tables, pass_tables, recipe_tables
from secateur.tools.report.console import CommandConsole, before_work, report_error, report_internal

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("bench")(bench_command)
app.command("compress")(compress_command)
app.command("demo")(demo_command)
app.command("evaluate")(evaluate_command)
app.command("generate")(generate_command)
app.command("package")(package_command)
app.command("verify")(verify_command)


def main() -> None:
    """The entry point of the console script."""
    raise SystemExit(run_command())


def run_command(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if arguments is None:
        given = sys.argv[1:]
    else:
        given = arguments
    debug = "--debug" in given or os.environ.get("SECATEUR_DEBUG", "") not in ("", "0")
    try:
        app(args=given, prog_name="secateur")
    except SystemExit as stop:
        if isinstance(stop.code, int):
            return stop.code
        return int(stop.code is not None)
    except (SecateurError, OSError, MemoryError) as error:
        return report_error(error, as_json="--json" in given, debug=debug)
    except Exception as error:
        return report_internal(error, as_json="--json" in given, debug=debug)
    return 0


@app.callback()
def plugins(
    plugin: Annotated[
        list[str] | None, typer.Option(help="A pass or importance of yours: module:Class.")
    ] = None,
) -> None:
    """Compress language models by pruning."""
    with before_work():
        for where in plugin or ():
            add_plugin(where)


@app.command("inspect")
def inspect_command(
    model: ModelArgument,
    as_json: Json = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the coupled groups of one block: .png or .svg.")
    ] = None,
    overwrite: Overwrite = False,
    block: Annotated[int, typer.Option(help="Which block to draw; negative from the end.")] = 0,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Parameters, bytes, FLOPs, and the coupled groups by family: what may be pruned, what is
    locked, and why."""
    voice = opening.start_command(as_json, verbose)
    if picture is not None:
        with before_work():
            check_files([picture], overwrite=overwrite, inputs=[model])
    program = opening.open_program(model, voice, weights=False)
    found = inspect_program(program)
    if picture is not None:
        with before_work():
            path, groups = groups_of_block(program, block)
            with new_file(picture, overwrite=overwrite) as part:
                draw_groups(groups, path, part)
        voice.note(f"picture written: {picture}")
    voice.result(found.to_json(), inspection_tables(found))


@app.command("passes")
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


@app.command("recipes")
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


if __name__ == "__main__":
    main()
