"""Reorder the units of coupled groups: every parameter that carries a unit moves it, and the
function stays."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from secateur.graph.axes.analysis import analyse, flat_axes
from secateur.graph.axes.atoms import Atom
from secateur.graph.axes.coupling import CoupledGroup, coupled_groups
from secateur.graph.edit.rewrite import with_parameters
from secateur.graph.errors import EditError
from secateur.graph.program import Cut, Program
from secateur.graph.sparse import SparseWeights, slice_sparse

Order = Mapping[str, Tensor]
"""By group name, [units] int64: the unit that stands at each place afterwards."""


def permute(program: Program, order: Order) -> Program:
    """A new Program whose groups have their units in another order; the given one stays usable.

    Output rows, input columns, scales and look-ups of a unit move together, so the outputs change
    by the order of floating-point sums alone.  The graph stays as it is.  What was pruned before
    stays comparable: the dense Program of
    ``cut`` is reordered alike, and ``scores`` follow.

    Raises:
        EditError: an unknown group, one that may not be reordered (``fixed`` says why), no
            permutation of its units, or a weight with a declared sparsity pattern whose inputs
            would move.
    """
    moved = {
        name: units for name, units in _check_order(program, order).items() if not _is_sorted(units)
    }
    if not moved:
        return program.replace()
    indices = _permutation_indices(program, moved)
    sparse = _permute_sparse(program, indices)
    values = _permute_parameters(program, indices)
    scores = {
        name: score[moved[name]] if name in moved else score
        for name, score in program.scores.items()
    }
    after = with_parameters(program, values).replace(scores=MappingProxyType(scores), sparse=sparse)
    if program.cut is None:
        return after
    cut = program.cut
    outer = dict[str, Tensor]()
    sizes = {group.name: group.units for group in coupled_groups(cut.dense)}
    for name, units in moved.items():
        stays = cut.kept.get(name, torch.arange(sizes[name]))
        outer[name] = torch.arange(sizes[name]).index_copy(0, stays, stays[units])
    return after.replace(cut=Cut(permute(cut.dense, outer), cut.kept, cut.dropped))


def explain_fixed(program: Program, group: CoupledGroup) -> str | None:
    """Why the units of a group may not change places, or None.

    Stricter than what pruning needs: a buffer or a value that goes by position is made anew by the
    stock class, in its own order.
    """
    if group.locked:
        return group.locked
    kept = None
    if program.cut is not None:
        kept = program.cut.kept.get(group.name)
    if kept is not None and kept.dim() > 1:
        return (
            f"other units of it stayed for each unit of {group.within}: reorder it before "
            "it is pruned"
        )
    if group.buffers:
        return (
            f"the buffer {group.buffers[0].parameter} runs along it, and no checkpoint "
            "holds its order"
        )
    if group.leaf in _positional_leaves(program):
        return "values that go by position run along it"
    return None


def _positional_leaves(program: Program) -> set[Atom]:
    """The leaves along which the graph makes values by position."""
    analysis = analyse(program)
    axes = [
        axis
        for node in analysis.generated
        for found in flat_axes(analysis.values.get(node))
        for axis in found
    ]
    return {leaf for axis in axes for leaf in axis.leaves()}


def _check_order(program: Program, order: Order) -> dict[str, Tensor]:
    groups = {group.name: group for group in coupled_groups(program)}
    found = dict[str, Tensor]()
    for name, units in order.items():
        if name not in groups:
            raise EditError(
                f"no group {name!r} in this program; secateur.coupled_groups(program) lists them"
            )
        found[name] = torch.as_tensor(units, dtype=torch.int64).cpu()
        if not torch.equal(found[name].sort().values, torch.arange(groups[name].units)):
            raise EditError(
                f"{name}: expected every unit 0..{groups[name].units - 1} once, in the order wanted"
            )
        reason = explain_fixed(program, groups[name])
        if reason and not _is_sorted(found[name]):
            raise EditError(f"{name} keeps its order: {reason}")
    return found


def _is_sorted(units: Tensor) -> bool:
    return bool((units.diff() > 0).all())


def _permutation_indices(program: Program, order: Order) -> dict[tuple[str, int], Tensor]:
    """By parameter and dim: [size] int64, the position that stands at each place afterwards."""
    named = dict(program.named_parameters())
    found = dict[tuple[str, int], Tensor]()
    for group in (group for group in coupled_groups(program) if group.name in order):
        for (name, dim), member in {(m.parameter, m.dim): m for m in group.members}.items():
            index = torch.arange(named[name].shape[dim])
            index[member.positions] = member.positions[order[group.name]]
            if (name, dim) in found:
                found[name, dim] = found[name, dim][index]
            else:
                found[name, dim] = index
    return found


def _permute_parameters(
    program: Program, indices: Mapping[tuple[str, int], Tensor]
) -> dict[str, Tensor]:
    """The parameters that hold units of these groups, with the units moved."""
    named = {name: parameter.detach() for name, parameter in program.named_parameters()}
    values = dict[str, Tensor]()
    for (name, dim), index in indices.items():
        value = values.get(name, named[name])
        values[name] = value.index_select(dim, index.to(value.device))
    return values


def _permute_sparse(program: Program, indices: Mapping[tuple[str, int], Tensor]) -> SparseWeights:
    torn = [name for name in program.sparse if (name, 1) in indices]
    if torn:
        raise EditError(
            f"{torn[0]} is {program.sparse[torn[0]].pattern} sparse along its inputs, which would "
            "change places "
            f"({len(torn)} such weights): reorder channels first, and make weights sparse after it"
        )
    return slice_sparse(program.sparse, lambda name, dim: indices.get((name, dim)))
