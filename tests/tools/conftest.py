"""A tiny model folder with a tokenizer and some text, for commands."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo.models import tiny_model

from secateur.graph import Program, capture
from secateur.tools import opening
from secateur.tools.report.console import Voice

LETTERS = "abcdefghij"
OPENED: dict[bool, Program] = {}


@pytest.fixture(scope="session")
def llama() -> Program:
    """Two layers, hidden 64, 96 neurons, 4 heads over 2 key/value heads."""
    return capture(tiny_model("llama"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock checkpoint: two layers, hidden 64, 96 neurons, 4 heads over 2 key/value heads, one token a letter."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{letter: i + 3 for i, letter in enumerate(LETTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight documents of 200 letters."""
    letters = random.Random(0)
    documents = ["".join(letters.choices(LETTERS, k=200)) for _ in range(8)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n\n".join(documents))
    return file


@pytest.fixture
def opened_once(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    """The good model is opened and captured once; Programs do not change."""
    real = opening.open_program

    def open_program(model: str, voice: Voice, *, weights: bool) -> Program:
        if model != str(model_folder):
            return real(model, voice, weights=weights)
        if weights not in OPENED:
            OPENED[weights] = real(model, voice, weights=weights)
        return OPENED[weights]

    monkeypatch.setattr(opening, "open_program", open_program)
