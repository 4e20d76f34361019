"""Measured seconds of a model's matrices, for a budget of time on the machine at hand.

Protocol: each matrix that a linear op reads, applied to a few rows of ones on the parameters' own
device and in their dtype, the median of several runs after one that warms up.  A grid of sizes is
measured, and times in between are interpolated linearly in both.  Attention itself, norms and
look-ups are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from secateur.graph import Program
from secateur.passes.calibration.observe import op_name, positional_arguments
from secateur.passes.repair.sites import LINEAR, weight_uses

Array = npt.NDArray[np.float64]
Timer = Callable[[int, int, Tensor], float]
ROWS = 1
RUNS = 5
POINTS = 5

_uses: WeakKeyDictionary[Program, dict[str, int]] = WeakKeyDictionary()


def matrix_uses(program: Program) -> dict[str, int]:
    """How many linear ops read each matrix.

    Args:
        program: the model.

    Returns:
        counts by parameter name.
    """
    if program not in _uses:
        chains_by_weight = weight_uses(program)
        _uses[program] = {
            name: sum(_is_multiplication(use.node, use.chain) for use in uses)
            for name, uses in chains_by_weight.items()
        }
    result: dict[str, int] = {}
    for name, count in _uses[program].items():
        if count:
            result[name] = count
    return result


def _is_multiplication(node: fx.Node, chain: Sequence[fx.Node]) -> bool:
    """Whether a linear op reads the end of the chain as its weight."""
    op = op_name(node)
    return op in LINEAR and positional_arguments(node)[LINEAR[op][1]] is chain[-1]


class LatencyTable:
    """Seconds of matrices by size, measured once each.  timer: (dim 0, dim 1, a tensor of the
    device and dtype)."""

    def __init__(self, timer: Timer | None = None) -> None:
        self.timer = timer or measure_seconds
        self.measured: dict[tuple[int, int], float] = {}

    def seconds(self, first: Array, second: Array, like: Tensor) -> Array:
        """[shapes]: seconds of a matrix of each size.

        Args:
            first: sizes of dim 0, [shapes].
            second: sizes of dim 1, [shapes].
            like: for dtype and device.
        """
        rows, columns = np.broadcast_arrays(first, second)
        grids = [_size_grid(rows), _size_grid(columns)]
        values = np.array(
            [[self._seconds_of_one(int(n), int(k), like) for k in grids[1]] for n in grids[0]]
        )
        by_column = np.array([np.interp(columns.ravel(), grids[1], row) for row in values])
        position = np.clip(
            np.searchsorted(grids[0], rows.ravel(), side="right") - 1, 0, max(0, len(grids[0]) - 2)
        )
        where = np.arange(rows.size)
        low = by_column[position, where]
        high = by_column[np.minimum(position + 1, len(grids[0]) - 1), where]
        span = np.maximum(
            grids[0][np.minimum(position + 1, len(grids[0]) - 1)] - grids[0][position], 1
        )
        between = low + (high - low) * (rows.ravel() - grids[0][position]) / span
        return np.asarray(between, dtype=np.float64).reshape(rows.shape)

    def _seconds_of_one(self, rows: int, columns: int, like: Tensor) -> float:
        """Seconds of one size, measured on first use."""
        if (rows, columns) not in self.measured:
            self.measured[rows, columns] = self.timer(rows, columns, like)
        return self.measured[rows, columns]


def _size_grid(values: Array) -> Array:
    """At most POINTS of the sizes, the smallest and the largest among them."""
    sizes = np.unique(values)
    picked = np.unique(np.linspace(0, len(sizes) - 1, min(POINTS, len(sizes))).round().astype(int))
    return np.asarray(sizes[picked], dtype=np.float64)


@torch.no_grad()
def measure_seconds(rows: int, columns: int, like: Tensor) -> float:
    """Median seconds of one matrix of this size applied to ROWS rows.

    Args:
        rows: size of dim 0.
        columns: size of dim 1.
        like: for dtype and device.
    """
    weight = torch.ones(rows, columns, dtype=like.dtype, device=like.device)
    x = torch.ones(ROWS, columns, dtype=like.dtype, device=like.device)
    F.linear(x, weight)
    return statistics.median(_time_product(x, weight) for _ in range(RUNS))


def _time_product(x: Tensor, weight: Tensor) -> float:
    """Seconds of one product."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    F.linear(x, weight)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
