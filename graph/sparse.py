"""What a Program says of its sparse weights, and what edits make of it.

Dims: N outputs, K inputs.  A sparse weight is [N, K]: its groups run along its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor

from secateur.graph.pattern import Pattern, Share


@dataclass(frozen=True, eq=False)
class Sparse:
    """One sparse weight.  The parameter itself holds exact zeros (+0.0) wherever it was pruned.

    pattern: which entries may be other than zero.
    metric: the score that the mask was chosen by: magnitude, wanda, ria, sparsegpt, ...
    norms: [K] float32, root mean square of each input over the calibration tokens, or None: with
        them ``|W| norms`` can be ranked anew.
    removed: [N, K] in the weight's dtype, what pruning took out and zero elsewhere, so that weight
        + removed is the weight without its mask; None where it was not kept.  It is never saved
        with a model.
    branch: names of the parameters A [R, K] and B [N, R] of a dense branch beside it, y = x W^T +
        (x A^T) B^T, which training added; or None.
    """

    pattern: Pattern | Share
    metric: str = "magnitude"
    norms: Tensor | None = None
    removed: Tensor | None = None
    branch: tuple[str, str] | None = None


SparseWeights = Mapping[str, Sparse]
NONE: SparseWeights = MappingProxyType({})


def slice_sparse(sparse: SparseWeights, cut: Callable[[str, int], Tensor | None]) -> SparseWeights:
    """After an edit: the rows that stay.

    Args:
        cut: (parameter, dim) -> positions that stay, or None where the dim stays whole; dim 1 must.
    """
    found = {}
    for name, one in sparse.items():
        rows = cut(name, 0)
        if rows is not None and one.removed is not None:
            one = replace(one, removed=one.removed.index_select(0, rows.to(one.removed.device)))
        found[name] = one
    return MappingProxyType(found)


def keep_entries(sparse: SparseWeights, names: Iterator[str] | set[str]) -> SparseWeights:
    """The entries of parameters that are still there."""
    left = set(names)
    return MappingProxyType({name: one for name, one in sparse.items() if name in left})


def find_faults(weight_NK: Tensor, one: Sparse) -> Iterator[str]:
    """What is wrong with a sparse weight: too many non-zeros, negative zeros, removed values of
    what stands there."""
    if weight_NK.dim() != 2:
        yield f"has shape {tuple(weight_NK.shape)}, expected [outputs, inputs]"
        return
    if weight_NK.is_meta:
        if reason := one.pattern.incompatibility(weight_NK.shape[1]):
            yield f"cannot be {one.pattern}: {reason}"
        return
    if reason := one.pattern.describe_violations(weight_NK):
        yield f"is not {one.pattern}: {reason}"
    zeros = weight_NK == 0
    if bool((zeros & weight_NK.signbit()).any()):
        yield "holds negative zeros"
    if one.norms is not None and one.norms.shape != weight_NK.shape[1:]:
        yield f"has norms of shape {tuple(one.norms.shape)}, expected {tuple(weight_NK.shape[1:])}"
    if one.removed is not None:
        yield from _find_removed_faults(zeros, one.removed)


def _find_removed_faults(zeros_NK: Tensor, removed: Tensor) -> Iterator[str]:
    if removed.shape != zeros_NK.shape:
        yield (
            f"has removed values of shape {tuple(removed.shape)}, expected {tuple(zeros_NK.shape)}"
        )
    elif bool(((removed != 0) & ~zeros_NK).any()):
        yield "holds other values where removed ones are kept"
