"""Folders and files for tests of whole commands: a tiny checkpoint with a tokenizer, and some
text."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo.models import tiny_model

LETTERS = "abcdefghij"
SINGLE = "model.safetensors"


def save_tiny_model(folder: Path, kind: str = "llama") -> None:
    """Save a stock checkpoint: two layers, hidden 64, 96 neurons, 4 heads over 2 key/value heads, a
    token a letter."""
    model = tiny_model(kind)
    model.save_pretrained(folder)
    vocabulary = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{letter: i + 3 for i, letter in enumerate(LETTERS)},
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)


def write_letters(file: Path) -> None:
    """Write eight documents of 200 letters."""
    letters = random.Random(0)
    documents = ["".join(letters.choices(LETTERS, k=200)) for _ in range(8)]
    file.write_text("\n\n\n".join(documents))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a folder's one safetensors file and leave its data."""
    data = (folder / SINGLE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
