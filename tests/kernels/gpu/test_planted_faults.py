"""Faults planted in the kernels and in the packing: the checks of this folder see each of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from emulated import Case, decode, gemm, wgmma
from gluon_standin import Kernels

from secateur.kernels.sparse24.gpu import fragments

Check = Callable[[Kernels], bool]
DECODE: dict[str, Check] = {
    kind: partial(decode, Case(63, 1216, 11, kind, splits=2), p=2, mt=2)
    for kind in ("bfloat16", "int8", "int4")
}
GEMM: dict[str, Check] = {
    kind: partial(gemm, Case(63, 704, 19, kind, splits=2), mt=1, nt=1, wm=2, wn=2)
    for kind in ("bfloat16", "int8", "int4")
}
WIDE: Check = partial(gemm, Case(63, 704, 19, "bfloat16"), wm=2, wn=2, ku=2)
EARLY: Check = partial(gemm, Case(63, 704, 19, "bfloat16"), wm=2, wn=2, early=True)
WGMMA: Check = partial(wgmma, Case(63, 320, 130))
WGMMA_EARLY: Check = partial(wgmma, Case(63, 320, 130), early=True)

STORE = "mask=(col < B) & (row < N)"
FAULTS: dict[str, tuple[str, str, str, Check]] = {
    # off-by-one masks
    "decode: one block too many": (
        "decode",
        "stride < blocks",
        "stride <= blocks",
        DECODE["bfloat16"],
    ),
    "decode: one batch row too many": (
        "decode",
        "lane // 4, B - 1)",
        "lane // 4, B)",
        DECODE["bfloat16"],
    ),
    "decode: one row too many is stored": (
        "decode",
        STORE,
        STORE.replace("row < N", "row <= N"),
        DECODE["bfloat16"],
    ),
    "gemm: x past the last column is read": ("gemm", "x_at < K // 2", "x_at < K", WIDE),
    "gemm: the last row tile is missed": (
        "gemm",
        "(N + 15) // 16 - 1",
        "(N + 15) // 16 - 2",
        GEMM["bfloat16"],
    ),
    "decode: padding's index words are zero": (
        "decode",
        "constexpr(0x44444444)",
        "constexpr(0)",
        DECODE["bfloat16"],
    ),
    # wrong waits, wrong places in the ring
    "gemm: one group too few is waited for": (
        "gemm",
        "wait_group(STAGES - 2)",
        "wait_group(STAGES - 1)",
        GEMM["int8"],
    ),
    "wgmma: one group too few is waited for": (
        "wgmma",
        "wait_group(STAGES - 2)",
        "wait_group(STAGES - 1)",
        WGMMA,
    ),
    "gemm: a stage that is read is overwritten": (
        "gemm",
        "index(ahead % STAGES)",
        "index((ahead + 1) % STAGES)",
        EARLY,
    ),
    "wgmma: a stage that is read is overwritten": (
        "wgmma",
        "index(ahead % STAGES)",
        "index((ahead + 1) % STAGES)",
        WGMMA_EARLY,
    ),
    "wgmma: nothing is fenced": ("wgmma", "wgmma.fence.sync.aligned;", "", WGMMA),
    "wgmma: nothing is committed": ("wgmma", "wgmma.commit_group.sync.aligned;", "", WGMMA),
    # index words
    "decode: even and odd tile are swapped": (
        "decode",
        "mma(a1, x1, mma(a0, x0, acc, e, False, F16), e, True, F16)",
        "mma(a1, x1, mma(a0, x0, acc, e, True, F16), e, False, F16)",
        DECODE["int8"],
    ),
    "gemm: the second index word is the first": (
        "gemm",
        "load_indices(e_now, 1,",
        "load_indices(e_now, 0,",
        GEMM["int4"],
    ),
    "decode: the second index word is the first": (
        "decode",
        "load(ep + 32, live",
        "load(ep, live",
        DECODE["int4"],
    ),
    # wrong scale rows
    "the scale of row g + 8 is that of row g": (
        "mma",
        "word & -65536",
        "word << 16",
        DECODE["int4"],
    ),
    "gemm: the scale of row g + 8 is that of row g": (
        "mma",
        "word & -65536",
        "word << 16",
        GEMM["int4"],
    ),
    "decode: a scale's row is the lane in four": (
        "decode",
        "at * 8 + lane // 4",
        "at * 8 + lane % 4",
        DECODE["int4"],
    ),
    "decode: int8 scales start again each tile": (
        "decode",
        "s_ptr + row, mask",
        "s_ptr + row % 16, mask",
        DECODE["int8"],
    ),
    "gemm: int8 scales start again each tile": (
        "gemm",
        "s_ptr + row, mask",
        "s_ptr + row % 16, mask",
        GEMM["int8"],
    ),
    "gemm: the scale is that of the first block": (
        "gemm",
        "sp + (first + k) * 8",
        "sp",
        GEMM["int4"],
    ),
    # unwritten tails, lost pieces of K
    "decode: the last row is not written": (
        "decode",
        STORE,
        STORE.replace("row < N", "row < N - 1"),
        DECODE["int4"],
    ),
    "decode: the last batch row is not written": (
        "decode",
        STORE,
        STORE.replace("< B", "< B - 1"),
        DECODE["int8"],
    ),
    "gemm: the last row is not written": (
        "gemm",
        STORE,
        STORE.replace("row < N", "row < N - 1"),
        GEMM["bfloat16"],
    ),
    "wgmma: the last batch row is not written": (
        "wgmma",
        STORE,
        STORE.replace("< B", "< B - 1"),
        WGMMA,
    ),
    "decode: a step is left out": (
        "decode",
        "range(stride, blocks - stride, stride)",
        "range(stride, blocks - 2 * stride, stride)",
        DECODE["bfloat16"],
    ),
    "decode: the last step is not masked": (
        "decode",
        "live, KIND, True)",
        "live, KIND, False)",
        DECODE["int8"],
    ),
    "gemm: a split starts one stage late": (
        "gemm",
        "gl.program_id(2) * steps",
        "gl.program_id(2) * (steps + 1)",
        GEMM["int8"],
    ),
    "decode: every split writes plane 0": (
        "decode",
        "gl.program_id(1) * B + col",
        "gl.program_id(1) * 0 + col",
        DECODE["bfloat16"],
    ),
    # unpacking and the descriptor
    "int8: the offset is 127": ("mma", "0fCB000080", "0fCB00007F", DECODE["int8"]),
    "int4: the high nibbles are the low ones": ("mma", "0x000f000f", "0x0000000f", GEMM["int4"]),
    "wgmma: the next eight rows lie 512 bytes on": ("wgmma", "0x40000040", "0x40000020", WGMMA),
    "wgmma: the second tile is the first": (
        "wgmma",
        "add.s64 q1, q0, 4",
        "add.s64 q1, q0, 0",
        WGMMA,
    ),
}


def red(check: Check, kernels: Kernels) -> bool:
    """Whether the check fails: a wrong result, an access outside a tensor, or a broken rule of the
    instruction."""
    try:
        return not check(kernels)
    except AssertionError as error:
        assert "out of date" not in str(error), error
        return True


@pytest.mark.parametrize(
    "check", [*DECODE.values(), *GEMM.values(), WIDE, EARLY, WGMMA, WGMMA_EARLY]
)
def test_without_a_fault_the_check_is_green(check: Check) -> None:
    assert check(Kernels())


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str) -> None:
    module, old, new, check = FAULTS[name]
    assert red(check, Kernels((module, old, new)))


@pytest.mark.parametrize(
    ("order", "target"),
    [
        ("indices", "n b g s h c j"),  # the halves of an index word are swapped with its lanes
        (
            "indices",
            "n b g c s h j",
        ),  # even and odd tile are swapped with the halves of their columns
        ("float", "n b g t h c j"),
        ("float", "n b t g c h j"),
    ],
)
def test_a_wrong_order_of_packing_is_seen(
    order: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing with such an order still unpacks to the same weight: only the instruction tells."""
    monkeypatch.setitem(fragments.ORDERS, order, (fragments.ORDERS[order][0], target))
    assert red(DECODE["bfloat16"], Kernels())


def test_scales_packed_in_a_wrong_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fragments.ORDERS, "scale", ("n g8 h2 b", "n b g h"))
    assert red(DECODE["int4"], Kernels())


def test_a_fault_that_no_longer_fits_the_source_says_so() -> None:
    with pytest.raises(AssertionError, match="out of date"):
        _ = Kernels(("decode", "no such line", "")).decode
