"""The GPTQ update: round one input's weights after the other, and let those to come make up for the error.

Dims: N outputs, K inputs, T rows (tokens).
Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, algorithm 1; zeros as in Frantar & Alistarh 2023 (SparseGPT),
arXiv:2301.00774, section 3.3, with the mask given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.passes.quantize_grid import GROUP, LIMITS, Grid, grid_of, group_scale

BLOCK = 128


class GramError(ValueError):
    """The inputs' Gram matrix cannot be factored, whatever the damping tried."""


def quantize_gptq(weight_NK: Tensor, gram_KK: Tensor, bits: int, damping: float) -> Tensor:
    """A weight on an integer grid, such that the layer's outputs change little.

    Exact zeros stay exact zeros; what their rounding to zero would cost after an update is made up for like any error.
    Args:  weight_NK: any float dtype.   gram_KK: x^T x over calibration rows, float64.   bits: 8 or 4.
        damping: added to the diagonal, in parts of its mean.
    Raises: GramError: no finite factor; more calibration tokens or more damping may help.
    """
    mask_NK = weight_NK != 0
    work = weight_NK.float().clone()
    factor = inverse_factor(gram_KK, damping)
    low, high = LIMITS[bits]
    seen = gram_KK.diagonal().float()
    scale_NG = grid_of(work, bits, seen).scale_NG.clone()
    result = torch.zeros_like(work)
    for start in range(0, work.shape[1], BLOCK):
        stop = min(start + BLOCK, work.shape[1])
        block, errors = work[:, start:stop].clone(), torch.zeros_like(work[:, start:stop])
        if bits == 4:  # GROUP is BLOCK: a group's scale is chosen when its weights are final but for its own updates
            scale_NG[:, start // GROUP] = group_scale(block * mask_NK[:, start:stop], bits, seen[start:stop])
        scale = scale_NG[:, start // GROUP if bits == 4 else 0]
        for at in range(stop - start):
            column = start + at
            rounded = (block[:, at] / scale).round().clamp(low, high) * scale * mask_NK[:, column]
            error = (block[:, at] - rounded) / factor[column, column]
            block[:, at:] -= error[:, None] * factor[column, column:stop]
            result[:, column], errors[:, at] = rounded, error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return Grid(bits, scale_NG).nearest(result.to(weight_NK.dtype))


def inverse_factor(gram_KK: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U [K, K] float32 of the damped inverse, ``U^T U = (gram + damping mean I)^-1``.

    Raises: GramError: none is finite.
    """
    gram = gram_KK.double().clone()
    mean = gram.diagonal().mean()
    gram.diagonal()[gram.diagonal() == 0] = mean.clamp_min(1e-12)  # inputs that never fire say nothing
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for more in (1.0, 10.0, 100.0):
        lower, failed = torch.linalg.cholesky_ex(gram + eye * mean.clamp_min(1e-12) * damping * more)
        upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and not failed_too and bool(torch.isfinite(upper).all()):
            factor: Tensor = upper.float()
            return factor
    raise GramError("the Gram matrix of the inputs cannot be factored: give more calibration tokens or more damping")


def output_error(weight_NK: Tensor, rounded_NK: Tensor, gram_KK: Tensor) -> float:
    """Root of the summed squared change of the outputs, relative to the outputs'."""
    delta, weight = (rounded_NK - weight_NK).double(), weight_NK.double()
    changed, whole = ((m * (m @ gram_KK)).sum() for m in (delta, weight))
    return float((changed.clamp_min(0) / whole.clamp_min(1e-300)).sqrt())
