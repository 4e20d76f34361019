"""What the units of a group cost: parameters, bytes, FLOPs a token, or measured seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.graph import CoupledGroup, Program
from secateur.passes.importance.base import distinct_members

CostKind = Literal["parameters", "bytes", "flops", "latency"]
Cost = Callable[[int], float]
"""From the number of units kept to what they cost."""
LATENCY_TOKENS = 1  # rows of the products that are timed: decoding, one sequence
RUNS = 5


def cost_of(kind: CostKind, program: Program, group: CoupledGroup) -> Cost:
    """The cost of the group's units as a function of how many stay.

    parameters, bytes: of everything that goes with a unit.
    flops: two for each entry of a matrix, a token.
    latency: seconds of the group's matrices applied to one token on the parameters' device, the
        median of five runs.

    Args:
        kind: what is counted.
        program: the model.
        group: whose units are kept.

    Returns:
        a function of the number of units kept.
    """
    return KINDS[kind](program, group)


def _distinct_members(program: Program, group: CoupledGroup) -> list[tuple[Tensor, int, int]]:
    """(parameter, dim, entries of one unit) of every distinct member."""
    named = dict(program.named_parameters())
    distinct: list[tuple[Tensor, int, int]] = []
    for member in distinct_members(group):
        weight = named[member.parameter]
        distinct.append(
            (
                weight,
                member.dim,
                member.positions.shape[1] * weight.numel() // weight.shape[member.dim],
            )
        )
    return distinct


def _parameter_cost(program: Program, group: CoupledGroup) -> Cost:
    """Parameters of the units kept."""
    each = sum(entries for _, _, entries in _distinct_members(program, group))
    return lambda kept: float(kept * each)


def _byte_cost(program: Program, group: CoupledGroup) -> Cost:
    """Bytes of the units kept."""
    each = sum(
        entries * weight.element_size() for weight, _, entries in _distinct_members(program, group)
    )
    return lambda kept: float(kept * each)


def _flop_cost(program: Program, group: CoupledGroup) -> Cost:
    """FLOPs a token of the units kept."""
    each = sum(
        2 * entries for weight, _, entries in _distinct_members(program, group) if weight.dim() > 1
    )
    return lambda kept: float(kept * each)


def _latency_cost(program: Program, group: CoupledGroup) -> Cost:
    """Measured seconds a token of the units kept."""
    matrices = []
    for weight, dim, _ in _distinct_members(program, group):
        if weight.dim() == 2:
            matrices.append((weight, dim))
    known: dict[int, float] = {}

    def seconds(kept: int) -> float:
        if kept not in known:
            part = kept / group.units
            known[kept] = sum(
                _measure_seconds(weight, dim, max(1, round(part * weight.shape[dim])))
                for weight, dim in matrices
            )
        return known[kept]

    return seconds


@torch.no_grad()
def _measure_seconds(weight: Tensor, dim: int, size: int) -> float:
    """Median seconds of the matrix, cut to ``size`` along ``dim``, applied to LATENCY_TOKENS
    rows."""
    cut = weight.detach().narrow(dim, 0, min(size, weight.shape[dim])).contiguous()
    x = torch.ones(LATENCY_TOKENS, cut.shape[1], dtype=cut.dtype, device=cut.device)
    run = partial(F.linear, x, cut)
    run()
    return statistics.median(_time_run(run, cut) for _ in range(RUNS))


def _time_run(run: Callable[[], Tensor], where: Tensor) -> float:
    """Seconds of one run, with the device synchronised."""
    if where.is_cuda:
        torch.cuda.synchronize(where.device)
    start = time.perf_counter()
    run()
    if where.is_cuda:
        torch.cuda.synchronize(where.device)
    return time.perf_counter() - start


KINDS: Mapping[str, Callable[[Program, CoupledGroup], Cost]] = {
    "parameters": _parameter_cost,
    "bytes": _byte_cost,
    "flops": _flop_cost,
    "latency": _latency_cost,
}


def sizes_of(units: int, levels: int, multiple: int, least: int) -> Sequence[int]:
    """The unit counts to choose among, descending from ``units``: ``levels`` even steps, rounded to
    the multiple.

    Counts below ``least`` are left out; the whole group is always there.

    Args:
        units: of the group.
        levels: number of even steps.
        multiple: that sizes are rounded to.
        least: smallest size allowed.

    Returns:
        unit counts, descending.
    """
    steps = set()
    for step in range(1, levels):
        steps.add(multiple * round(units * step / levels / multiple))
    return sorted(
        {units, *(count for count in steps if least <= count < units and count > 0)}, reverse=True
    )
