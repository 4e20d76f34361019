"""Ops that move, repeat, cut or join axes without touching values."""

from __future__ import annotations

import torch
from torch import fx

from secateur.graph.axes.atoms import Atom, Keep, make_concatenation, make_product
from secateur.graph.axes.rules.base import DATA, Axes, Op, Value, axis_rule, set_arg

aten = torch.ops.aten


# Views
@axis_rule(
    *(
        f"aten::{n}"
        for n in "view reshape _unsafe_view view_copy _reshape_alias flatten "
        "view_as reshape_as".split()
    )
)
def view(op: Op) -> Axes:
    """Axes regrouped in order, as products and factors of each other."""
    out = _tie_regrouped_axes(op)
    op.set_domain(op.index_domain(op["self"]))
    if "size" in op.args or "shape" in op.args:
        op.resize_list("size" if "size" in op.args else "shape", out)
    return out


@axis_rule("aten::unsqueeze", "aten::squeeze")
def squeeze(op: Op) -> Axes:
    """Axes of one come and go; the others pass in order."""
    axes = op.axes(op["self"])
    op.set_domain(op.index_domain(op["self"]))
    if op.name == "unsqueeze":
        axes.insert(op.dim(len(axes) + 1), Atom(1))
        return axes
    given = op.first_argument("dim")
    dims = (
        range(len(axes))
        if given is None
        else given
        if isinstance(given, (list, tuple))
        else [given]
    )
    if axes:
        gone = {d % len(axes) for d in dims if axes[d].size == 1}
    else:
        gone = set()
    return [axis for d, axis in enumerate(axes) if d not in gone]


@axis_rule("aten::unflatten")
def unflatten(op: Op) -> Axes:
    """One axis as a product of several."""
    out = _tie_regrouped_axes(op)
    op.resize_list("sizes", out[op.dim(len(op.axes(op["self"]))) :])
    return out


@axis_rule(
    "aten::view.dtype",
    "aten::as_strided",
    "aten::unfold",
    "aten::diagonal",
    "aten::im2col",
    "aten::unfold_copy",
)
def tie_strided_view(op: Op) -> Axes:
    """Reads by strides or as another dtype: nothing can be told apart, all is locked."""
    op.lock(op.axes(op["self"]), "read by strides or as another dtype")
    return op.make_fresh_axes(lock="read by strides or as another dtype")


def _tie_regrouped_axes(op: Op) -> Axes:
    axes = op.axes(op["self"])
    sizes = op.sizes()
    if 0 in sizes:
        return _view_of_nothing(op, axes)
    out = op.space.regroup([f for axis in axes for f in axis.factors()], sizes)
    if out is None:
        op.space.conflicts.append(f"{op.node.name}: cannot view {axes} as {sizes}")
        op.lock(axes, "viewed across the bounds of its units")
        return op.make_fresh_axes(lock=f"viewed across the bounds of its units ({op.node.name})")
    return out


def _view_of_nothing(op: Op, axes: Axes) -> Axes:
    """Without entries only the trailing axes can be told apart."""
    out = op.make_fresh_axes()
    for i in range(1, min(len(out), len(axes)) + 1):
        if out[-i].size != axes[-i].size or out[-i].size == 0:
            break
        op.space.unify(out[-i], axes[-i])
    return out


# Permutations
@axis_rule("aten::permute")
def permute(op: Op) -> Axes:
    """Axes in the order of ``dims``."""
    return _permute_axes(op, [d % len(op.value.shape) for d in op["dims"]])


@axis_rule("aten::t", "aten::numpy_T")
def t(op: Op) -> Axes:
    """Axes in reverse order."""
    return _permute_axes(op, list(range(len(op.value.shape)))[::-1])


@axis_rule(
    "aten::transpose", "aten::swapaxes", "aten::swapdims", "aten::mT", "aten::adjoint", "aten::mH"
)
def transpose(op: Op) -> Axes:
    """Two axes exchanged."""
    rank = len(op.value.shape)
    a = op.first_argument("dim0", "axis0")
    b = op.first_argument("dim1", "axis1")
    order = list(range(rank))
    if a is None:
        i = -2
        j = -1
    else:
        i = a % rank
        j = b % rank
    order[i], order[j] = order[j], order[i]
    return _permute_axes(op, order)


@axis_rule("aten::movedim", "aten::moveaxis")
def movedim(op: Op) -> Axes:
    """Axes moved to other places."""
    rank = len(op.value.shape)
    order = torch.movedim(
        torch.empty(list(range(2, rank + 2))), op["source"], op["destination"]
    ).shape
    return _permute_axes(op, [d - 2 for d in order])


def _permute_axes(op: Op, order: list[int]) -> Axes:
    axes = op.axes(op["self"])
    op.set_domain(op.index_domain(op["self"]))
    return [axes[i] for i in order]


# Repetition
@axis_rule("aten::expand", "aten::broadcast_to", "aten::expand_as", "aten::expand_copy")
def expand(op: Op) -> Axes:
    """Axes of size one stretched, new ones in front."""
    axes = op.axes(op["self"])
    out = op.make_fresh_axes()
    offset = len(out) - len(axes)
    for i, axis in enumerate(axes, offset):
        if axis.size == out[i].size:
            out[i] = axis
    for i, atom in enumerate(out):
        if i < offset or atom is not axes[i - offset]:
            op.space.mark(atom, "broadcast")
    op.set_domain(op.index_domain(op["self"]))
    if op.name != "expand_as":
        op.resize_list("size", out)
    return out


@axis_rule("aten::repeat", "aten::tile")
def repeat(op: Op) -> Axes:
    """Each axis several times over: a product of copies and axis."""
    if "repeats" in op.args:
        name = "repeats"
    else:
        name = "dims"
    axes = op.axes(op["self"])
    times = op[name]
    axes = [Atom(1)] * (len(times) - len(axes)) + axes
    times = [1] * (len(axes) - len(times)) + list(times)
    copies = [_repeat_atom(op, n) for n in times]
    op.resize_list(name, copies[len(copies) - len(op[name]) :])
    return [make_product([n, axis]) for n, axis in zip(copies, axes, strict=True)]


@axis_rule("aten::repeat_interleave.self_int")
def repeat_interleave(op: Op) -> Axes:
    """Each position of an axis several times: a product of axis and copies."""
    axes = op.axes(op["self"])
    if op["dim"] is None:
        axes = [make_product(axes)]
    dim = op.dim(len(axes))
    copies = _repeat_atom(op, op["repeats"])
    axes[dim] = make_product([axes[dim], copies])
    op.resize("repeats", copies, lambda keep: keep.size(copies))
    whole = axes[dim]
    if op["output_size"] is not None:
        op.resize("output_size", whole, lambda keep: keep.size(whole))
    return axes


@axis_rule("aten::repeat_interleave.self_Tensor", "aten::repeat_interleave.Tensor")
def repeat_by_tensor(op: Op) -> Axes:
    """Positions repeated as a tensor says: that axis is locked."""
    axes = op.axes(op.first_argument("self", "repeats"))
    dim = op.dim(len(axes))
    op.lock([axes[dim]], "repeated by a tensor")
    out = op.make_fresh_axes()
    return [*axes[:dim], out[dim], *axes[dim + 1 :]]


def _repeat_atom(op: Op, times: object) -> Atom:
    atom = Atom(op.integer_value(times))
    op.space.mark(atom, "broadcast")
    if op.state.is_symbolic(times):
        atom.locks.add(DATA)
    return atom


# Cuts
@axis_rule("aten::slice", "aten::narrow", "aten::slice_copy")
def slice_(op: Op) -> Axes:
    """A range of an axis: the axis falls into what lies before, in and after it."""
    axes = op.axes(op["self"])
    sizes = op.sizes()
    dim = op.dim(len(axes))
    source = axes[dim]
    length = sizes[dim]
    op.set_domain(op.index_domain(op["self"]))
    start = op["start"] or 0
    step = op.first_argument("step") or 1
    bounds = (op.value.shape[dim], start, op.first_argument("end"), op.first_argument("length"))
    if length == source.size and step == 1:
        return axes
    if op.is_data(source) or any(map(op.state.is_symbolic, bounds)):
        op.lock([source], "cut where the input says")
        axes[dim] = op.make_fresh_axes()[dim]
        axes[dim].locks.add(DATA)
    elif step != 1:
        axes[dim] = _tie_strided_slice(op, source, int(start), int(step), length)
    else:
        axes[dim] = _cut_range(
            op,
            source,
            int(start) % source.size if start < 0 else min(int(start), source.size),
            length,
        )
    return axes


def _tie_strided_slice(op: Op, source: Atom, start: int, step: int, length: int) -> Atom:
    whole = source.size % step == 0 and start < step and length == source.size // step
    parts = None
    if whole:
        parts = op.space.split_product(source, [length, step])
    if parts is None:
        op.lock([source], "cut by a stride")
        return op.space.make_locked_leaf(length, f"cut by a stride ({op.node.name})")
    op.lock([parts[1]], "cut by a stride")
    return parts[0]


def _cut_range(op: Op, source: Atom, start: int, length: int) -> Atom:
    parts = op.split_range(source, start, length)
    if parts is None:
        return op.space.make_locked_leaf(length, f"cut across its units ({op.node.name})")
    before, middle, after = parts

    def apply(node: fx.Node, keep: Keep) -> None:
        """Write the bounds that the kept units have now."""
        if not keep.touches(source):
            return
        if before.size:
            first = keep.size(before)
        else:
            first = 0
        last = first + keep.size(middle)
        if op.name == "narrow":
            bounds = {"start": first, "length": last - first}
        else:
            bounds = {"start": first}
        if op.name != "narrow" and after.size:
            bounds["end"] = last
        for name, value in bounds.items():
            set_arg(node, name, value)

    op.add_rewrite(apply)
    return middle


@axis_rule("aten::select", "aten::select_copy")
def select(op: Op) -> Axes:
    """One position of an axis, which goes."""
    axes = op.axes(op["self"])
    dim = op.dim(len(axes))
    source = axes.pop(dim)
    op.set_domain(op.index_domain(op["self"]))
    parts = None
    if (
        not op.state.is_symbolic(op["index"])
        and not isinstance(op["index"], fx.Node)
        and not op.is_data(source)
    ):
        at = op["index"] % source.size
        parts = op.space.split_concat(source, [at, 1, source.size - at - 1])
    if parts is None:
        op.lock([source], "one position is read")
        return axes
    before = parts[0]
    if before.size:
        op.resize("index", before, lambda keep: keep.size(before))
    return axes


@axis_rule(
    *(
        f"aten::{n}"
        for n in "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk".split()
    ),
    "aten::split_copy",
    "aten::split_with_sizes_copy",
    "aten::unsafe_split_with_sizes",
)
def split(op: Op) -> Value:
    """An axis as a list of ranges."""
    axes = op.axes(op["self"])
    dim = op.dim(len(axes))
    parts = _split_axis(op, axes[dim], [op.integer_value(piece.shape[dim]) for piece in op.value])
    source = axes[dim]

    def apply(node: fx.Node, keep: Keep) -> None:
        """Write the bounds that the kept units have now."""
        if keep.touches(source):
            node.target = aten.split_with_sizes.default
            node.args, node.kwargs = (node.args[0], [keep.size(part) for part in parts], dim), {}

    op.add_rewrite(apply)
    return [[*axes[:dim], part, *axes[dim + 1 :]] for part in parts]


@axis_rule("aten::unbind", "aten::unbind_copy")
def unbind(op: Op) -> Value:
    """An axis as a list of its positions, which are locked."""
    axes = op.axes(op["self"])
    dim = op.dim(len(axes))
    _split_axis(op, axes[dim], [1] * axes[dim].size)
    return [axes[:dim] + axes[dim + 1 :] for _ in op.value]


def _split_axis(op: Op, source: Atom, sizes: list[int]) -> list[Atom]:
    parts = op.space.split_concat(source, sizes)
    if parts is None or op.is_data(source):
        op.lock([source], "split across its units")
        parts = []
        for size in sizes:
            parts.append(
                op.space.make_locked_leaf(size, f"split across its units ({op.node.name})")
            )
    return parts


# Joins
@axis_rule("aten::cat", "aten::concat", "aten::concatenate")
def cat(op: Op) -> Axes:
    """Axes one after another: a concatenation; the other axes are tied."""
    rank = len(op.value.shape)
    operands = [axes for axes in map(op.axes, op["tensors"]) if len(axes) == rank]
    dim = op.dim(rank)
    out = operands[0][:]
    for other in operands[1:]:
        for i in range(rank):
            if i != dim:
                op.space.unify(out[i], other[i])
    parts = [axes[dim] for axes in operands]
    if op.state.is_symbolic(op.value.shape[dim]) or any(map(op.is_data, parts)):
        op.lock(parts, "joined with data")
        out[dim] = op.space.make_locked_leaf(op.sizes()[dim], DATA)
    else:
        out[dim] = make_concatenation(parts)
    return out


@axis_rule("aten::stack")
def stack(op: Op) -> Axes:
    """Tensors along a new axis, all their axes tied."""
    operands = [op.axes(x) for x in op["tensors"]]
    out = operands[0][:]
    for other in operands[1:]:
        for mine, theirs in zip(out, other, strict=True):
            op.space.unify(mine, theirs)
    out.insert(op.dim(len(out) + 1), make_concatenation([Atom(1) for _ in operands]))
    return out


@axis_rule(
    "aten::constant_pad_nd", "aten::pad", "aten::reflection_pad1d", "aten::replication_pad1d"
)
def pad(op: Op) -> Axes:
    """An axis with locked edges before and after it."""
    axes = op.axes(op["self"])
    sizes = op.sizes()
    widths = op.first_argument("pad", "padding")
    for i in range(len(widths) // 2):
        dim = len(axes) - 1 - i
        low = widths[2 * i]
        high = widths[2 * i + 1]
        symbolic = any(map(op.state.is_symbolic, (low, high, op.value.shape[dim])))
        if symbolic:
            axes[dim] = op.make_fresh_axes()[dim]
        else:
            axes[dim] = _pad_axis(op, axes[dim], int(low), int(high), sizes[dim])
    return axes


def _pad_axis(op: Op, axis: Atom, low: int, high: int, size: int) -> Atom:
    if low < 0 or high < 0:
        start = max(0, -low)
        end = axis.size + min(high, 0)
        parts = op.space.split_concat(axis, [start, end - start, axis.size - end])
        if parts is None or low > 0 or high > 0:
            op.lock([axis], "cropped across its units")
            return op.space.make_locked_leaf(size, "cropped across its units")
        op.lock([parts[0], parts[2]], "cropped")
        axis = parts[1]
        return axis
    edges = []
    for width in (low, high):
        edges.append(op.space.make_locked_leaf(width, "padding") if width else Atom(0))
    return make_concatenation([edges[0], axis, edges[1]])


@axis_rule(
    "aten::roll", "aten::flip", "aten::rot90", "aten::channel_shuffle", "aten::pixel_shuffle"
)
def reorder(op: Op) -> Axes:
    """Positions in another order: those axes are locked."""
    axes = op.axes(op["self"])
    dims = op.first_argument("dims")
    op.lock([axes[d] for d in dims] if dims else axes, "reordered by position")
    if op.name in ("roll", "flip"):
        return axes
    return op.make_fresh_axes(lock="reordered by position")
