"""Hints of error messages name what the reader has: options that some command knows, and names of
Python only where the message says so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from secateur.graph import SecateurError
from secateur.passes.calibration.documents import read_documents
from secateur.tools.cli import app

ROOT = Path(__file__).parents[2]
PYTHON_ALONE = re.compile(
    r"example_inputs|open_model\(|save_weights|with_biases|raise_model|allow_unexpected|trust_code="
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# Options of others that messages name.
FOREIGN = {"--tune"}  # of the kernels' own script
# Answers to those who gave example inputs, in Python.
ANSWERS = ("example_inputs name",)


def messages() -> Iterator[tuple[str, str]]:
    """Place and text of every message that is raised."""
    for folder in ("graph", "passes", "runtime", "tools", "kernels"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Raise) and node.exc is not None:
                    pieces = []
                    for part in ast.walk(node.exc):
                        if isinstance(part, ast.Constant) and isinstance(part.value, str):
                            pieces.append(part.value)
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", " ".join(pieces)


def known_options() -> set[str]:
    """Every option of every command."""
    options = set()
    group: Any = typer.main.get_command(app)
    for name in group.list_commands(None):
        for parameter in group.get_command(None, name).params:
            options.update([*parameter.opts, *parameter.secondary_opts])
    return options


def test_messages_name_python_where_they_mean_it() -> None:
    found = dict(messages())
    assert len(found) > 300
    wrong = {}
    for place, text in found.items():
        said = "ython" in text or "--" in text or text.startswith(ANSWERS)
        if PYTHON_ALONE.search(text) and not said:
            wrong[place] = text
    assert not wrong


def test_messages_name_options_that_exist() -> None:
    options = known_options()
    assert "--overwrite" in options and "--dry-run" in options
    named = {}
    for place, text in messages():
        for option in OPTION.findall(text):
            named[option] = place
    assert "--overwrite" in named
    assert {o: place for o, place in named.items() if o not in options | FOREIGN} == {}


def test_a_text_that_git_lfs_left_behind(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    )
    plain = tmp_path / "text.txt"
    plain.write_bytes(file.read_bytes())
    for path in (file, plain):
        with pytest.raises(SecateurError, match="is a git-lfs pointer and not the text: run"):
            read_documents(path)
