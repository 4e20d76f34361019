"""The plain-Triton kernels in Triton's interpreter: test_portable.py runs this in a process with
TRITON_INTERPRET=1.

The interpreter is silently wrong on bf16 arithmetic and truncates where it should round; so results
are compared with the exact product within the tolerance of their type, and dense weights bit for
bit.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from weights24 import KINDS, close, exact, random_packed

from secateur.kernels.sparse24.gpu import portable
from secateur.kernels.sparse24.gpu.fragments import FLOATS, pack_fragments

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_portable.py"
EMPTY = torch.zeros(1, dtype=torch.int32)
MODEST = settings(max_examples=10, deadline=None)
SHAPE = st.sampled_from([(1, 4), (16, 64), (63, 132), (33, 320), (40, 576)])
KIND, HALF = st.sampled_from(KINDS), st.sampled_from([torch.bfloat16, torch.float16])


def gemv(
    kernels: ModuleType,
    n: int,
    k: int,
    b: int,
    kind: str,
    half: torch.dtype,
    u: int,
    wide: bool,
    seed: int,
) -> bool:
    generator = torch.Generator().manual_seed(seed)
    packed = random_packed(n, k, kind, generator)
    weight = pack_fragments(packed)
    x = torch.randn(b, k, generator=generator).to(FLOATS.get(kind, half))
    padded = F.pad(x, (0, weight.padded_columns - k))
    out = torch.full((b, n), float("nan"), dtype=torch.float32 if wide else x.dtype)
    tensors = (
        padded.view(torch.int32),
        weight.values,
        weight.indices,
        EMPTY if weight.scale is None else weight.scale,
    )
    options = {"KIND": "float" if kind in FLOATS else kind, "F16": x.dtype == torch.float16, "U": u}
    kernels.gemv[(len(weight.values), b)](*tensors, out, n, weight.padded_columns, **options)
    return close(out, exact(x, packed), x, packed)


def expand(
    kernels: ModuleType, n: int, k: int, kind: str, half: torch.dtype, u: int, seed: int
) -> bool:
    packed = random_packed(n, k, kind, torch.Generator().manual_seed(seed))
    weight, dtype = pack_fragments(packed), FLOATS.get(kind, half)
    columns = weight.padded_columns
    out = torch.full((n, columns), float("nan"), dtype=dtype)
    tensors = (
        weight.values,
        weight.indices,
        EMPTY if weight.scale is None else weight.scale,
        out.view(torch.int32),
    )
    options = {"KIND": "float" if kind in FLOATS else kind, "F16": dtype == torch.float16, "U": u}
    kernels.expand[(len(weight.values), -(-columns // (64 * u)))](*tensors, n, columns, **options)
    return (
        torch.equal(out[:, :k], packed.to_dense(torch.float32).to(dtype)) and not out[:, k:].any()
    )


@MODEST
@given(
    SHAPE,
    st.integers(1, 3),
    KIND,
    HALF,
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_gemv(
    shape: tuple[int, int], b: int, kind: str, half: torch.dtype, u: int, wide: bool, seed: int
) -> None:
    assert gemv(portable, *shape, b, kind, half, u, wide, seed)


@MODEST
@given(SHAPE, KIND, HALF, st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_expand(shape: tuple[int, int], kind: str, half: torch.dtype, u: int, seed: int) -> None:
    assert expand(portable, *shape, kind, half, u, seed)


FAULTS = {
    "the last row is not written": ("row < N, F16)", "row < N - 1, F16)"),
    "a wrong bit of the index": ("(code >> 2) & 1", "(code >> 3) & 1"),
    "swapped halves of an index word": (
        "(register & 1) * 16 + (lane & 3) * 4",
        "(~register & 1) * 16 + (lane & 3) * 4",
    ),
    "a wrong scale row": ("pair * 8 + (lane >> 2)", "pair * 8 + (lane & 3)"),
    "the last block is left out": ("live = block < blocks", "live = block < blocks - 1"),
    "one column of x too far": ("first * 32 + word", "first * 32 + word + 1"),
    "truncated, not rounded": ("bits + 32767 + ((bits >> 16) & 1)", "bits"),
}


def all_kinds(kernels: ModuleType) -> bool:
    half = torch.bfloat16
    products = (
        gemv(kernels, 33, 320, 2, kind, half, 2, False, 5) for kind in ("bfloat16", "int8", "int4")
    )
    return all(products) and all(
        expand(kernels, 33, 320, kind, half, 4, 5) for kind in ("bfloat16", "int8", "int4")
    )


def loaded(source: str, folder: Path) -> ModuleType:
    file = folder / "portable_copy.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("portable_copy", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_fault_all_kinds_are_green(tmp_path: Path) -> None:
    assert all_kinds(loaded(Path(str(portable.__file__)).read_text(), tmp_path))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str, tmp_path: Path) -> None:
    old, new = FAULTS[name]
    source = Path(str(portable.__file__)).read_text()
    assert source.count(old), f"{old!r}: the planted fault is out of date"
    assert not all_kinds(loaded(source.replace(old, new), tmp_path))
