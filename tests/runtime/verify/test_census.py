"""Counts from the file are those of a plain loop, whatever the numbers are; every planted fault has
its place."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from zoo.sparse24 import weight_24

from secateur.graph.errors import SourceError
from secateur.runtime.open.checkpoint import read_header
from secateur.runtime.verify import census, reload
from secateur.runtime.verify.census import PATTERNS, Census, census_of_file, group_by_family

EXTRA = {"2:8": (2, 8), "3:16": (3, 16), "1:3": (1, 3)}
TINY = 1e-45
ODD_NUMBERS = st.sampled_from(
    [0.0, -0.0, TINY, -TINY, 1.0, -1.0, 1.0, float("nan"), float("inf"), -float("inf"), 3e38]
)
FLOATS = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
)


def counted(tensors: dict[str, Tensor], folder: Path, **options: object) -> dict[str, Census]:
    file = folder / "model.safetensors"
    save_file(tensors, file)
    extra = {name: EXTRA for name, t in tensors.items() if t.dim() > 1}
    return {one.name: one for one in census_of_file(file, read_header(file), extra, **options)}


def plainly(weight: Tensor, kept: int, of: int) -> tuple[int, tuple[int, int] | None]:
    """The definition, one group after another."""
    wrong = [
        (row, start)
        for row, values in enumerate(weight.double().tolist())
        for start in range(0, weight.shape[1], of)
        if sum(value != 0 for value in values[start : start + of]) > kept
    ]
    return len(wrong), wrong[0] if wrong else None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_counts_are_those_of_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 37))
    dtype = data.draw(st.sampled_from(FLOATS))
    values = data.draw(st.lists(ODD_NUMBERS, min_size=rows * columns, max_size=rows * columns))
    weight = torch.tensor(values, dtype=torch.float64).view(rows, columns).to(dtype)
    wide = weight.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(census, "CHUNK_BYTES", data.draw(st.sampled_from([1, 64, 1 << 20])))
        found = counted({"w": weight}, tmp_path_factory.mktemp("c"))["w"]
    assert found.zeros == int((wide == 0).sum())
    assert found.negative_zeros == int(((wide == 0) & wide.signbit()).sum())
    assert (found.nans, found.infinities) == (int(wide.isnan().sum()), int(wide.isinf().sum()))
    odd = (~wide.isfinite()).nonzero()
    assert found.odd == (tuple(odd[0].tolist()) if len(odd) else None)
    assert found.fullest[0] == int((wide != 0).sum(1).max())
    for name, (kept, of) in {**PATTERNS, **EXTRA}.items():
        number, first = plainly(wide, kept, of)
        assert found.over[name] == number and found.first.get(name) == first, name
    assert found.pattern == next(
        (p for p, (n, m) in PATTERNS.items() if not plainly(wide, n, m)[0]), ""
    )


@settings(max_examples=40, deadline=None)
@given(
    row=st.integers(0, 30),
    group=st.integers(0, 15),
    value=st.sampled_from([TINY, -TINY, 1.0, float("nan")]),
)
def test_one_planted_number_is_found_where_it_is(
    tmp_path_factory: pytest.TempPathFactory, row: int, group: int, value: float
) -> None:
    weight = weight_24(31, 64)
    weight[row, 4 * group + int((weight[row, 4 * group : 4 * group + 4] == 0).int().argmax())] = (
        value
    )
    found = counted({"w": weight, "good": weight_24(31, 64)}, tmp_path_factory.mktemp("c"))
    assert (found["w"].over["2:4"], found["w"].first["2:4"]) == (1, (row, 4 * group))
    assert (
        found["good"].pattern == "2:4"
        and found["good"].over["1:4"] > 0
        and found["good"].share == 0.5
    )


def test_what_is_no_matrix_or_no_number_has_no_pattern(tmp_path: Path) -> None:
    tensors = {
        "vector": torch.tensor([1.0, -0.0, float("nan")]),
        "scalar": torch.tensor(0.0),
        "empty": torch.zeros(0, 4),
        "indices": torch.zeros(4, 4, dtype=torch.int64),
        "levels": torch.tensor([[0, 1, 0, -128]], dtype=torch.int8),
        "experts": torch.stack([weight_24(4, 16), weight_24(4, 16, seed=1)]),
    }
    found = counted(tensors, tmp_path)
    assert (
        found["vector"].over == {} and found["vector"].pattern == "" and found["vector"].nans == 1
    )
    assert (
        found["scalar"].zeros == 1 and found["indices"].over == {} and found["indices"].zeros == 0
    )
    assert found["empty"].pattern == "1:4" and found["empty"].share == 0.0
    assert (
        found["levels"].over["1:2"] == 0
        and found["levels"].negative_zeros == 0
        and found["levels"].pattern == "1:2"
    )
    assert found["experts"].pattern == "2:4"


def test_hashes_are_of_every_byte(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.zeros(2, 0)}
    whole = hashlib.sha256()
    found = counted(tensors, tmp_path, whole=whole, digests=True)
    assert (
        whole.hexdigest()
        == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    )
    assert {name: one.digest for name, one in found.items()} == {
        n: reload.hash_tensor(t) for n, t in tensors.items()
    }


def test_a_file_that_ends_while_it_is_read_is_told(tmp_path: Path) -> None:
    counted({"a": torch.randn(64, 64)}, tmp_path)
    file = tmp_path / "model.safetensors"
    records = read_header(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SourceError, match="ended while it was read"):
        list(census_of_file(file, records))


def test_layers_that_are_alike_stand_together() -> None:
    names = ["model.layers.0.up.weight", "model.layers.11.up.weight", "model.norm.weight"]
    grouped = group_by_family(Census(name, "f", (1,), "float32") for name in names)
    assert {name: len(ones) for name, ones in grouped.items()} == {
        "model.layers.*.up.weight": 2,
        "model.norm.weight": 1,
    }
