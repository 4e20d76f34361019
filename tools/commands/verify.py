"""The command ``secateur verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.runtime import verify_folder
from secateur.tools.commands.common import Debug, Json, Verbose, start_command
from secateur.tools.report.console import FAILED, before_work
from secateur.tools.report.verification import verification_tables


def verify_command(
    folder: Annotated[
        Path, typer.Argument(help="A folder with a model in it, of secateur or not.")
    ],
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Do not open the model: only read, count and hash what is stored."
        ),
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Check a model folder from its stored files: zeros and n:m groups, hashes, packed weights,
    keys, outputs.

    Exit code 0: no fault; 1: at least one, each named with what to do.  No code and no pickle of
        the folder is opened.
    """
    voice = start_command(as_json, verbose)
    with before_work():
        if not folder.expanduser().is_dir():
            verify_folder(folder)  # says what is wrong with it
    verification = verify_folder(folder, quick=quick, progress=voice.progress)
    voice.result(verification.to_json(), verification_tables(verification))
    if not verification.green:
        raise typer.Exit(FAILED)
