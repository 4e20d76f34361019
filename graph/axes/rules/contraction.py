"""Ops that multiply and sum: linear, matmul, attention, convolution, grouped matmul."""

from __future__ import annotations

from torch import fx

from secateur.graph.axes.atoms import Atom, Keep
from secateur.graph.axes.rules.base import Axes, Op, axis_rule, set_arg


@axis_rule("aten::linear")
def linear(op: Op) -> Axes:
    """x [..., K], weight [N, K], bias [N] -> [..., N]: K is tied and consumed, N is produced."""
    x = op.axes(op["input"])
    weight = op.axes(op["weight"])
    bias = op.axes(op["bias"])
    op.space.unify(x[-1], weight[-1])
    op.state.record_role(op["weight"], weight[-1], "consumes")
    if len(weight) == 1:
        return x[:-1]
    op.state.record_role(op["weight"], weight[0], "produces")
    if bias:
        op.space.unify(bias[0], weight[0])
        op.state.record_role(op["bias"], bias[0], "produces")
    return [*x[:-1], weight[0]]


@axis_rule(
    "aten::matmul", "aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::inner", "aten::vdot"
)
def matmul(op: Op) -> Axes:
    """[..., M, K] x [..., K, N] -> [..., M, N]: K is tied, leading axes are broadcast."""
    a, b = list(op.tensors())[:2]
    return _contract_last_axes(op, a, b, len(op.value.shape))


@axis_rule("aten::addmm", "aten::baddbmm", "aten::addmv")
def addmm(op: Op) -> Axes:
    """input + [M, K] x [K, N]: as matmul, and the input is broadcast over the result."""
    bias, a, b = list(op.tensors())[:3]
    rank = len(op.value.shape)
    out = op.broadcast([_contract_last_axes(op, a, b, rank), op.axes(bias)], rank)
    for axis in op.axes(bias):
        op.state.record_role(bias, axis, "produces")
    return out


def _contract_last_axes(op: Op, a: fx.Node, b: fx.Node, rank: int) -> Axes:
    """Contract a's last axis with b's last but one (its last when b is a vector); the others
    broadcast or pass."""
    x = op.axes(a)
    y = op.axes(b)
    if len(y) == 1:
        column = []
    else:
        column = [y[-1]]
    if len(x) == 1:
        row = []
    else:
        row = [x[-2]]
    if len(y) == 1:
        inner = y[-1]
    else:
        inner = y[-2]
    op.space.unify(x[-1], inner)
    for node, contracted, free in ((a, x[-1], row), (b, inner, column)):
        op.state.record_role(node, contracted, "consumes")
        for axis in free:
            op.state.record_role(node, axis, "produces")
    batch = op.broadcast([x[:-2], y[:-2]], rank - len(row) - len(column))
    if not (op.state.comes_from_parameters(a) or op.state.comes_from_parameters(b)):
        _mark_attention(op, batch, x[-1], column)
    return [*batch, *row, *column]


def _mark_attention(op: Op, batch: Axes, inner: Atom, column: Axes) -> None:
    """A product of two activations: its batch axes are heads, its inner and column axes run inside
    a head."""
    for atoms, mark in ((batch, "heads"), ([inner, *column], "head_dim")):
        for leaf in (leaf for atom in atoms for leaf in atom.leaves()):
            if not op.is_data(leaf):
                leaf.marks.add(mark)


@axis_rule("aten::einsum")
def einsum(op: Op) -> Axes:
    """Axes of one letter are tied; letters that the result lacks are summed over."""
    equation = op["equation"].replace(" ", "")
    operands = list(op["tensors"])
    inputs, _, output = equation.partition("->")
    named: dict[str, Atom] = {}
    dots: list[Axes] = []
    terms = inputs.split(",")
    for term, operand in zip(terms, operands, strict=True):
        axes = op.axes(operand)
        head, _, tail = term.partition("...")
        if "..." in term:
            dots.append(axes[len(head) : len(axes) - len(tail)])
        letters = list(zip(head, axes, strict=False)) + list(
            zip(reversed(tail), reversed(axes), strict=False)
        )
        for letter, axis in letters:
            _tie_letter(op, named, letter, axis)
    if "->" not in equation:
        output = "".join(sorted(c for c in set(inputs) - set(",.") if inputs.count(c) == 1))
    for term, operand in zip(terms, operands, strict=True):
        for letter in term.replace(".", ""):
            op.state.record_role(
                operand, named[letter], "produces" if letter in output else "consumes"
            )
    rank = max((len(d) for d in dots), default=0)
    head, _, tail = output.partition("...")
    if "..." in output:
        middle = op.broadcast(dots, rank)
    else:
        middle = []
    return [*(named[c] for c in head), *middle, *(named[c] for c in tail)]


def _tie_letter(op: Op, named: dict[str, Atom], letter: str, axis: Atom) -> None:
    if letter in named and named[letter].size != 1 and axis.size != 1:
        op.space.unify(named[letter], axis)
    elif letter not in named or named[letter].size == 1:
        named[letter] = axis


@axis_rule("aten::outer", "aten::ger")
def outer(op: Op) -> Axes:
    """[M], [N] -> [M, N]: nothing is tied."""
    return [op.axes(op["self"])[0], op.axes(op["vec2"])[0]]


# Attention
@axis_rule("aten::scaled_dot_product_attention")
def attention(op: Op) -> Axes:
    """Query, key and value -> output: query and key are tied in width, key and value in positions,
    query heads to the key/value heads that they share."""
    query, key, value = (op.axes(op[n]) for n in ("query", "key", "value"))
    op.space.unify(query[-1], key[-1])
    op.space.unify(key[-2], value[-2])
    for q, k, v in zip(query[:-2], key[:-2], value[:-2], strict=True):
        _tie_heads(op, q, k, v)
    _mark_attention(op, query[:-2], query[-1], [value[-1]])
    out = [*query[:-1], value[-1]]
    if op["attn_mask"] is not None:
        scores = [*query[:-1], key[-2]]
        for mask, axis in zip(reversed(op.axes(op["attn_mask"])), reversed(scores), strict=False):
            if mask.size != 1:
                op.space.unify(mask, axis)
    if op["scale"] is None:
        _pin_scale(op, query[-1])
    return out


def _tie_heads(op: Op, q: Atom, k: Atom, v: Atom) -> None:
    """Query heads are key/value heads times the queries that share one."""
    if k.size != 1 and v.size != 1:
        op.space.unify(k, v)
    if q.size == k.size:
        op.space.unify(q, k)
    elif k.size != 1 and q.size % k.size == 0:
        parts = op.space.split_product(q, [k.size, q.size // k.size])
        if parts is None:
            op.lock([q, k], "query heads do not divide over key/value heads")
        else:
            op.space.unify(parts[0], k)
            op.space.mark(parts[1], "queries")


def _pin_scale(op: Op, inner: Atom) -> None:
    """The default scale is taken from the head's width: hold it when the width changes."""
    scale = inner.size**-0.5

    def apply(node: fx.Node, keep: Keep) -> None:
        """Write the scale of the captured width where that width changed."""
        if keep.touches(inner):
            set_arg(node, "scale", scale)

    op.add_rewrite(apply)


# Convolution
@axis_rule("aten::conv1d", "aten::conv2d", "aten::conv3d")
def conv(op: Op) -> Axes:
    """Convolution: input channels are consumed, output channels produced, spatial axes locked."""
    return _tie_convolution(op, transposed=False)


@axis_rule("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")
def conv_transpose(op: Op) -> Axes:
    """Transposed convolution: the weight is [in, out, ...]."""
    return _tie_convolution(op, transposed=True)


@axis_rule("aten::convolution")
def convolution(op: Op) -> Axes:
    """The general form of both, by its argument ``transposed``."""
    return _tie_convolution(op, transposed=bool(op["transposed"]))


def _tie_convolution(op: Op, transposed: bool) -> Axes:
    x = op.axes(op["input"])
    weight = op.axes(op["weight"])
    bias = op.axes(op["bias"])
    out = op.make_fresh_axes(lock="a spatial axis")
    channel = len(out) - len(weight) + 1
    out[:channel] = x[:channel]
    for extent in weight[2:]:
        op.space.mark(extent, "kernel")
        op.space.lock(extent, "the extent of a kernel")
    groups = op["groups"] or 1
    if transposed:
        inputs = weight[0]
        outputs = weight[1]
    else:
        inputs = weight[1]
        outputs = weight[0]
    if groups == 1:
        op.space.unify(x[channel], inputs)
        op.state.record_role(op["weight"], inputs, "consumes")
        op.state.record_role(op["weight"], outputs, "produces")
        out[channel] = outputs
    elif transposed:
        op.lock([x[channel], *weight[:2]], "a grouped transposed convolution")
        out[channel] = op.space.make_locked_leaf(
            op.sizes()[channel], "a grouped transposed convolution"
        )
    else:
        out[channel] = _tie_grouped_channels(op, x[channel], weight, groups)
    if bias:
        op.space.unify(bias[0], out[channel])
        op.state.record_role(op["bias"], bias[0], "produces")
    op.space.mark(out[channel], "conv")
    op.space.mark(x[channel], "conv")
    return out


def _tie_grouped_channels(op: Op, channels: Atom, weight: Axes, groups: int) -> Atom:
    inside = op.space.split_product(channels, [groups, channels.size // groups])
    outside = op.space.split_product(weight[0], [groups, weight[0].size // groups])
    if inside is None or outside is None:
        op.lock([channels, *weight[:2]], "convolution groups cut across its units")
        return op.space.make_locked_leaf(weight[0].size, "convolution groups cut across its units")
    op.space.unify(inside[0], outside[0])
    if weight[1].size > 1:
        op.space.unify(inside[1], weight[1])
        op.state.record_role(op["weight"], weight[1], "consumes")
    op.state.record_role(op["weight"], outside[0], "scales")
    op.state.record_role(op["weight"], outside[1], "produces")
    op.resize("groups", inside[0], lambda keep: keep.size(inside[0]))
    return weight[0]


# Experts
@axis_rule("aten::_grouped_mm", "aten::grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(op: Op) -> Axes:
    """Rows of x, sorted by group, times one matrix a group: [tokens, K] x [groups, K, N] ->
    [tokens, N]."""
    x, weight, *rest = op.tensors()
    rows = op.axes(x)
    matrices = op.axes(weight)
    if len(rows) != 2 or len(matrices) != 3:
        op.lock([*rows, *matrices], "a grouped product of an unknown form")
        return op.make_fresh_axes(lock="a grouped product of an unknown form")
    op.space.unify(rows[1], matrices[1])
    op.state.record_role(weight, matrices[1], "consumes")
    op.state.record_role(weight, matrices[2], "produces")
    op.space.mark(matrices[0], "experts")
    if rest:
        op.space.unify(op.axes(rest[0])[0], matrices[0])
    return [rows[0], matrices[2]]


@axis_rule("aten::cdist", "aten::_cdist_forward")
def cdist(op: Op) -> Axes:
    """Distances of all pairs: the axis that a distance runs over is locked."""
    a = op.axes(op["x1"])
    b = op.axes(op["x2"])
    op.lock([a[-1], b[-1]], "a distance runs over it")
    return op.make_fresh_axes(lock="a distance")
