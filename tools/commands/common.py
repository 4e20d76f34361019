"""What commands share: their common arguments, their voice, and opening a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.graph import Program, capture
from secateur.runtime import open_model
from secateur.runtime.open.declared import read_declared
from secateur.runtime.stock.biases import with_biases
from secateur.tools.report.console import BadInput, CommandConsole, before_work, log_to_stderr

ModelArgument = Annotated[
    str, typer.Argument(help="A model folder (config.json, safetensors) or a Hugging Face id.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tell choices and refusals.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result, and nothing else.")
]
Force = Annotated[bool, typer.Option("--force", hidden=True)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def refuse_force(force: bool) -> None:
    """Refuse the option that once stood for --overwrite, and removed more than that does.

    Raises:
        BadInput: it was given.
    """
    if force:
        raise BadInput(
            "--force is gone: --overwrite replaces an earlier result, and other files are "
            "never removed"
        )


def start_command(as_json: bool, verbose: bool) -> CommandConsole:
    """Logging, and the voice of a command."""
    log_to_stderr(verbose)
    return CommandConsole(as_json)


def open_program(
    model: str, voice: CommandConsole, *, weights: bool, biases: bool = False
) -> Program:
    """Open and capture; what is wrong with the model is the caller's input.

    Args:
        biases: give the model zero biases wherever its class can have some.
    """
    with before_work():
        with voice.waiting(f"opening {model}"):
            opened = open_model(model, weights=weights)
            if biases:
                opened = with_biases(opened)
            else:
                opened = opened
        names = [model, str(getattr(opened, "name_or_path", ""))]
        folder = next((Path(name) for name in names if name and Path(name).is_dir()), None)
        with voice.waiting("capturing the graph"):
            program = capture(opened, folder=folder)
            if folder:
                return program.replace(sparse=read_declared(folder))
            return program
