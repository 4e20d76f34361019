"""Integer grids: the numbers that a quantised weight may have.

Dims: N outputs, K inputs, G groups of inputs that share a scale.  A number is ``code * scale``,
without zero point, so that zero is zero.  Scales are bfloat16 numbers: then ``code * scale`` is
exact in float32, and a grid can be found again in the weight itself; nothing has to be carried
along with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

LIMITS: Mapping[int, tuple[int, int]] = MappingProxyType({8: (-127, 127), 4: (-8, 7)})
GROUP = 128
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of one weight [N, K].

    bits: 8 or 4.
    scale_NG: float32, each a bfloat16 number; one group of all inputs for 8 bits, groups of 128
        inputs (the last may be shorter) for 4 bits.
    """

    bits: int
    scale_NG: Tensor

    def to_codes(self, weight_NK: Tensor) -> Tensor:
        """The nearest codes [N, K] int8.

        Args:
            weight_NK: any float dtype.
        """
        low, high = LIMITS[self.bits]
        return (
            (weight_NK.float() / self.expand_scale(weight_NK.shape[1]))
            .round()
            .clamp(low, high)
            .to(torch.int8)
        )

    def to_numbers(self, codes_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """What codes stand for, [N, K], rounded to a dtype.

        Args:
            codes_NK: int8.
            dtype: of the result.
        """
        return (codes_NK.float() * self.expand_scale(codes_NK.shape[1])).to(dtype)

    def round_to_grid(self, weight_NK: Tensor) -> Tensor:
        """The weight on the grid, in its own dtype; zeros stay zeros.

        Args:
            weight_NK: any float dtype.
        """
        return self.to_numbers(self.to_codes(weight_NK), weight_NK.dtype)

    def expand_scale(self, columns: int) -> Tensor:
        """The scale of every number: [N, K], or [N, 1] for one group.

        Args:
            columns: K.
        """
        if self.scale_NG.shape[1] == 1:
            return self.scale_NG
        return self.scale_NG.repeat_interleave(GROUP, 1)[:, :columns]


def groups_per_row(columns: int, bits: int) -> int:
    """Number of scales in a row.

    Args:
        columns: K.
        bits: 8 or 4.
    """
    if bits == 8:
        return 1
    return -(-columns // GROUP)


def grid_of(weight_NK: Tensor, bits: int, importance_K: Tensor | None = None) -> Grid:
    """The grid for a weight: of each group the largest scale, or one a little smaller where that
    errs less.

    Args:
        weight_NK: any float dtype.
        bits: 8 (a scale a row, always the largest) or 4 (a scale of 128 inputs, searched in
            ``SHRINKS``).
        importance_K: weight of each input's squared error; None counts all alike.
    """
    columns = weight_NK.shape[1]
    count = groups_per_row(columns, bits)
    if count == 1:
        return Grid(bits, group_scale(weight_NK, bits, importance_K)[:, None])
    scales = []
    for first in range(0, columns, GROUP):
        part = slice(first, min(first + GROUP, columns))
        importance = None
        if importance_K is not None:
            importance = importance_K[part]
        scales.append(group_scale(weight_NK[:, part], bits, importance))
    return Grid(bits, torch.stack(scales, 1))


def group_scale(weight_NK: Tensor, bits: int, importance_K: Tensor | None = None) -> Tensor:
    """The scale [N] float32 of one group of inputs.

    Args:
        weight_NK: inputs of one group.
        bits: 8 or 4.
        importance_K: weight of each input's squared error; None counts all alike.
    """
    low, high = LIMITS[bits]
    weight_NK = weight_NK.float()
    full = weight_NK.abs().amax(1) / high
    best = _make_sound_scale(full)
    least = torch.full_like(full, float("inf"))
    for shrink in SHRINKS if bits == 4 else ():
        scale = _make_sound_scale(full * shrink)
        error = (weight_NK / scale[:, None]).round().clamp(low, high) * scale[:, None] - weight_NK
        loss = (error.square() * (1.0 if importance_K is None else importance_K)).sum(1)
        best = torch.where(loss < least, scale, best)
        least = torch.minimum(loss, least)
    return best


def _make_sound_scale(scale: Tensor) -> Tensor:
    """A scale that can be stored and divided by: groups of zeros get 1."""
    stored = scale.to(torch.bfloat16).float()
    return torch.where(stored > torch.finfo(torch.float32).tiny, stored, torch.ones_like(stored))


def find_grid(weight_NK: Tensor) -> Grid | None:
    """The grid that a weight lies on bit for bit, or None.  The first row decides quickly about
    most weights.

    Args:
        weight_NK: any float dtype.
    """
    for bits in (4, 8):
        if (
            _finest_scales(weight_NK[:1], bits) is not None
            and (scale_NG := _finest_scales(weight_NK, bits)) is not None
        ):
            return Grid(bits, scale_NG)
    return None


def _finest_scales(weight_NK: Tensor, bits: int) -> Tensor | None:
    """The scales [N, G] of the finest grid that holds a weight: a group's largest number is a code
    times its scale."""
    rows, columns = weight_NK.shape
    count = groups_per_row(columns, bits)
    if count > 1:
        padded = torch.nn.functional.pad(weight_NK, (0, count * GROUP - columns))
    else:
        padded = weight_NK
    grouped = padded.reshape(rows * count, -1)
    peak = grouped.float().abs().amax(1)
    scales = torch.where(peak == 0, 1.0, 0.0)
    for code in range(-LIMITS[bits][0], 0, -1):
        for step in (0, -1, 1):
            unset = (scales == 0).nonzero()[:, 0]
            if not len(unset):
                return scales.view(rows, count)
            near = (peak[unset] / code).to(torch.bfloat16)
            scale = (near.view(torch.int16) + step).view(torch.bfloat16).float()
            fits = (
                (_on_grid(grouped[unset], scale, bits) == grouped[unset]).all(1)
                & (scale > 0)
                & scale.isfinite()
            )
            scales[unset] = torch.where(fits, scale, 0.0)
    if bool(scales.all()):
        return scales.view(rows, count)
    return None


def _on_grid(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest numbers of a grid, in the weight's dtype."""
    low, high = LIMITS[bits]
    return ((weight.float() / scale[:, None]).round().clamp(low, high) * scale[:, None]).to(
        weight.dtype
    )
