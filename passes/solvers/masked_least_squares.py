"""Masked least squares: conjugate gradients for all rows at once, with early stopping.

Dims: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.passes.solvers.ridge import FLOOR, Products

STEPS = 48
EVERY = 4
DAMPING = 1e-3  # of each input's energy: keeps float32 sound; early stopping does the rest


@dataclass(frozen=True, eq=False)
class MaskedFit:
    """delta_NK: zero outside the mask, float32; None where no step serves the rows held back.
    steps: taken.
    before, after: held-back sums of squares."""

    delta_NK: Tensor | None
    steps: int
    before: float
    after: float


def fit_masked(seen: Products, held: Products, mask_NK: Tensor) -> MaskedFit:
    """The change of the masked entries that explains the residuals, with as many steps as serve the
    rows held back.

    What few steps reach is what the data says clearly: stopping early is the damping.  The steps
    are then taken again on all rows.

    Args:
        seen: sums over the rows to fit on.
        held: sums over the rows held back.
        mask_NK: entries that may change.

    Source:
        masked conjugate gradients: Meng et al. 2024 (ALPS), arXiv:2406.07831, algorithm 2, with a
        diagonal preconditioner; stopping on rows held back is ours.
    """
    after = held.energy
    steps = 0
    for step, delta_NK in enumerate(descend(seen, mask_NK), 1):
        if step % EVERY:
            continue
        error = held.error(delta_NK.double())
        if not error < after:
            break
        after = error
        steps = step
        if step >= STEPS:
            break
    if not steps:
        return MaskedFit(None, 0, held.energy, held.energy)
    for step, found_NK in enumerate(descend(seen.merge(held), mask_NK), 1):
        if step == steps and bool(torch.isfinite(found_NK).all()):
            return MaskedFit(found_NK, steps, held.energy, after)
        if step == steps:
            break
    return MaskedFit(None, 0, held.energy, held.energy)


def descend(products: Products, mask_NK: Tensor) -> Iterator[Tensor]:
    """delta_NK [N, K] float32 after each step, without end; rows that have converged stay where
    they are.

    Args:
        products: sums over rows.
        mask_NK: entries that may change.
    """
    scale_K = products.gram_KK.diagonal().clone()
    scale_K = (scale_K + FLOOR * scale_K.mean().clamp_min(1e-30)).sqrt()
    gram_KK = (products.gram_KK / scale_K[:, None] / scale_K).float()
    gram_KK.diagonal().add_(DAMPING)
    residual_NK = (products.cross_NK / scale_K).float() * mask_NK
    delta_NK = torch.zeros_like(residual_NK)
    direction_NK = residual_NK.clone()
    size_N = residual_NK.square().sum(1)
    while True:
        bent_NK = direction_NK @ gram_KK * mask_NK
        length_N = size_N / (direction_NK * bent_NK).sum(1).clamp_min(1e-30)
        delta_NK = delta_NK + length_N[:, None] * direction_NK
        residual_NK = residual_NK - length_N[:, None] * bent_NK
        new_N = residual_NK.square().sum(1)
        direction_NK = residual_NK + (new_N / size_N.clamp_min(1e-30))[:, None] * direction_NK
        size_N = new_N
        yield delta_NK / scale_K.float()
