"""Apply an edit: slice every tensor once, and resize the constants of the graph that follow the pruned axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from secateur.graph.analysis import Analysis, analyse, flat_axes
from secateur.graph.atoms import Atom, BoolArray, Keep
from secateur.graph.calls import accept_calls_of, attribute
from secateur.graph.coupling import CoupledGroup, coupled_groups
from secateur.graph.errors import EditError
from secateur.graph.program import Cut, Program
from secateur.graph.sparse import SparseWeights, sliced

Units = Sequence[int] | torch.Tensor
Edit = Mapping[CoupledGroup | str, Units] | Mapping[CoupledGroup, Units] | Mapping[str, Units]


def keep(program: Program, edit: Edit) -> Program:
    """A new Program that has only the kept units of the named groups; the given Program stays usable.

    Args:
        edit: group (or its name) -> the units that stay: indices in any order, or a boolean mask.  Where the group
            has coordinates (``within``), [kept, coordinates] indices or a [units, coordinates] mask chooses for each.
    Returns:
        A Program over new Parameters where an axis was cut and over the same ones elsewhere; ties stay ties.
    Raises:
        EditError: an unknown or locked group, units out of range, twice named, too few, or not equally many at every
            coordinate; or inputs of a sparse weight would go.
    """
    masks = resolve_edit(program, edit)
    if not masks:
        return program.replace()
    analysis = analyse(program)
    keeping = keeping_of(masks)
    sparse = _sparse(program, analysis, keeping)
    gm = _rewritten(analysis, keeping)
    return program.replace(gm=gm, scores=MappingProxyType({}), cut=_cut(program, masks), sparse=sparse)


def with_parameters(program: Program, values: Mapping[str, torch.Tensor]) -> Program:
    """A new Program over the same graph in which some parameters have other values; the given one stays usable.

    Args:
        values: by name in the source model; shape, dtype and device of the parameter.
    Raises:
        EditError: no parameter has that name, or the shape differs.
    """
    old = program.gm
    owned = dict(old.named_parameters())
    new: dict[int, nn.Parameter] = {}
    for name, value in values.items():
        if name not in owned or owned[name].shape != value.shape:
            found = tuple(owned[name].shape) if name in owned else "no such parameter"
            raise EditError(f"{name}: a value of shape {tuple(value.shape)} is given, the program has {found}")
        like = owned[name]
        new[id(like)] = nn.Parameter(value.detach().to(like), requires_grad=like.requires_grad)
    named = [*old.named_parameters(remove_duplicate=False), *old.named_buffers(remove_duplicate=False)]
    read = {str(node.target) for node in old.graph.nodes if node.op == "get_attr"}
    tensors: dict[str, Any] = {target: attribute(old, target) for target in read}
    tensors |= {name: new.get(id(tensor), tensor) for name, tensor in named}
    gm = fx.GraphModule(tensors, copied(old)[0], class_name=old._get_name())
    gm.meta = dict(old.meta)
    accept_calls_of(gm, old)
    return program.replace(gm=gm)


def keeping_of(masks: Mapping[CoupledGroup, BoolArray]) -> Keep:
    """Masks by group, [units] or [units, coordinates], as the algebra takes them."""
    outers = {group.leaf: group.outer for group in masks if group.outer is not None}
    return Keep({group.leaf: mask for group, mask in masks.items()}, outers)


def _cut(program: Program, masks: Mapping[CoupledGroup, BoolArray]) -> Cut:
    """What was removed before and now, in the numbering of the first Program."""
    before = program.cut or Cut(program, {})
    kept = dict(before.kept)
    for group, mask in masks.items():
        stays = indices_of(torch.from_numpy(mask))
        old = before.kept.get(group.name)
        if stays.dim() == 1 and (old is None or old.dim() == 1):
            kept[group.name] = stays if old is None else old[stays]
        else:
            kept[group.name] = _kept_by_coordinate(before, group, stays)
    return Cut(before.dense, MappingProxyType(kept), before.dropped)


def _kept_by_coordinate(before: Cut, group: CoupledGroup, stays: torch.Tensor) -> torch.Tensor:
    """[kept, coordinates of the dense group] in dense numbers; a coordinate that is gone keeps its first units."""
    dense = next(one for one in coupled_groups(before.dense) if one.name == group.name)
    old = before.kept.get(group.name, torch.arange(dense.units))
    old = old[:, None].expand(-1, dense.coordinates) if old.dim() == 1 else old
    present = before.kept.get(dense.within or "", torch.arange(dense.coordinates))
    stays = stays[:, None].expand(-1, len(present)) if stays.dim() == 1 else stays
    made = old[: len(stays)].clone()
    made[:, present] = old[:, present].gather(0, stays)
    return made


def indices_of(mask: torch.Tensor) -> torch.Tensor:
    """Indices of a mask [units], ascending; of a mask [units, coordinates] by column, [kept, coordinates]."""
    if mask.dim() == 1:
        return mask.nonzero()[:, 0]
    return mask.T.nonzero()[:, 1].reshape(mask.shape[1], -1).T.contiguous()


def _sparse(program: Program, analysis: Analysis, keeping: Keep) -> SparseWeights:
    """The sparse weights' rows that stay.  Raises: EditError: inputs of one would go, which tears its groups apart."""

    def positions(name: str, dim: int) -> torch.Tensor | None:
        axis = analysis.tensors[name][0][dim]
        return torch.from_numpy(keeping.positions(axis)) if keeping.touches(axis) else None

    torn = [name for name in program.sparse if positions(name, 1) is not None]
    if torn:
        raise EditError(
            f"{torn[0]} is {program.sparse[torn[0]].pattern} sparse along its inputs, and some of them would go "
            f"({len(torn)} such weights): prune widths first, and make weights sparse after it"
        )
    return sliced(program.sparse, positions)


def resolve_edit(program: Program, edit: Edit) -> dict[CoupledGroup, BoolArray]:
    """The edit as group -> [units] bool; checks every name and index.  Groups that stay whole are left out."""
    groups = coupled_groups(program)
    by_name, own = {g.name: g for g in groups}, set(groups)
    masks: dict[CoupledGroup, BoolArray] = {}
    for key, units in edit.items():
        group = by_name.get(key) if isinstance(key, str) else key if key in own else by_name.get(key.name)
        if group is None or (not isinstance(key, str) and group.units != key.units):
            name = key if isinstance(key, str) else key.name
            raise EditError(f"no group {name!r} in this program; secateur.coupled_groups(program) lists them")
        mask = _mask(group, units)
        if not mask.all():
            masks[group] = mask
    return masks


def _mask(group: CoupledGroup, units: Units) -> BoolArray:
    given = torch.as_tensor(units)
    if given.dim() > 1:
        mask = _mask_by_coordinate(group, given.cpu())
    elif given.dtype == torch.bool and given.shape == (group.units,):
        mask = given.cpu().numpy()
    else:
        indices = given.to(torch.int64).flatten().tolist()
        bad = [i for i in indices if not 0 <= i < group.units]
        if bad or len(set(indices)) != len(indices):
            what = f"unit {bad[0]}" if bad else "a unit twice"
            raise EditError(f"{group.name} has units 0..{group.units - 1}, but the edit names {what}")
        mask = np.zeros(group.units, bool)
        mask[indices] = True
    if group.locked and not mask.all():
        raise EditError(f"{group.name} is locked: {group.locked}")
    count = int(mask.sum(0).max())
    if count < group.min_units:
        raise EditError(f"{group.name}: {count} of {group.units} units kept, at least {group.min_units} must stay")
    return mask


def _mask_by_coordinate(group: CoupledGroup, given: torch.Tensor) -> BoolArray:
    """[units, coordinates] bool of units that differ from one coordinate to the next; [units] where they do not."""
    if group.outer is None or given.dim() != 2 or given.shape[1] != group.coordinates:
        wanted = f"[kept, {group.coordinates}]" if group.outer is not None else "[kept]"
        raise EditError(
            f"{group.name}: the edit gives units of shape {list(given.shape)}, and {wanted} was expected"
            + ("" if group.outer is not None else ": its units stay or go everywhere")
        )
    if given.dtype == torch.bool and len(given) == group.units:
        mask = given
    else:
        given = given.to(torch.int64)
        if bool(((given < 0) | (given >= group.units)).any()):
            raise EditError(f"{group.name} has units 0..{group.units - 1}, but the edit names others")
        mask = group.mask(given)
        if int(mask.sum()) != given.numel():
            raise EditError(f"{group.name}: the edit names a unit twice at one coordinate")
    counts = mask.sum(0)
    if bool((counts != counts[0]).any()):
        raise EditError(
            f"{group.name}: {int(counts.min())} to {int(counts.max())} units would stay for each unit of "
            f"{group.within}, and they must be equally many"
        )
    alike = bool((mask == mask[:, :1]).all())
    return (mask[:, 0] if alike else mask).numpy()


# ---------------------------------------------------------------------- the new graph module
def _rewritten(analysis: Analysis, keeping: Keep) -> fx.GraphModule:
    old = analysis.gm
    graph, copies = copied(old)
    tensors = _sliced(analysis, keeping)
    for node, copy in copies.items():
        if node.op == "get_attr" and node in analysis.tensor_of:
            copy.target = analysis.tensor_of[node]
    for node, copy in copies.items():
        _resize_value(analysis, node, copy, keeping)
    for node, rewrite in analysis.rewrites:
        rewrite(copies[node], keeping)
    for copy in copies.values():  # strides may change: a view of a pruned value can need a copy
        if copy.target is torch.ops.aten.view.default:
            copy.target = torch.ops.aten.reshape.default
    for node in analysis.generated:
        _select_generated(analysis, node, copies[node], keeping, tensors)
    gm = fx.GraphModule(tensors, graph, class_name=old._get_name())
    gm.meta = dict(old.meta) | {"conflicts": {c.split(":")[0] for c in analysis.space.conflicts}}
    accept_calls_of(gm, old)
    gm.graph.lint()
    return gm


def copied(gm: fx.GraphModule) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a module's graph, node names included, and the copy of each node."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    graph.set_codegen(gm.graph._codegen)
    out, old_out = next(iter(reversed(graph.nodes))), next(iter(reversed(gm.graph.nodes)))
    out.meta = dict(old_out.meta)
    return graph, copies


def _sliced(analysis: Analysis, keeping: Keep) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (axes, tensor) in analysis.tensors.items():
        new = tensor.detach()
        for dim, axis in enumerate(axes):
            if keeping.touches(axis):
                new = new.index_select(dim, torch.from_numpy(keeping.positions(axis)).to(new.device))
        if new.shape == tensor.shape:
            tensors[name] = tensor
        elif isinstance(tensor, nn.Parameter):
            tensors[name] = nn.Parameter(new.contiguous(), requires_grad=tensor.requires_grad)
        else:
            tensors[name] = new.contiguous()
    return tensors


def _select_generated(
    analysis: Analysis, node: fx.Node, copy: fx.Node, keeping: Keep, tensors: dict[str, torch.Tensor]
) -> None:
    """After a node whose values go by position, pick the positions that stay."""
    axes = next(flat_axes(analysis.values[node]), [])
    for dim, axis in enumerate(axes):
        if not keeping.touches(axis):
            continue
        name = f"kept_{node.name}_{dim}"
        tensors[name] = torch.from_numpy(keeping.positions(axis)).to(node.meta["val"].device)
        with copy.graph.inserting_after(copy):
            index = copy.graph.get_attr(name)
        index.meta["val"] = _fake(copy.meta["val"], tensors[name].shape, torch.int64)
        with copy.graph.inserting_after(index):
            picked = copy.graph.call_function(torch.ops.aten.index_select.default, (copy, dim, index))
        picked.meta = dict(copy.meta)
        copy.replace_all_uses_with(picked, delete_user_cb=lambda user, new=picked: user is not new)  # type: ignore[misc]
        copy.meta["val"] = node.meta["val"]
        copy = picked


def _resize_value(analysis: Analysis, node: fx.Node, copy: fx.Node, keeping: Keep) -> None:
    """The traced shape of a value, after the edit."""
    value = node.meta.get("val")
    results = list(value) if isinstance(value, (tuple, list)) else [value]
    all_axes = list(flat_axes(analysis.values.get(node)))
    if len(results) != len(all_axes):
        return
    resized = [_resized(v, axes, keeping) for v, axes in zip(results, all_axes, strict=True)]
    copy.meta["val"] = type(value)(resized) if isinstance(value, (tuple, list)) else resized[0]


def _resized(value: Any, axes: Sequence[Atom], keeping: Keep) -> Any:
    if not isinstance(value, torch.Tensor) or not any(map(keeping.touches, axes)):
        return value
    sizes = [
        size if not keeping.touches(axis) else _scale(size, axis.size, keeping.size(axis))
        for size, axis in zip(value.shape, axes, strict=True)
    ]
    return _fake(value, sizes, value.dtype)


def _scale(size: Any, old: int, new: int) -> Any:
    shared = math.gcd(old, new)
    return new if isinstance(size, int) else size // (old // shared) * (new // shared)


def _fake(like: Any, sizes: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    with like.fake_mode:
        return torch.empty(sizes, dtype=dtype, device=like.device)
