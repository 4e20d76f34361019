"""Entries that outlive a kill: whole or absent, exact, and never believed when damaged."""

from __future__ import annotations

import json
import logging
import os
import struct
from pathlib import Path

import pytest
import torch

from secateur.graph.errors import ArtifactError
from secateur.passes.storage.journal import Journal, hash_tensor

TENSORS = {
    "z": torch.ones(1, dtype=torch.float64),
    "a/weight": torch.arange(6.0).view(2, 3).t(),
    "b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    "flag": torch.tensor(True),
    "none": torch.empty(0, 4, dtype=torch.int64),
}
FACTS = {"step": 3, "loss": 0.1 + 0.2, "names": ["x", "y"], "inf": float("inf"), "nothing": None}


def test_an_entry_comes_back_exactly(tmp_path: Path) -> None:
    Journal(tmp_path / "deep" / "er").write("layer 3/mlp.down@x#2", TENSORS, FACTS)
    found = Journal(tmp_path / "deep" / "er").read("layer 3/mlp.down@x#2")
    assert found is not None and found.facts == FACTS
    assert list(found.tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert (
            hash_tensor(found.tensors[name]) == hash_tensor(tensor)
            and found.tensors[name].is_contiguous()
        )


def test_tensors_are_optional_and_may_share_memory(tmp_path: Path) -> None:
    journal, base = Journal(tmp_path), torch.arange(8.0)
    journal.write("facts alone", facts={"a": 1})
    journal.write("views", {"whole": base, "again": base, "half": base[:4]})
    facts, views = journal.read("facts alone"), journal.read("views")
    assert facts is not None and facts.facts == {"a": 1} and not facts.tensors
    assert views is not None and torch.equal(views.tensors["half"], base[:4]) and views.facts == {}
    assert journal.names() == ["facts alone", "views"]


def test_the_last_writing_counts_and_removal_forgets(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(3):
        journal.write("state", {"x": torch.full((2,), float(step))}, {"step": step})
    found = journal.read("state")
    assert (
        found is not None
        and found.facts == {"step": 2}
        and found.tensors["x"].tolist() == [2.0, 2.0]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    journal.remove("state")
    journal.remove("state")
    assert journal.read("state") is None and journal.names() == []


def test_without_a_folder_nothing_is_kept() -> None:
    journal = Journal(None)
    journal.write("x", {"y": torch.ones(1)})
    journal.remove("x")
    assert journal.read("x") is None and journal.names() == []


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_a_torn_entry_is_absent_and_told(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    Journal(tmp_path).write("x", TENSORS, FACTS)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:cut])
    with caplog.at_level(logging.WARNING, "secateur.passes"):
        assert Journal(tmp_path).read("x") is None
    assert str(file) in caplog.text and "worked out again" in caplog.text


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    Journal(tmp_path).write("x", {"w": torch.arange(4.0)}, {"step": 7})
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    padding = len(whole[8 : 8 + header]) - len(whole[8 : 8 + header].rstrip())
    for place in range(len(whole)):
        if 8 + header - padding <= place < 8 + header:
            continue  # blanks after the header mean nothing
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        found = Journal(tmp_path).read("x")
        assert found is None or (
            found.facts == {"step": 7} and torch.equal(found.tensors["w"], torch.arange(4.0))
        )


def test_an_unfinished_writing_is_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.write("x", facts={"step": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        journal.write("x", facts={"step": 2})
    found = journal.read("x")
    assert found is not None and found.facts == {"step": 1} and journal.names() == ["x"]


def test_a_disk_that_refuses_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match=r"cannot keep .*free some space"):
        Journal(tmp_path / "file").write("x", {"y": torch.ones(1)})


def test_facts_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Journal(tmp_path).write("x", facts={"path": Path("a")})
    assert json.loads(json.dumps({"a": 0.1}))["a"] == 0.1 and Journal(tmp_path).names() == []
