"""Weights for the tests of 2:4 kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.kernels.sparse24.formats import (
    GROUP_INT4,
    LEVELS,
    count_stored_columns,
    scale_of_columns,
)


def weight_24(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, empty: float = 0.0, seed: int = 0
) -> Tensor:
    """Random [rows, columns] with two non-zeros in each whole group of four; fewer in about
    ``empty`` of them."""
    generator = torch.Generator().manual_seed(seed)
    wide = -(-columns // 4) * 4
    order = torch.rand(rows, wide // 4, 4, generator=generator).argsort(-1)
    few = torch.rand(rows, wide // 4, 1, generator=generator) < empty
    kept = order < torch.where(few, torch.randint(0, 2, few.shape, generator=generator), 2)
    dense = torch.randn(rows, wide // 4, 4, generator=generator)
    return (
        torch.where(kept, dense + dense.sign(), 0.0)
        .view(rows, wide)[:, :columns]
        .to(dtype)
        .contiguous()
    )


def quantized(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(int8 levels, scale) of a weight, rounded to nearest."""
    rows, columns = weight.shape
    if kind == "int8":
        scale = weight.abs().amax(1) / 127
    else:
        groups = -(-count_stored_columns(columns) // GROUP_INT4)
        wide = torch.nn.functional.pad(weight.abs(), (0, groups * GROUP_INT4 - columns))
        scale = (wide.view(rows, groups, GROUP_INT4).amax(-1) / 7).bfloat16()
    low, high = LEVELS[kind]
    levels = (weight / scale_of_columns(scale, columns).clamp_min(1e-8)).round().clamp(low, high)
    return levels.to(torch.int8), scale
