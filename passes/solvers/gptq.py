"""The GPTQ update: inputs are rounded in order, and later weights make up for the error.

Dims: N outputs, K inputs, T rows (tokens).
Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, algorithm 1; zeros as in Frantar & Alistarh
2023 (SparseGPT), arXiv:2301.00774, section 3.3, with the mask given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.passes.calibration.gram import inverse_factor
from secateur.passes.solvers.integer_grid import GROUP, LIMITS, Grid, grid_of, group_scale

BLOCK = 128


def quantize_gptq(weight_NK: Tensor, gram_KK: Tensor, bits: int, damping: float) -> Tensor:
    """A weight on an integer grid, such that the layer's outputs change little.

    Exact zeros stay exact zeros; what their rounding to zero would cost after an update is made up
    for like any error.

    Args:
        weight_NK: any float dtype.
        gram_KK: x^T x over calibration rows, float64.
        bits: 8 or 4.
        damping: added to the diagonal, in parts of its mean.

    Returns:
        [N, K] in the weight's dtype, on a grid.

    Raises:
        GramError: no finite factor; more calibration tokens or more damping may help.
    """
    mask_NK = weight_NK != 0
    work = weight_NK.float().clone()
    factor, _ = inverse_factor(gram_KK, damping)
    low, high = LIMITS[bits]
    seen = gram_KK.diagonal().float()
    scale_NG = grid_of(work, bits, seen).scale_NG.clone()
    result = torch.zeros_like(work)
    for start in range(0, work.shape[1], BLOCK):
        stop = min(start + BLOCK, work.shape[1])
        block = work[:, start:stop].clone()
        errors = torch.zeros_like(work[:, start:stop])
        # GROUP is BLOCK: a group's scale is chosen when its weights are final but for its own
        # updates.
        if bits == 4:
            scale_NG[:, start // GROUP] = group_scale(
                block * mask_NK[:, start:stop], bits, seen[start:stop]
            )
        scale = scale_NG[:, start // GROUP if bits == 4 else 0]
        for offset in range(stop - start):
            column = start + offset
            rounded = (
                (block[:, offset] / scale).round().clamp(low, high) * scale * mask_NK[:, column]
            )
            error = (block[:, offset] - rounded) / factor[column, column]
            block[:, offset:] -= error[:, None] * factor[column, column:stop]
            result[:, column] = rounded
            errors[:, offset] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return Grid(bits, scale_NG).round_to_grid(result.to(weight_NK.dtype))
