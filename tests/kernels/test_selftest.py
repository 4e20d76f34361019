"""The check that every kernel must pass is green for the reference and red for every planted
fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.kernels.sparse24 import reference, selftest
from secateur.kernels.sparse24.selftest import (
    RawLinear,
    find_failures,
    iterate_cases,
    iterate_layouts,
)

Maybe = Tensor | None
Arguments = tuple[Tensor, Tensor, Maybe, Maybe, Maybe]


def raw(
    change: Callable[[Arguments], Arguments] = lambda a: a,
    spoil: Callable[[Tensor], None] = lambda y: None,
) -> RawLinear:
    """The reference as a raw kernel whose arguments are changed before, or whose output is spoiled
    after."""

    def run(x: Tensor, values: Tensor, mask: Maybe, scale: Maybe, bias: Maybe, y: Tensor) -> None:
        before = y.clone()
        y.copy_(reference.linear(*change((x, values, mask, scale, bias))))
        spoil(y)
        y[y == UNWRITTEN] = before[y == UNWRITTEN]

    return run


UNWRITTEN = -12345.0


def shifted_mask(a: Arguments) -> Arguments:
    """Each group keeps the columns one to the right."""
    return (a[0], a[1], None if a[2] is None else (a[2] << 1 & 0xEE) | (a[2] >> 3 & 0x11), *a[3:])


def swapped_halves(a: Arguments) -> Arguments:
    return (a[0], a[1], None if a[2] is None else a[2] << 4 | a[2] >> 4, *a[3:])


def next_row_scale(a: Arguments) -> Arguments:
    return (*a[:3], None if a[3] is None else a[3].roll(1, 0), a[4])


def next_group_scale(a: Arguments) -> Arguments:
    return (
        (*a[:3], None if a[3] is None or a[3].ndim < 2 else a[3].roll(1, 1), a[4])
        if a[3] is not None
        else a
    )


def swapped_nibbles(a: Arguments) -> Arguments:
    return (a[0], a[1] << 4 | a[1] >> 4, *a[2:]) if a[1].dtype == torch.uint8 else a


def no_last_columns(a: Arguments) -> Arguments:
    """The columns of the last short block are forgotten."""
    whole = a[0].shape[1] // 64 * 64
    return (F.pad(a[0][:, :whole], (0, a[0].shape[1] - whole)), *a[1:]) if whole else a


def next_bias(a: Arguments) -> Arguments:
    return (*a[:4], None if a[4] is None else a[4].roll(1, 0))


def no_last_row(y: Tensor) -> None:
    y[-1, -1] = UNWRITTEN


def one_ulp(y: Tensor) -> None:
    y[0, 0] = torch.nextafter(y[0, 0], torch.tensor(float("inf"), dtype=y.dtype))


FAULTS = {
    "mask off by one": raw(shifted_mask),
    "halves of the mask swapped": raw(swapped_halves),
    "scale of the next row": raw(next_row_scale),
    "scale of the next group": raw(next_group_scale),
    "nibbles swapped": raw(swapped_nibbles),
    "short block forgotten": raw(no_last_columns),
    "bias of the next row": raw(next_bias),
    "one output not written": raw(spoil=no_last_row),
    "one output off by the last bit": raw(spoil=one_ulp),
}


def test_the_reference_is_green() -> None:
    assert find_failures(raw()) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_red(fault: str) -> None:
    assert find_failures(FAULTS[fault])


def test_an_unwritten_output_is_reported_as_such() -> None:
    assert "1 of " in find_failures(FAULTS["one output not written"])[0]
    assert "not written" in find_failures(FAULTS["one output not written"])[0]


def test_the_cases_cover_every_layout_batch_and_an_incomplete_group() -> None:
    made = list(iterate_cases())
    assert {c.name.split(", N")[0] for c in made} == {
        f"{kind} {'2:4' if sparse else 'dense'}, x {str(dtype)[6:]}"
        for kind, dtype, sparse in iterate_layouts()
    }
    assert {len(c.x) for c in made} == set(selftest.BATCHES)
    assert any(
        c.mask is not None and bool((c.values.float() == 0).any()) for c in made if c.scale is None
    )


@pytest.mark.parametrize("index", range(0, 150, 7))
def test_the_reference_agrees_with_double_precision(index: int) -> None:
    case = list(iterate_cases())[index]
    weight = reference.dense_weight(case.values, case.mask, case.scale, torch.float32).double()[
        :, : case.x.shape[1]
    ]
    bias = 0 if case.bias is None else case.bias.double()
    wanted = case.x.double() @ weight.T + bias
    found = reference.linear(case.x, case.values, case.mask, case.scale, case.bias)
    size = case.x.double().abs() @ weight.abs().T + abs(bias)
    assert found.dtype == case.x.dtype
    assert bool(
        ((found.double() - wanted).abs() <= {2: 2**-8, 4: 1e-6}[found.element_size()] * size).all()
    )
