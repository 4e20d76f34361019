"""The check that a kernel must pass before anything is run or timed on it.

Exact cases: small integers and power-of-two scales, where every sum is exact in float32, so that
    result and reference
agree bit for bit: one wrong column, scale or row shows.  Rounded cases: normal data, within the
tolerances below. Outputs are full of NaN beforehand, so that an element nobody wrote shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.kernels.sparse24 import reference
from secateur.kernels.sparse24.formats import (
    FLOAT_KINDS,
    GROUP_INT4,
    LEVELS,
    QUANTIZED_KINDS,
    count_stored_columns,
    pack,
    pack_nibbles,
)

RawLinear = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor], object]
# |y - reference| <= TOLERANCE * (|x| |W|^T + |b|): rounding of y, and of W where it is expanded to
# the dtype of x.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# N, K: no, one and several whole blocks, with and without a tail.
SHAPES = ((1, 8), (5, 64), (63, 136), (12, 328), (3, 576))
BATCHES = (1, 2, 3, 7, 16, 67)  # every tile, several tiles, and the expanded path


@dataclass(frozen=True)
class Case:
    """One call of a raw kernel; ``exact``: the result must equal the reference bit for bit."""

    name: str
    exact: bool
    x: Tensor
    values: Tensor
    mask: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


def find_failures(run: RawLinear) -> list[str]:
    """What is wrong with a raw kernel ``run(x, values, mask, scale, bias, y)``: one line a failing
    case; empty: green.

    y is [M, N] of the dtype of x, to be written in full.
    """
    return [
        f"{case.name}: {trouble}" for case in iterate_cases() if (trouble := judge_case(case, run))
    ]


def judge_case(case: Case, run: RawLinear) -> str:
    """What is wrong with one case; empty: nothing."""
    y = torch.full((len(case.x), case.values.shape[0]), float("nan"), dtype=case.x.dtype)
    run(case.x, case.values, case.mask, case.scale, case.bias, y)
    wanted = reference.linear(case.x, case.values, case.mask, case.scale, case.bias)
    if bool(y.isnan().any()):
        return f"{int(y.isnan().sum())} of {y.numel()} results were not written or are NaN"
    if case.exact:
        wrong = int((y != wanted).sum())
        if wrong:
            return f"{wrong} of {y.numel()} results differ from exact sums"
        return ""
    dense = reference.dense_weight(case.values, case.mask, case.scale, torch.float32)[
        :, : case.x.shape[1]
    ]
    size = case.x.float().abs() @ dense.abs().T + (
        0 if case.bias is None else case.bias.float().abs()
    )
    worst = float(((y.float() - wanted.float()).abs() / size.clamp_min(1e-30)).max())
    limit = TOLERANCE[case.x.dtype]
    if worst > limit:
        return f"relative error {worst:.2g}, allowed {limit:.2g}"
    return ""


def iterate_cases() -> Iterator[Case]:
    """Every kind, sparse and dense, with every dtype of x that it takes, over SHAPES and BATCHES in
    turn."""
    generator = torch.Generator().manual_seed(24)
    at = 0
    for kind, dtype, sparse in iterate_layouts():
        for shape in SHAPES:
            for exact in (True, False):
                yield make_case(
                    kind, dtype, sparse, shape, BATCHES[at % len(BATCHES)], exact, generator
                )
                at += 1


def iterate_layouts() -> Iterator[tuple[str, torch.dtype, bool]]:
    """(kind of the values, dtype of x, sparse) of all canonical ops."""
    yield from ((kind, dtype, True) for kind, dtype in FLOAT_KINDS.items())
    yield from (
        (kind, dtype, sparse)
        for kind in QUANTIZED_KINDS
        for dtype in FLOAT_KINDS.values()
        for sparse in (True, False)
    )


def make_case(
    kind: str,
    dtype: torch.dtype,
    sparse: bool,
    shape: tuple[int, int],
    batch: int,
    exact: bool,
    generator: torch.Generator,
) -> Case:
    """A case with random data; every third group of the weight has fewer than two non-zeros."""
    rows, columns = shape
    name = (
        f"{kind} {'2:4' if sparse else 'dense'}, x {str(dtype)[6:]}, N {rows}, K {columns}, "
        f"batch {batch}"
    )
    x = _make_data((batch, columns), exact, dtype, generator)
    bias = None
    if rows % 2:
        bias = _make_data((rows,), exact, dtype, generator)
    weight, scale = _make_weight(kind, sparse, shape, exact, generator)
    if sparse:
        packed = pack(weight, kind, scale)
        return Case(name, exact, x, packed.values, packed.mask, packed.scale, bias)
    padded = torch.nn.functional.pad(weight, (0, count_stored_columns(columns) - columns))
    return Case(
        name, exact, x, pack_nibbles(padded) if kind == "int4" else padded, None, scale, bias
    )


def _make_data(
    shape: tuple[int, ...], exact: bool, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if exact:
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _make_weight(
    kind: str, sparse: bool, shape: tuple[int, int], exact: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    rows, columns = shape
    if kind in FLOAT_KINDS:
        weight = _make_data(shape, exact, FLOAT_KINDS[kind], generator)
        scale = None
    else:
        low, high = LEVELS[kind]
        weight = torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)
        groups = -(-count_stored_columns(columns) // GROUP_INT4)
        power = torch.randint(
            -2, 1, (rows,) if kind == "int8" else (rows, groups), generator=generator
        )
        if exact:
            scale = torch.exp2(power.float())
        else:
            scale = torch.rand(power.shape, generator=generator) + 0.5
        if kind == "int4":
            scale = scale.bfloat16()
        else:
            scale = scale
    return weight * _random_mask(shape, generator) if sparse else weight, scale


def _random_mask(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """int8 ones at two random columns of each group, at one or none in every third group."""
    rows, columns = shape
    order = torch.rand(rows, -(-columns // 4), 4, generator=generator).argsort(-1)
    kept = (order < 2).to(torch.int8)
    kept[:, ::3] = (order[:, ::3] < torch.arange(rows)[:, None, None] % 2).to(torch.int8)
    return kept.flatten(1)[:, :columns]
