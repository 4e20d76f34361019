"""Windows out of files, what is held back, and the order in which they are seen."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo.models import tiny_model

from secateur.graph import Program, capture
from secateur.passes.calibration.data import Sample
from secateur.passes.training.text import (
    TextError,
    TrainingOrder,
    collate_batch,
    read_windows,
    split_held_out,
)

WORDS = ("<end>", "a", "b", "c", "d", "?")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A tiny model in a folder with a tokenizer of five words."""
    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", unk_token="?"
    ).save_pretrained(folder)
    return capture(tiny_model("llama"), folder=folder)


def rows(samples: tuple[Sample, ...]) -> list[list[int]]:
    return [sample.inputs["input_ids"][0].tolist() for sample in samples]


def test_text_becomes_windows_of_joined_documents(program: Program, tmp_path: Path) -> None:
    plain, lines = tmp_path / "text.txt", tmp_path / "text.jsonl"
    plain.write_text("a b\n\n\nc d a\n\n\nb")
    lines.write_text("\n".join(json.dumps({"text": text}) for text in ("a b", "c d a", "b")))
    found = rows(read_windows(plain, program, tokens=100, window=4, seed=0))
    assert found == rows(read_windows(lines, program, tokens=100, window=4, seed=0))
    stream = [token for row in found for token in row]
    assert len(found) == 2 and all(len(row) == 4 for row in found)
    ends = " ".join(WORDS[token] for token in stream)
    assert sorted(part.strip() for part in ends.split("<end>") if part.strip())[0] in ("a b", "b")
    assert rows(read_windows(plain, program, tokens=3, window=4, seed=0)) == found[:1]
    orders = {
        str(rows(read_windows(plain, program, tokens=100, window=4, seed=seed)))
        for seed in range(8)
    }
    assert len(orders) > 1, "the order of the documents depends on the seed"


def test_tokenised_windows_are_read_as_they_are(program: Program, tmp_path: Path) -> None:
    save_file(
        {"input_ids": torch.arange(24, dtype=torch.int32).view(3, 8)}, tmp_path / "ids.safetensors"
    )
    found = read_windows(tmp_path / "ids.safetensors", program, tokens=100, window=8, seed=0)
    assert rows(found) == torch.arange(24).view(3, 8).tolist()
    assert found[0].inputs["input_ids"].dtype == torch.int64
    assert rows(
        read_windows(tmp_path / "ids.safetensors", program, tokens=9, window=5, seed=0)
    ) == [
        [0, 1, 2, 3, 4],
        [8, 9, 10, 11, 12],
    ]


def test_what_cannot_be_read_says_why(program: Program, tmp_path: Path) -> None:
    def refused(name: str, content: bytes, match: str, of: Program = program) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TextError, match=match):
            read_windows(tmp_path / name, of, tokens=10, window=8, seed=0)

    refused("short.txt", b"a b", "less than one window of 8")
    refused("broken.jsonl", b'{"other": 1}', "expected a JSON object")
    refused("latin.txt", b"\xff\xfe\xff", "UTF-8")
    refused("broken.safetensors", b"no", "input_ids")
    refused(
        "text.txt",
        b"a",
        "no folder with a tokenizer",
        program.replace(source=capture(tiny_model("llama")).source),
    )
    save_file({"input_ids": torch.zeros(3)}, tmp_path / "flat.safetensors")
    with pytest.raises(TextError, match=r"expected integers \[n, window\]"):
        read_windows(tmp_path / "flat.safetensors", program, tokens=10, window=8, seed=0)


def sample(*ids: int) -> Sample:
    return Sample({"input_ids": torch.tensor([ids])})


def test_nothing_is_both_trained_on_and_held_back() -> None:
    sequences = [sample(i, i) for i in range(20)]
    text = split_held_out(sequences, 3)
    assert rows(text.held_out) + rows(text.train) == [[i, i] for i in range(20)]
    assert len(text.held_out) == 3 and text.window == 2
    assert len(split_held_out(sequences, 16).held_out) == 4, "one in five at most"
    assert len(split_held_out(sequences[:4], 16).held_out) == 0
    assert text.sha256() != split_held_out(sequences[1:], 3).sha256()
    with pytest.raises(TextError, match="no sequence"):
        split_held_out([], 3)


def test_each_pass_over_the_text_sees_every_sequence_once_in_an_order_of_its_own() -> None:
    text = [sample(i, i) for i in range(10)]
    order = [TrainingOrder(text, 25, 7)[at]["window"] for at in range(25)]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20] and set(Counter(order[20:]).values()) == {1}
    late = TrainingOrder(text, 25, 7)
    assert [late[at]["window"] for at in (17, 3)] == [order[17], order[3]], (
        "any place can be gone to"
    )
    assert [TrainingOrder(text, 25, 8)[at]["window"] for at in range(25)] != order


def test_a_batch_predicts_next_tokens_and_does_not_count_padding() -> None:
    batch = collate_batch(
        [{"window": 4, "sample": sample(5, 6, 7)}, {"window": 1, "sample": sample(8, 9)}]
    )
    assert batch["inputs"]["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[6, 7, -100], [9, -100, -100]]
    assert batch["counted"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["window"].tolist() == [4, 1]
    even = collate_batch(
        [
            {
                "window": 0,
                "sample": Sample({"input_ids": torch.tensor([[1, 2]])}, torch.tensor([[-100, 2]])),
            }
        ]
    )
    assert "counted" not in even and even["labels"].tolist() == [[2, -100]]
