"""The Gram matrix x^T x of a layer's inputs over calibration tokens, its factor, and output errors
measured by it.

Dims: N outputs, K inputs, T rows (tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.passes.calibration.lockstep import Lockstep

TRIED = (1.0, 10.0, 100.0)  # times the damping asked for, until a factor is finite


class GramError(ValueError):
    """The inputs' Gram matrix cannot be factored, whatever the damping tried."""


def gram_of(run: Lockstep, x: str, count: int) -> tuple[Tensor, int]:
    """(x^T x over all rows of ``count`` sequences [K, K] float64, number of rows), summed in
    float32 or better.

    Args:
        run: the model, advanced to the input.
        x: node whose value is the input, [..., K] of each sequence.
        count: number of sequences.
    """
    total: Tensor | None = None
    tokens = 0
    for sample in range(count):
        rows_TK = rows_of(run.node_value(sample, x))
        if total is None:
            total = rows_TK.new_zeros(rows_TK.shape[1], rows_TK.shape[1])
        total.addmm_(rows_TK.T, rows_TK)
        tokens += len(rows_TK)
    assert total is not None
    return total.double(), tokens


def squares_of(run: Lockstep, x: str, count: int) -> tuple[Tensor, int]:
    """(sum of squares of each input [K] float64, number of rows): the Gram matrix's diagonal
    alone.

    Args:
        run: the model, advanced to the input.
        x: node whose value is the input, [..., K] of each sequence.
        count: number of sequences.
    """
    total: Tensor | None = None
    tokens = 0
    for sample in range(count):
        rows_TK = rows_of(run.node_value(sample, x))
        part = rows_TK.square().sum(0).double()
        if total is None:
            total = part
        else:
            total = total + part
        tokens += len(rows_TK)
    assert total is not None
    return total, tokens


def rows_of(value: Tensor) -> Tensor:
    """[..., K] as [T, K], in float32 or better.

    Args:
        value: [..., K].

    Returns:
        [T, K].
    """
    return value.reshape(-1, value.shape[-1]).to(torch.promote_types(value.dtype, torch.float32))


def inverse_factor(gram_KK: Tensor, damping: float) -> tuple[Tensor, float]:
    """(The upper Cholesky factor U [K, K] float32 of the damped inverse, ``U^T U = (gram + d mean
    I)^-1``; d).

    d is the damping, or ten or a hundred times as much where no smaller one gives a finite factor.

    Args:
        gram_KK: x^T x, float64.
        damping: in units of the mean of the diagonal.

    Raises:
        GramError: none is finite.
    """
    gram = gram_KK.to(torch.float64, copy=True)
    diagonal_K = gram.diagonal().clone()
    mean = diagonal_K.mean().clamp_min(1e-12)
    diagonal_K[diagonal_K == 0] = mean  # inputs that never fire say nothing
    for more in TRIED:
        gram.diagonal().copy_(diagonal_K + mean * damping * more)
        lower, failed = torch.linalg.cholesky_ex(gram)
        torch.cholesky_inverse(lower, out=lower)
        upper, failed_too = torch.linalg.cholesky_ex(lower, upper=True)
        if not failed and not failed_too and bool(torch.isfinite(upper).all()):
            return upper.float(), damping * more
    raise GramError(
        "the Gram matrix of the inputs cannot be factored: give more calibration tokens or "
        "more damping"
    )


def output_error(weight_NK: Tensor, changed_NK: Tensor, gram_KK: Tensor) -> float:
    """Root of the summed squared change of the outputs, relative to the outputs'.

    Args:
        weight_NK: dense.
        changed_NK: sparse or rounded.
        gram_KK: x^T x, float64.

    Returns:
        0 for no change.
    """
    delta = (changed_NK - weight_NK).double()
    weight = weight_NK.double()
    changed = (delta * (delta @ gram_KK)).sum()
    energy = (weight * (weight @ gram_KK)).sum()
    return float((changed.clamp_min(0) / energy.clamp_min(1e-300)).sqrt())
