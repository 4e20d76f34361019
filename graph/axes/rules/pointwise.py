"""Ops that act position by position, broadcasting."""

import torch
from torch import fx

from secateur.graph.axes.rules.base import Axes, Op, axis_rule

# The identity on values, whatever it does to dtype, layout or autograd: an index tensor still
# counts along its axis.
IDENTITY = tuple(
    """
        to _to_copy contiguous clone alias detach dropout feature_dropout alpha_dropout copy
        lift_fresh lift_fresh_copy float half bool requires_grad positive conj resolve_conj
        resolve_neg type long int
        """.split()
)

# Pointwise in fact, but without the tag in at least one of the supported torch versions.
UNTAGGED = """
    where masked_fill clamp clamp_min clamp_max clip lerp addcmul addcdiv softplus log_sigmoid
    relu6 leaky_relu celu selu elu hardtanh hardswish hardsigmoid mish threshold zeros_like
    ones_like empty_like full_like rand_like randn_like fill zero bernoulli uniform normal
    nan_to_num __and__ __or__ __xor__ __rshift__ __lshift__ isnan isinf rsub true_divide
    floor_divide remainder fmod polar complex real imag view_as_real_copy square logit float_power
    xlogy logical_and logical_or logical_not logical_xor silu gelu atan2 rrelu prelu_kernel
    native_dropout multiply subtract divide negative absolute greater greater_equal less
    less_equal not_equal fix clamp_ arccos arctan erfc erfinv sinh cosh heaviside
    threshold_backward hardshrink softshrink tanhshrink softsign
"""

POINTWISE_NAMES = (*IDENTITY, *UNTAGGED.split())
_ADDS = {"add", "sub", "rsub"}


@axis_rule("tag::pointwise", *(f"aten::{name}" for name in POINTWISE_NAMES))
def pointwise(op: Op) -> list[Axes] | Axes:
    """Every op of the tag pointwise: axes aligned at the right are tied."""
    operands = list(op.tensors())
    if op.name in IDENTITY:
        op.set_domain(op.index_domain(operands[0]))
    if isinstance(op.value, (tuple, list)):
        value = op.value[0]
    else:
        value = op.value
    axes = [op.axes(x) for x in operands]
    out = op.broadcast(axes, len(value.shape))
    if not all(map(op.state.comes_from_parameters, operands)):
        for operand, own in zip(operands, axes, strict=True):
            for axis in own:
                op.state.record_role(operand, axis, "produces" if op.name in _ADDS else "scales")
            if op.name in _ADDS and len(operands) > 1 and _is_fixed_table(op, operand):
                op.lock([axis for axis in own if axis.size > 1], "a fixed table is added to it")
    if isinstance(op.value, (tuple, list)):
        return [out, list(out)]
    return out


_LOOKUPS = (
    *IDENTITY,
    *"index index_select embedding slice select unsqueeze squeeze expand view reshape".split(),
)


def _is_fixed_table(op: Op, node: fx.Node) -> bool:
    """Whether a value is read from a table that is no parameter, such as sinusoidal positions:
    zeroing the weights of a unit would leave it there, and a smaller model of the same class would
    compute another table."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.name.split("::")[1].rstrip("_") not in _LOOKUPS:
            return False
        node = node.args[0]  # type: ignore[assignment]
    table = op.state.constant_value(node)
    return table is not None and table.is_floating_point() and table.dim() > 1


@axis_rule("aten::type_as")
def type_as(op: Op) -> Axes:
    """The dtype of another tensor: axes and domain stay."""
    op.set_domain(op.index_domain(op["self"]))
    return op.axes(op["self"])


@axis_rule("aten::tril", "aten::triu")
def triangle(op: Op) -> Axes:
    """A triangle of a matrix: its two axes are locked."""
    axes = op.axes(op["self"])
    op.lock(axes[-2:], "a triangle is cut by position")
    return axes


@axis_rule("aten::prelu")
def prelu(op: Op) -> Axes:
    """A slope for each channel: tied to axis 1."""
    axes = op.axes(op["self"])
    weight = op.axes(op["weight"])
    if weight and weight[0].size > 1:
        op.space.unify(weight[0], axes[1])
        op.state.record_role(op["weight"], weight[0], "scales")
    return axes


@axis_rule("aten::view_as_complex")
def view_as_complex(op: Op) -> Axes:
    """[..., 2] as complex numbers: the last axis goes, locked."""
    axes = op.axes(op["self"])
    op.lock(axes[-1:], "real and imaginary part")
    return axes[:-1]


@axis_rule("aten::view_as_real")
def view_as_real(op: Op) -> Axes:
    """Complex numbers as [..., 2]: a locked axis is added."""
    return [*op.axes(op["self"]), op.space.make_locked_leaf(2, "real and imaginary part")]


@axis_rule("aten::glu")
def glu(op: Op) -> Axes:
    """One half gates the other: the halves of an axis are tied."""
    axes = op.axes(op["self"])
    dim = op.dim(len(axes))
    halves = op.space.split_concat(axes[dim], [axes[dim].size // 2] * 2)
    if halves is None:
        op.lock([axes[dim]], "halves do not align")
        axes[dim] = op.space.make_locked_leaf(axes[dim].size // 2, "halves do not align")
        return axes
    op.space.unify(*halves)
    axes[dim] = halves[0]
    return axes
