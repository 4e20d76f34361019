"""The Gluon kernels' own source under the stand-in: any shape, every kind, poisoned outputs, copies
late and early."""

from __future__ import annotations

import pytest
import torch
from emulated import Case, decode, gemm, wgmma
from gluon_standin import Kernels
from hypothesis import given, settings
from hypothesis import strategies as st

KERNELS = Kernels()
KIND = st.sampled_from(["bfloat16", "float16", "int8", "int4"])
SEED = st.integers(0, 2**31)
HALF = st.sampled_from([torch.bfloat16, torch.float16])
ODD_N, ODD_K = st.sampled_from([1, 15, 16, 63, 80]), st.sampled_from([4, 64, 132, 320, 576])
MODEST = settings(max_examples=15, deadline=None)


@MODEST
@given(
    ODD_N,
    ODD_K,
    st.integers(1, 16),
    KIND,
    HALF,
    st.integers(1, 3),
    SEED,
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
)
def test_decode(
    n: int, k: int, b: int, kind: str, dtype: torch.dtype, splits: int, seed: int, p: int, mt: int
) -> None:
    assert decode(Case(n, k, b, kind, dtype, splits, seed), KERNELS, p=p, mt=mt)


@MODEST
@given(
    ODD_N,
    ODD_K,
    st.integers(1, 40),
    KIND,
    HALF,
    st.integers(1, 3),
    SEED,
    st.sampled_from([(1, 1, 2, 2), (2, 1, 2, 1), (1, 2, 1, 2)]),
    st.integers(1, 2),
    st.integers(2, 4),
    st.booleans(),
)
def test_gemm(
    n: int,
    k: int,
    b: int,
    kind: str,
    dtype: torch.dtype,
    splits: int,
    seed: int,
    tile: tuple[int, int, int, int],
    ku: int,
    stages: int,
    early: bool,
) -> None:
    case, ku = Case(n, k, b, kind, dtype, splits, seed), 1 if kind == "int4" else ku
    mt, nt, wm, wn = tile
    assert gemm(case, KERNELS, mt=mt, nt=nt, wm=wm, wn=wn, ku=ku, stages=stages, early=early)


@MODEST
@given(
    ODD_N, ODD_K, st.integers(1, 140), st.sampled_from(["bfloat16", "float16"]), SEED,
    st.sampled_from([1, 2]), st.integers(2, 4), st.booleans(),
)  # fmt: skip
def test_wgmma(
    n: int, k: int, b: int, kind: str, seed: int, wg: int, stages: int, early: bool
) -> None:
    assert wgmma(Case(n, k, b, kind, seed=seed), KERNELS, wg=wg, stages=stages, early=early)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("early", [False, True])
def test_each_kind_through_a_full_ring_and_split_k(kind: str, early: bool) -> None:
    case = Case(80, 1024 + 192, 20, kind, splits=2)
    assert gemm(case, KERNELS, mt=2, nt=1, wm=2, wn=2, stages=3, early=early)
    assert decode(Case(80, 1024 + 192, 11, kind, splits=2), KERNELS, p=2, mt=2, warps=2)
