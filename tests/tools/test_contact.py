"""The first minute: help, version and completion answer at once, an interrupt says how to go on,
and the commands that the documents name exist."""

from __future__ import annotations

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import secateur
from secateur.tools import cli

ROOT = Path(__file__).parents[2]
Output = pytest.CaptureFixture[str]


def seconds_of_processor(arguments: list[str]) -> tuple[float, str]:
    """(CPU seconds of a command in a process of its own, its output)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "secateur.tools.cli", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, done.stdout


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_the_first_answer_loads_no_torch(word: str) -> None:
    spent, text = seconds_of_processor([word])
    assert spent < 1.0
    assert secateur.__version__ in text or "compress" in text


def test_every_command_is_there_and_has_a_summary() -> None:
    for name, (_, _, summary) in cli.COMMANDS.items():
        command = load(name)
        assert command.name == name and len(summary) <= 75 and summary.endswith(".")
        assert command.help


def load(name: str) -> typer.core.TyperCommand:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, cli.LazyGroup)
    command: typer.core.TyperCommand = group.get_command(None, name)
    return command


def documented_commands() -> list[tuple[str, list[str]]]:
    """(file, words) of every line in a block of code of the documents that calls secateur."""
    found: list[tuple[str, list[str]]] = []
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```(?:bash|sh|console)?\n(.*?)```", file.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ").strip()
                if line.startswith("secateur "):
                    found.append((file.name, shlex.split(line, comments=True)[1:]))
    return found


@pytest.mark.parametrize(("file", "words"), documented_commands())
def test_a_documented_command_is_understood(file: str, words: list[str]) -> None:
    name, *arguments = words
    if name in ("--version", "--help"):
        return
    assert name in cli.COMMANDS, f"{file}: there is no command {name}"
    load(name).make_context(name, list(arguments))


def test_an_interrupt_tells_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Output, model_folder: Path
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("secateur.tools.commands.common.open_model", interrupted)
    assert cli.run_command(["inspect", str(model_folder)]) == cli.INTERRUPTED
    assert "the same command goes on from there" in capsys.readouterr().err
