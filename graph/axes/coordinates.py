"""Where units may be chosen for each unit of an outer group: query heads under each key/value head.

A coordinate is one unit of the outer leaf.  The choice is exact where it comes to the same as a
change of order inside each coordinate, followed by a cut of the same places everywhere; what
decides is which values carry both leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx

from secateur.graph.axes.analysis import Analysis, flat_axes
from secateur.graph.axes.atoms import Atom
from secateur.graph.axes.rules import get_arg

MIXING = {
    "softmax",
    "_softmax",
    "_safe_softmax",
    "log_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "sort",
}


def find_outers(analysis: Analysis, leaves: Iterable[Atom]) -> dict[Atom, Atom]:
    """For each leaf, the one for each of whose units other units of it may stay, where there is
    one.

    Every value that carries the leaf must carry the other one, once, right before it in the same
    axis or in the dim
    before: then nothing ever meets units of two coordinates, and the choice is a change of order
    inside each coordinate and a cut of the same places everywhere.  Parameters, buffers and values
    that go by position need both in one axis.
    """
    wanted = set(leaves)
    found: dict[Atom, Atom | None] = {}
    for node in analysis.gm.graph.nodes if wanted else ():
        together = node.op == "get_attr" or node in analysis.generated
        for axes in flat_axes(analysis.values.get(node)):
            mixed = None
            if not together:
                mixed = _mixed_dim(node, len(axes))
            for leaf, outer in _before(axes, wanted, together, mixed):
                if found.get(leaf, outer) is outer:
                    found[leaf] = outer
                else:
                    found[leaf] = None
    for domain in analysis.domains.values() if wanted else ():
        found |= dict.fromkeys(wanted.intersection(domain.leaves()))
    return {leaf: outer for leaf, outer in found.items() if outer is not None}


def _mixed_dim(node: fx.Node, rank: int) -> int | None:
    """The dim along which an op mixes entries although its result still has that dim, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target._schema.name.split("::")[1] not in MIXING:
        return None
    dim = get_arg(node, "dim")
    if isinstance(dim, int) and rank:
        return dim % rank
    return None


def _before(
    axes: Sequence[Atom], wanted: set[Atom], together: bool, mixed: int | None
) -> Iterator[tuple[Atom, Atom | None]]:
    """Each wanted leaf of a value, with the leaf that may be outer to it by what this value says,
    or None.

    Args:
        together: both must share an axis.
        mixed: a dim whose entries meet, or None.
    """
    for dim, axis in enumerate(axes):
        beside = Counter(
            leaf for other, one in enumerate(axes) if other != dim for leaf in one.leaves()
        )
        if together or dim == 0 or dim - 1 == mixed:
            above = []
        else:
            above = axes[dim - 1].factors()
        for segment in axis.segments():
            inside = segment.factors()
            counts = beside + Counter(segment.leaves())
            outer = None
            if above:
                outer = above[-1]
            for leaf in inside:
                if leaf in wanted:
                    once = outer is not None and counts[leaf] == counts[outer] == 1
                    yield leaf, outer if once else None
                outer = leaf
            nested = wanted.intersection(segment.leaves()) - set(inside)
            yield from ((leaf, None) for leaf in nested)
