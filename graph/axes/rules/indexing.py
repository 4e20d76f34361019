"""Ops that read or write by index, and ops that make indices.

An index tensor may have a *domain*: the axis whose positions are its values (top-k over a router
counts experts). Reading an axis by an index of its own domain ties the two; any other index locks
the axis.
"""

from __future__ import annotations

import torch
from torch import fx

from secateur.graph.axes.atoms import Atom, Keep
from secateur.graph.axes.rules.base import Axes, Op, Value, axis_rule
from secateur.graph.axes.rules.pointwise import IDENTITY
from secateur.graph.axes.rules.reduction import lock_unless_softmax


@axis_rule("aten::embedding")
def embedding(op: Op) -> Axes:
    """Rows of a table by index: [vocabulary, H], indices [...] -> [..., H]."""
    weight = op.axes(op["weight"])
    indices = op.axes(op["indices"])
    op.space.mark(weight[0], "vocabulary" if _from_input(op["indices"]) else "table")
    op.index_into(weight[0], op["indices"], "its rows are looked up by the input")
    op.state.record_role(op["weight"], weight[0], "looks_up")
    op.state.record_role(op["weight"], weight[1], "looks_up")
    return [*indices, weight[1]]


def _from_input(node: fx.Node) -> bool:
    """Whether indices are the model's input itself, seen through casts and views."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.name.split("::")[1] not in (*IDENTITY, "view", "reshape"):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "placeholder"


@axis_rule("aten::index", "aten::_unsafe_index")
def index(op: Op) -> Axes:
    """x[i, :, j]: axes that are picked from are tied to the index's domain, or locked."""
    axes = op.axes(op["self"])
    picks = [*op["indices"], *[None] * (len(axes) - len(op["indices"]))]
    at = [i for i, pick in enumerate(picks) if pick is not None]
    if len(at) == 1 and _constant_range(op, axes, at[0], picks[at[0]]):
        return axes
    if any(picks[i].meta["val"].dtype == torch.bool for i in at):
        op.lock([axes[i] for i in at], "picked by a boolean mask")
        return _pick_by_mask(op, axes, picks, at)
    rank = max(len(op.axes(picks[i])) for i in at)
    picked = op.broadcast([op.axes(picks[i]) for i in at], rank)
    for i in at:
        op.index_into(axes[i], picks[i])
    op.set_domain(op.index_domain(op["self"]))
    rest = [axis for i, axis in enumerate(axes) if i not in at]
    if at == list(range(at[0], at[-1] + 1)):
        front = at[0]
    else:
        front = 0
    return [*rest[:front], *picked, *rest[front:]]


def _constant_range(op: Op, axes: Axes, dim: int, pick: fx.Node) -> bool:
    """x[..., [3, 4], :] with a constant list of neighbours is a slice, and is rewritten to one by
    an edit."""
    constant = _constant_operand(op, pick)
    source = axes[dim]
    if (
        constant is None
        or constant.dim() != 1
        or constant.dtype == torch.bool
        or op.is_data(source)
    ):
        return False
    positions = [int(p) % source.size for p in constant]
    if positions != list(range(positions[0], positions[0] + len(positions))):
        return False
    parts = op.split_range(source, positions[0], len(positions))
    if parts is None:
        axes[dim] = op.space.make_locked_leaf(
            len(positions), f"cut across its units ({op.node.name})"
        )
        return True
    before, axes[dim], _ = parts

    def apply(node: fx.Node, keep: Keep) -> None:
        """Make the pick a slice of the kept neighbours."""
        if keep.touches(source):
            if before.size:
                first = keep.size(before)
            else:
                first = 0
            node.target = torch.ops.aten.slice.Tensor
            node.args = (node.args[0], dim, first, first + keep.size(parts[1]))

    op.add_rewrite(apply)
    return True


def _constant_operand(op: Op, node: fx.Node) -> torch.Tensor | None:
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.name.split("::")[1].rstrip("_") not in IDENTITY:
            return None
        node = node.args[0]  # type: ignore[assignment]
    return op.state.constant_value(node)


def _pick_by_mask(op: Op, axes: Axes, picks: list[fx.Node | None], at: list[int]) -> Axes:
    """x[mask]: the masked axes become one of data's size, the others pass when there is one leading
    mask."""
    out = op.make_fresh_axes()
    covered = sum(len(op.axes(picks[i])) for i in at)
    if at == [0] and len(out) == len(axes) - covered + 1:
        op.lock(axes[:covered], "picked by a boolean mask")
        out[1:] = axes[covered:]
        return out
    op.lock(axes, "picked by a boolean mask")
    return out


@axis_rule("aten::index_select")
def index_select(op: Op) -> Axes:
    """One axis picked from by a list of positions."""
    axes = op.axes(op["self"])
    dim = op.dim(len(axes))
    op.index_into(axes[dim], op["index"])
    op.set_domain(op.index_domain(op["self"]))
    axes[dim] = (op.axes(op["index"]) or [Atom(1)])[0]
    return axes


@axis_rule("aten::gather", "aten::take_along_dim")
def gather(op: Op) -> Axes:
    """Values along one axis by an index of the result's shape; other axes are tied."""
    axes = op.axes(op["self"])
    index = op.axes(op.first_argument("index", "indices"))
    dim = op.dim(len(axes))
    op.index_into(axes[dim], op.first_argument("index", "indices"))
    op.set_domain(op.index_domain(op["self"]))
    for d, (mine, theirs) in enumerate(zip(axes, index, strict=True)):
        if d != dim and mine.size == theirs.size:
            op.space.unify(mine, theirs)
        elif d != dim:
            op.lock([mine], "read in part")
    return index


_WRITES = (
    "scatter scatter_add scatter_reduce index_add index_copy index_fill index_reduce select_scatter"
).split()


@axis_rule(*(f"aten::{n}" for n in _WRITES))
def scatter(op: Op) -> Axes:
    """Writes along one axis by an index; other axes are tied to those of the source."""
    axes = op.axes(op["self"])
    dim = op.dim(len(axes))
    if op.name == "select_scatter":
        op.lock([axes[dim]], "one position is written")
    else:
        op.index_into(axes[dim], op["index"])
    source = op.axes(op.first_argument("src", "source"))
    if op.name == "select_scatter":
        source = [*source[:dim], axes[dim], *source[dim:]]
    else:
        source = source
    for others in (source, op.axes(op.first_argument("index"))):
        if len(others) == len(axes) and not (others is not source and op.name.startswith("index")):
            for d, (mine, theirs) in enumerate(zip(axes, others, strict=True)):
                if d != dim and mine.size == theirs.size:
                    op.space.unify(mine, theirs)
                elif d != dim and theirs.size != 1:
                    op.lock([mine, theirs], "written in part")
    return axes


@axis_rule("aten::slice_scatter")
def slice_scatter(op: Op) -> Axes:
    """A source is written over a range of one axis, which is locked."""
    axes = op.axes(op["self"])
    source = op.axes(op["src"])
    dim = op.dim(len(axes))
    op.lock([axes[dim], source[dim]], "written in part")
    for d, (mine, theirs) in enumerate(zip(axes, source, strict=True)):
        if d != dim:
            op.space.unify(mine, theirs)
    return axes


@axis_rule("aten::index_put", "aten::_index_put_impl")
def index_put(op: Op) -> Axes:
    """x[i] = values: axes that are written by an index are tied to its domain, or locked."""
    axes = op.axes(op["self"])
    values = op.axes(op["values"])
    picks = [*op["indices"], *[None] * (len(axes) - len(op["indices"]))]
    for axis, pick in zip(axes, picks, strict=True):
        if pick is not None:
            op.index_into(axis, pick)
    last = max((i for i, pick in enumerate(picks) if pick is not None), default=-1)
    for mine, theirs in zip(reversed(axes[last + 1 :]), reversed(values), strict=False):
        if theirs.size != 1:
            op.space.unify(mine, theirs)
    return axes


@axis_rule("aten::masked_scatter")
def masked_scatter(op: Op) -> Axes:
    """Values are written where a mask says: all axes are locked."""
    axes = op.axes(op["self"])
    op.lock(axes, "written through a mask")
    op.lock(op.axes(op["source"]), "written through a mask")
    return axes


# Makers of indices
@axis_rule("aten::topk")
def topk(op: Op) -> Value:
    """The k largest along an axis, which stays at least k long; the indices count along it."""
    axes = op.axes(op["self"])
    dim = op.dim(len(axes))
    count = op.integer_value(op["k"])
    source = axes[dim]
    if not op.is_data(source):
        lock_unless_softmax(op, source)
        op.space.mark(source, "chosen")
        op.state.minima.append((source, count))
    axes[dim] = op.space.make_locked_leaf(count, f"the chosen ones of {op.node.name}")
    op.set_domain(source, 1)
    return [axes, list(axes)]


@axis_rule("aten::sort", "aten::argsort", "aten::msort")
def sort(op: Op) -> Value:
    """An axis in the order of its values: locked, but an order of input sizes is data."""
    axes = op.axes(op["self"])
    dim = op.dim(len(axes))
    source = axes[dim]
    if not op.is_data(source):
        op.lock([source], "sorted")
    axes[dim] = op.space.make_locked_leaf(source.size, DATA_ORDER)
    if op.name == "argsort":
        op.set_domain(source)
        return axes
    op.set_domain(op.index_domain(op["self"]), 0)
    op.set_domain(source, 1)
    if op.name == "sort":
        return [axes, list(axes)]
    return axes


DATA_ORDER = "sorted by value"


@axis_rule("aten::one_hot")
def one_hot(op: Op) -> Axes:
    """Indices as rows of zeros and a one: the new axis is tied to the domain of the indices."""
    classes = Atom(op.sizes()[-1])
    domain = op.index_domain(op["self"])
    if domain is not None and domain.size == classes.size:
        op.space.unify(domain, classes)
        op.resize("num_classes", classes, lambda keep: keep.size(classes))
    else:
        classes.locks.add("one-hot classes from outside")
    return [*op.axes(op["self"]), classes]


@axis_rule("aten::histc")
def histc(op: Op) -> Axes:
    """Counts by bins: tied to the domain of what is counted where the bins are its positions."""
    bins = Atom(op.sizes()[0])
    domain = op.index_domain(op["self"])
    whole = op["min"] == 0 and op["max"] in (bins.size - 1, bins.size)
    if domain is None or domain.size != bins.size or not whole:
        bins.locks.add("counted in bins from outside")
        return [bins]
    op.space.unify(domain, bins)
    short = bins.size - op["max"]
    op.resize("bins", bins, lambda keep: keep.size(bins))
    op.resize("max", bins, lambda keep: keep.size(bins) - short)
    return [bins]


@axis_rule(
    "aten::bincount",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::unique_consecutive",
    "aten::_unique2",
)
def count(op: Op) -> Value:
    """Ops whose result has the size of what they find: operands are locked."""
    op.lock(op.axes(op["self"]), f"read by {op.name}")
    if isinstance(op.value, (tuple, list)):
        return [op.make_fresh_axes(value, lock=f"made by {op.name}") for value in op.value]
    return op.make_fresh_axes(lock=f"made by {op.name}")


@axis_rule("aten::searchsorted", "aten::bucketize")
def search(op: Op) -> Axes:
    """Positions in a sorted table, which is locked."""
    table = op.first_argument("sorted_sequence", "boundaries")
    queries = op["self"]
    op.lock(op.axes(table), "searched")
    return op.axes(queries)
