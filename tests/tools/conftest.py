"""A tiny model folder with a tokenizer and some text, for commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo.folders import save_tiny_model, write_letters
from zoo.models import tiny_model

from secateur.graph import Program, capture
from secateur.tools.commands import common as opening
from secateur.tools.report.console import CommandConsole

OPENED: dict[bool, Program] = {}


@pytest.fixture(scope="session")
def llama() -> Program:
    """Two layers, hidden 64, 96 neurons, 4 heads over 2 key/value heads."""
    return capture(tiny_model("llama"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of ``save_tiny_model``."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents of ``write_letters``."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    write_letters(file)
    return file


@pytest.fixture
def opened_once(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    """The good model is opened and captured once; Programs do not change."""
    real = opening.open_program

    def open_program(model: str, voice: CommandConsole, *, weights: bool) -> Program:
        if model != str(model_folder):
            return real(model, voice, weights=weights)
        if weights not in OPENED:
            OPENED[weights] = real(model, voice, weights=weights)
        return OPENED[weights]

    monkeypatch.setattr(opening, "open_program", open_program)
