"""Apply an edit: slice every tensor once, and resize the constants of the graph that follow the
pruned axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from secateur.graph.axes.analysis import Analysis, analyse, flat_axes
from secateur.graph.axes.atoms import Atom, BoolArray, Keep
from secateur.graph.axes.coupling import CoupledGroup, coupled_groups
from secateur.graph.capture.calls import accept_calls_of, get_attribute
from secateur.graph.errors import EditError
from secateur.graph.program import Cut, Program
from secateur.graph.sparse import SparseWeights, slice_sparse

Units = Sequence[int] | torch.Tensor
Edit = Mapping[CoupledGroup | str, Units] | Mapping[CoupledGroup, Units] | Mapping[str, Units]


def keep(program: Program, edit: Edit) -> Program:
    """A new Program that has only the kept units of the named groups; the given Program stays
    usable.

    Args:
        edit: group (or its name) -> the units that stay: indices in any order, or a boolean mask.
            Where the group has coordinates (``within``), [kept, coordinates] indices or a [units,
            coordinates] mask chooses for each.

    Returns:
        A Program over new Parameters where an axis was cut and over the same ones elsewhere; ties
        stay ties.

    Raises:
        EditError: an unknown or locked group, units out of range, twice named, too few, or not
            equally many at every coordinate; or inputs of a sparse weight would go.
    """
    masks = resolve_edit(program, edit)
    if not masks:
        return program.replace()
    analysis = analyse(program)
    keeping = keeping_of(masks)
    sparse = _slice_sparse(program, analysis, keeping)
    gm = _rewrite_graph(analysis, keeping)
    return program.replace(
        gm=gm, scores=MappingProxyType({}), cut=_merge_cut(program, masks), sparse=sparse
    )


def with_parameters(program: Program, values: Mapping[str, torch.Tensor]) -> Program:
    """A new Program over the same graph in which some parameters have other values; the given one
    stays usable.

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
            raise EditError(
                f"{name}: a value of shape {tuple(value.shape)} is given, the program has {found}"
            )
        like = owned[name]
        new[id(like)] = nn.Parameter(value.detach().to(like), requires_grad=like.requires_grad)
    named = [
        *old.named_parameters(remove_duplicate=False),
        *old.named_buffers(remove_duplicate=False),
    ]
    read = set()
    for node in old.graph.nodes:
        if node.op == "get_attr":
            read.add(str(node.target))
    tensors: dict[str, Any] = {target: get_attribute(old, target) for target in read}
    tensors |= {name: new.get(id(tensor), tensor) for name, tensor in named}
    gm = fx.GraphModule(tensors, copy_graph(old)[0], class_name=old._get_name())
    gm.meta = dict(old.meta)
    accept_calls_of(gm, old)
    return program.replace(gm=gm)


def keeping_of(masks: Mapping[CoupledGroup, BoolArray]) -> Keep:
    """Masks by group, [units] or [units, coordinates], as the algebra takes them."""
    outers = {group.leaf: group.outer for group in masks if group.outer is not None}
    return Keep({group.leaf: mask for group, mask in masks.items()}, outers)


def _merge_cut(program: Program, masks: Mapping[CoupledGroup, BoolArray]) -> Cut:
    """What was removed before and now, in the numbering of the first Program."""
    before = program.cut or Cut(program, {})
    kept = dict(before.kept)
    for group, mask in masks.items():
        stays = indices_of(torch.from_numpy(mask))
        old = before.kept.get(group.name)
        if stays.dim() == 1 and (old is None or old.dim() == 1):
            if old is None:
                kept[group.name] = stays
            else:
                kept[group.name] = old[stays]
        else:
            kept[group.name] = _kept_by_coordinate(before, group, stays)
    return Cut(before.dense, MappingProxyType(kept), before.dropped)


def _kept_by_coordinate(before: Cut, group: CoupledGroup, stays: torch.Tensor) -> torch.Tensor:
    """[kept, coordinates of the dense group] in dense numbers; a coordinate that is gone keeps its
    first units."""
    dense = next(one for one in coupled_groups(before.dense) if one.name == group.name)
    old = before.kept.get(group.name, torch.arange(dense.units))
    if old.dim() == 1:
        old = old[:, None].expand(-1, dense.coordinates)
    else:
        old = old
    present = before.kept.get(dense.within or "", torch.arange(dense.coordinates))
    if stays.dim() == 1:
        stays = stays[:, None].expand(-1, len(present))
    else:
        stays = stays
    made = old[: len(stays)].clone()
    made[:, present] = old[:, present].gather(0, stays)
    return made


def indices_of(mask: torch.Tensor) -> torch.Tensor:
    """Indices of a mask [units], ascending; of a mask [units, coordinates] by column, [kept,
    coordinates]."""
    if mask.dim() == 1:
        return mask.nonzero()[:, 0]
    return mask.T.nonzero()[:, 1].reshape(mask.shape[1], -1).T.contiguous()


def _slice_sparse(program: Program, analysis: Analysis, keeping: Keep) -> SparseWeights:
    """The sparse weights' rows that stay.

    Raises:
        EditError: inputs of one would go, which tears its groups apart.
    """

    def kept_positions(name: str, dim: int) -> torch.Tensor | None:
        """Positions of a parameter's dim that stay, or None where all do."""
        axis = analysis.tensors[name][0][dim]
        if keeping.touches(axis):
            return torch.from_numpy(keeping.positions(axis))
        return None

    torn = [name for name in program.sparse if kept_positions(name, 1) is not None]
    if torn:
        raise EditError(
            f"{torn[0]} is {program.sparse[torn[0]].pattern} sparse along its inputs, and some of "
            "them would go "
            f"({len(torn)} such weights): prune widths first, and make weights sparse after it"
        )
    return slice_sparse(program.sparse, kept_positions)


def resolve_edit(program: Program, edit: Edit) -> dict[CoupledGroup, BoolArray]:
    """The edit as group -> [units] bool; checks every name and index.  Groups that stay whole are
    left out."""
    groups = coupled_groups(program)
    by_name = {g.name: g for g in groups}
    own = set(groups)
    masks: dict[CoupledGroup, BoolArray] = {}
    for key, units in edit.items():
        if isinstance(key, str):
            group = by_name.get(key)
        elif key in own:
            group = key
        else:
            group = by_name.get(key.name)
        if group is None or (not isinstance(key, str) and group.units != key.units):
            if isinstance(key, str):
                name = key
            else:
                name = key.name
            raise EditError(
                f"no group {name!r} in this program; secateur.coupled_groups(program) lists them"
            )
        mask = _unit_mask(group, units)
        if not mask.all():
            masks[group] = mask
    return masks


def _unit_mask(group: CoupledGroup, units: Units) -> BoolArray:
    given = torch.as_tensor(units)
    if given.dim() > 1:
        mask = _mask_by_coordinate(group, given.cpu())
    elif given.dtype == torch.bool and given.shape == (group.units,):
        mask = given.cpu().numpy()
    else:
        indices = given.to(torch.int64).flatten().tolist()
        bad = []
        for i in indices:
            if not 0 <= i < group.units:
                bad.append(i)
        if bad or len(set(indices)) != len(indices):
            if bad:
                what = f"unit {bad[0]}"
            else:
                what = "a unit twice"
            raise EditError(
                f"{group.name} has units 0..{group.units - 1}, but the edit names {what}"
            )
        mask = np.zeros(group.units, bool)
        mask[indices] = True
    if group.locked and not mask.all():
        raise EditError(f"{group.name} is locked: {group.locked}")
    count = int(mask.sum(0).max())
    if count < group.min_units:
        raise EditError(
            f"{group.name}: {count} of {group.units} units kept, at least {group.min_units} "
            "must stay"
        )
    return mask


def _mask_by_coordinate(group: CoupledGroup, given: torch.Tensor) -> BoolArray:
    """[units, coordinates] bool of units that differ from one coordinate to the next; [units] where
    they do not."""
    if group.outer is None or given.dim() != 2 or given.shape[1] != group.coordinates:
        if group.outer is not None:
            wanted = f"[kept, {group.coordinates}]"
        else:
            wanted = "[kept]"
        raise EditError(
            f"{group.name}: the edit gives units of shape {list(given.shape)}, and {wanted} "
            "was expected"
            + ("" if group.outer is not None else ": its units stay or go everywhere")
        )
    if given.dtype == torch.bool and len(given) == group.units:
        mask = given
    else:
        given = given.to(torch.int64)
        if bool(((given < 0) | (given >= group.units)).any()):
            raise EditError(
                f"{group.name} has units 0..{group.units - 1}, but the edit names others"
            )
        mask = group.mask(given)
        if int(mask.sum()) != given.numel():
            raise EditError(f"{group.name}: the edit names a unit twice at one coordinate")
    counts = mask.sum(0)
    if bool((counts != counts[0]).any()):
        raise EditError(
            f"{group.name}: {int(counts.min())} to {int(counts.max())} units would stay for "
            "each unit of "
            f"{group.within}, and they must be equally many"
        )
    alike = bool((mask == mask[:, :1]).all())
    return (mask[:, 0] if alike else mask).numpy()


# The new graph module
def _rewrite_graph(analysis: Analysis, keeping: Keep) -> fx.GraphModule:
    old = analysis.gm
    graph, copies = copy_graph(old)
    tensors = _slice_parameters(analysis, keeping)
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


def copy_graph(gm: fx.GraphModule) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a module's graph, node names included, and the copy of each node."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    graph.set_codegen(gm.graph._codegen)
    out = next(iter(reversed(graph.nodes)))
    old_out = next(iter(reversed(gm.graph.nodes)))
    out.meta = dict(old_out.meta)
    return graph, copies


def _slice_parameters(analysis: Analysis, keeping: Keep) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (axes, tensor) in analysis.tensors.items():
        new = tensor.detach()
        for dim, axis in enumerate(axes):
            if keeping.touches(axis):
                new = new.index_select(
                    dim, torch.from_numpy(keeping.positions(axis)).to(new.device)
                )
        if new.shape == tensor.shape:
            tensors[name] = tensor
        elif isinstance(tensor, nn.Parameter):
            tensors[name] = nn.Parameter(new.contiguous(), requires_grad=tensor.requires_grad)
        else:
            tensors[name] = new.contiguous()
    return tensors


def _select_generated(
    analysis: Analysis,
    node: fx.Node,
    copy: fx.Node,
    keeping: Keep,
    tensors: dict[str, torch.Tensor],
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
        index.meta["val"] = _fake_tensor(copy.meta["val"], tensors[name].shape, torch.int64)
        with copy.graph.inserting_after(index):
            picked = copy.graph.call_function(
                torch.ops.aten.index_select.default, (copy, dim, index)
            )
        picked.meta = dict(copy.meta)
        copy.replace_all_uses_with(picked, delete_user_cb=lambda user, new=picked: user is not new)  # type: ignore[misc]
        copy.meta["val"] = node.meta["val"]
        copy = picked


def _resize_value(analysis: Analysis, node: fx.Node, copy: fx.Node, keeping: Keep) -> None:
    """The traced shape of a value, after the edit."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        results = list(value)
    else:
        results = [value]
    all_axes = list(flat_axes(analysis.values.get(node)))
    if len(results) != len(all_axes):
        return
    resized = [_map_sizes(v, axes, keeping) for v, axes in zip(results, all_axes, strict=True)]
    if isinstance(value, (tuple, list)):
        copy.meta["val"] = type(value)(resized)
    else:
        copy.meta["val"] = resized[0]


def _map_sizes(value: Any, axes: Sequence[Atom], keeping: Keep) -> Any:
    if not isinstance(value, torch.Tensor) or not any(map(keeping.touches, axes)):
        return value
    sizes = []
    for size, axis in zip(value.shape, axes, strict=True):
        sizes.append(
            size if not keeping.touches(axis) else _scale_size(size, axis.size, keeping.size(axis))
        )
    return _fake_tensor(value, sizes, value.dtype)


def _scale_size(size: Any, old: int, new: int) -> Any:
    shared = math.gcd(old, new)
    if isinstance(size, int):
        return new
    return size // (old // shared) * (new // shared)


def _fake_tensor(like: Any, sizes: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    with like.fake_mode:
        return torch.empty(sizes, dtype=dtype, device=like.device)
