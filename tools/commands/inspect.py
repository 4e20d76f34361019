"""The command ``secateur inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.runtime.save.target import check_files, new_file
from secateur.tools.commands import common as opening
from secateur.tools.commands.common import Debug, Json, ModelArgument, Overwrite, Verbose
from secateur.tools.inspect import groups_of_block, inspect_program
from secateur.tools.report import draw_groups, inspection_tables
from secateur.tools.report.console import before_work


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
