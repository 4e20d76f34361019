"""Mask choice: the kept entries of a sparse weight, and the revival of removed ones.

N outputs, K inputs of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.graph import Sparse
from secateur.passes.sparsity.scores import METRICS

# of the least kept score: how near a removed value may come to it, safe from rounding to bfloat16
ROOM = 0.99
ROUNDS = 16  # of making removed values smaller, for scores in which entries depend on each other


def start_mask(weight_NK: Tensor, sparse: Sparse) -> Tensor:
    """The mask of a sparse weight: its non-zeros, and zeros of lowest index where a group has fewer
    than it may.

    Args:
        weight_NK: sparse.
        sparse: its pattern.

    Returns:
        [N, K] bool.
    """
    return sparse.pattern.select_mask(weight_NK.detach().float().abs())


@torch.no_grad()
def bake_mask(weight_NK: Tensor, mask_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(m W, (1 - m) W), each [N, K] in the dtype of W, with +0.0 wherever it is zero.

    Args:
        weight_NK: W.
        mask_NK: m, bool.
    """
    mask_NK = mask_NK.to(weight_NK.device)
    zero = torch.zeros((), dtype=weight_NK.dtype, device=weight_NK.device)
    return torch.where(mask_NK, weight_NK, zero) + 0.0, torch.where(mask_NK, zero, weight_NK) + 0.0


@torch.no_grad()
def revive_weight(weight_NK: Tensor, one: Sparse, score: MaskScore) -> Tensor:
    """The weight with what was removed put back, so that the mask of its score is the mask that it
    has.

    Where that is not so by itself, as where kept values were changed after the choice, removed
    values whose score is above that of a kept one in their group are made smaller until it is
    below: they stand next in line, and no more.

    Args:
        weight_NK: sparse.
        one: its pattern and removed values.
        score: that ranks its entries.

    Returns:
        [N, K] in the dtype of the weight.
    """
    assert one.removed is not None
    mask = start_mask(weight_NK, one)
    weight = weight_NK + one.removed.to(weight_NK.device)
    for _ in range(ROUNDS):
        scores = score(weight.float(), one)
        if torch.equal(one.pattern.select_mask(scores), mask):
            break
        weight = torch.where(
            mask, weight, (weight.float() * _shrink_factors(scores, mask, one)).to(weight.dtype)
        )
    return weight


def _shrink_factors(scores_NK: Tensor, mask_NK: Tensor, one: Sparse) -> Tensor:
    """[N, K]: what removed values are to be multiplied by to rank below the kept ones of their
    group."""
    width = one.pattern.group_size(scores_NK.shape[1])
    scores, kept_ones = (t.unflatten(-1, (-1, width)) for t in (scores_NK, mask_NK))
    least = scores.masked_fill(~kept_ones, float("inf")).amin(-1, keepdim=True)
    factor = ROOM * least / scores.clamp_min(torch.finfo(scores.dtype).tiny)
    factors: Tensor = factor.clamp_max(1.0).flatten(-2)
    return factors


class MaskScore:
    """Ranks the entries of a sparse weight.

    metric: a row of METRICS, or ``match``: that by which the weight's mask was chosen; wanda
        (magnitude without norms) where that has no row, as SparseGPT.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def __call__(self, weight_NK: Tensor, one: Sparse) -> Tensor:
        """[N, K] float32, higher is kept.

        Args:
            weight_NK: float32.
        """
        size_NK = weight_NK.abs()
        if one.norms is None:
            norms = size_NK.new_ones(size_NK.shape[1])
        else:
            norms = one.norms.to(size_NK.device, size_NK.dtype)
        scores: Tensor = METRICS[self.metric_of(one)](size_NK, norms)
        return scores

    def metric_of(self, one: Sparse) -> str:
        """The row of METRICS that a weight is ranked by.

        Args:
            one: state of a sparse weight.

        Returns:
            key of METRICS.
        """
        if self.metric != "match":
            return self.metric
        if one.metric in METRICS and (one.norms is not None or one.metric == "magnitude"):
            return one.metric
        if one.norms is None:
            return "magnitude"
        return "wanda"

    def incompatibility(self, sparse: Mapping[str, Sparse]) -> str | None:
        """Why these weights cannot be ranked so, or None.

        Args:
            sparse: states by parameter name.
        """
        bare = []
        for name, state in sparse.items():
            if self.metric_of(state) != "magnitude" and state.norms is None:
                bare.append(name)
        if not bare:
            return None
        return (
            f"score={self.metric} needs the norms of inputs, and {bare[0]} has none ({len(bare)} "
            "such weights): choose "
            "score=magnitude, or put sparsify with a metric that uses calibration data before it"
        )
