"""Sparsification of one layer, or of several layers that read the same input.

Dims: N outputs (of all layers together), K inputs, T rows (tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.graph import Pattern, Share
from secateur.graph.errors import PatternError
from secateur.passes.calibration.data import CalibrationError
from secateur.passes.calibration.gram import GramError, gram_of, inverse_factor, rows_of, squares_of
from secateur.passes.calibration.lockstep import Lockstep
from secateur.passes.solvers.group_refinement import refine_groups
from secateur.passes.solvers.sparsegpt import prune_by_sparsegpt
from secateur.passes.sparsity.scores import METRICS

PROBES = 4  # sequences on which output errors are told


@dataclass(frozen=True)
class LayerRecipe:
    """How a layer is made sparse; see the options of the pass."""

    kind: Pattern | Share
    metric: str
    update: bool = True
    refine: int = 0
    damping: float = 0.01
    block: int = 128

    @property
    def needs(self) -> Literal["nothing", "squares", "gram"]:
        """What must be known of a layer's inputs."""
        if self.metric == "sparsegpt" or self.refine:
            return "gram"
        if self.metric == "magnitude":
            return "nothing"
        return "squares"


@dataclass(frozen=True, eq=False)
class SparseLayer:
    """A sparse weight.

    weight: [N, K] in the dense one's dtype.
    norms: root mean square of each input [K] float32, or None.
    error: root of the squared change of the outputs on a few sequences, relative to theirs; None
        without data.
    damping: that was needed.
    """

    weight: Tensor
    norms: Tensor | None = None
    error: float | None = None
    damping: float = 0.0


def by_magnitude(name: str, weight_NK: Tensor, kind: Pattern | Share) -> SparseLayer:
    """A weight that keeps its largest entries.

    Args:
        name: for messages.
        weight_NK: dense.
        kind: pattern or share of zeros.

    Raises:
        PatternError: it holds NaN; names the weight.
    """
    _check_weight(name, weight_NK)
    return SparseLayer(_apply_mask(weight_NK, kind.select_mask(weight_NK.abs())))


def sparsify_layers(
    recipe: LayerRecipe, dense: Mapping[str, Tensor], run: Lockstep, x: str, count: int
) -> dict[str, SparseLayer]:
    """The weights of layers that read one input, made sparse on what a model produces there.

    Args:
        recipe: how a layer is made sparse.
        dense: [N, K] by name.
        run: the model, advanced to the layers.
        x: node of the input.
        count: sequences of the run.

    Returns:
        sparse weights by name.

    Raises:
        PatternError, CalibrationError: a weight, or an input, is not finite; names the weight.
    """
    for name, weight in dense.items():
        _check_weight(name, weight)
    stacked_NK = torch.cat([weight.float() for weight in dense.values()])
    gram_KK = None
    squares_K = None
    tokens = 0
    if recipe.needs == "gram":
        gram_KK, tokens = gram_of(run, x, count)
        squares_K = gram_KK.diagonal()
    else:
        squares_K, tokens = squares_of(run, x, count)
    first = next(iter(dense))
    if not bool(squares_K.isfinite().all()):
        raise CalibrationError(
            f"the inputs of {first} are not finite: look at the model and the text"
        )
    norms_K = (squares_K / max(1, tokens)).sqrt().float()
    try:
        sparse_NK, damping = _sparsify_stacked(recipe, dense, stacked_NK, norms_K, gram_KK)
    except GramError as error:
        raise CalibrationError(f"{first}: {error}") from error
    layers = dict[str, SparseLayer]()
    first_row = 0
    probe_TK = torch.cat([rows_of(run.node_value(sample, x)) for sample in _probe_sequences(count)])
    for name, weight in dense.items():
        value = sparse_NK[first_row : first_row + len(weight)].to(weight.dtype)
        first_row += len(weight)
        # No negative zeros, in this dtype either.
        value = torch.where(value == 0, torch.zeros_like(value), value)
        layers[name] = SparseLayer(value, norms_K, _output_error(weight, value, probe_TK), damping)
    return layers


def _sparsify_stacked(
    recipe: LayerRecipe,
    dense: Mapping[str, Tensor],
    stacked_NK: Tensor,
    norms_K: Tensor,
    gram_KK: Tensor | None,
) -> tuple[Tensor, float]:
    """(Stacked sparse weights, damping that was needed)."""
    damping = 0.0
    result = stacked_NK
    if gram_KK is not None:
        factor_KK, damping = inverse_factor(gram_KK, recipe.damping)
    if recipe.metric == "sparsegpt":
        result, mask_NK = prune_by_sparsegpt(
            stacked_NK, factor_KK, recipe.kind, live_K=norms_K > 0, block=recipe.block
        )
        if not recipe.update:
            result = torch.where(mask_NK, stacked_NK, 0.0)
    else:
        score = METRICS[recipe.metric]
        sizes = [len(weight) for weight in dense.values()]
        masks = []
        for part in stacked_NK.split(sizes):
            masks.append(recipe.kind.select_mask(score(part.abs(), norms_K)))
        result = torch.where(torch.cat(masks), stacked_NK, 0.0)
    if recipe.refine and gram_KK is not None and isinstance(recipe.kind, Pattern):
        damped_KK = gram_KK + torch.eye(
            len(gram_KK), dtype=gram_KK.dtype, device=gram_KK.device
        ) * (damping * gram_KK.diagonal().mean().clamp_min(1e-12))
        result = refine_groups(
            stacked_NK, result, damped_KK, recipe.kind, recipe.refine, recipe.block
        )
    return result, damping


def _check_weight(name: str, weight_NK: Tensor) -> None:
    """Check that a weight is finite.

    Raises:
        PatternError: names the weight and the first entry that is not.
    """
    if not bool(weight_NK.isfinite().all()):
        row, column = (~weight_NK.isfinite()).nonzero()[0].tolist()
        raise PatternError(
            f"{name} is not finite at row {row}, input {column}: no mask can be made; mend "
            "the model"
        )


def _apply_mask(weight_NK: Tensor, mask_NK: Tensor) -> Tensor:
    """The weight where the mask says, +0.0 elsewhere and where it holds -0.0."""
    return torch.where(mask_NK & (weight_NK != 0), weight_NK, torch.zeros_like(weight_NK))


def _probe_sequences(count: int) -> list[int]:
    """A few sequences, spread evenly."""
    wanted = min(PROBES, count)
    indices: list[int] = []
    for index in range(wanted):
        indices.append((2 * index + 1) * count // (2 * wanted))
    return indices


def _output_error(weight_NK: Tensor, value_NK: Tensor, probe_TK: Tensor) -> float:
    """Norm of the change of the outputs on the probe rows, relative to theirs."""
    energy = (probe_TK @ weight_NK.to(probe_TK).T).norm()
    change = (probe_TK @ (value_NK.to(probe_TK) - weight_NK.to(probe_TK)).T).norm()
    return float(change / energy.clamp_min(1e-30))
