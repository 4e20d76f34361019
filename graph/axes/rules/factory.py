"""Ops that make tensors from sizes and literals, and ops without a tensor result."""

from __future__ import annotations

from secateur.graph.axes.rules.base import Axes, Op, axis_rule

_FILLED = "zeros ones full empty new_zeros new_ones new_full new_empty rand randn".split()
_COUNTED = "arange linspace logspace eye tril_indices triu_indices scalar_tensor tensor".split()
SILENT = """
    _assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range sym_size sym_numel
    sym_stride sym_constrain_range_for_size item _local_scalar_dense numel is_nonzero manual_seed
    """.split()


@axis_rule(*(f"aten::{n}" for n in _FILLED))
def tie_constant_fill(op: Op) -> Axes:
    """One value everywhere: the size argument follows the axes."""
    out = op.make_fresh_axes()
    op.resize_list("size", out)
    return out


@axis_rule(*(f"aten::{n}" for n in _COUNTED))
def tie_positional_fill(op: Op) -> Axes:
    """Values by position: an edit of such an axis selects the kept positions after the op."""
    out = op.make_fresh_axes()
    if (
        op.name == "arange"
        and op.first_argument("start") in (None, 0)
        and op.first_argument("step") in (None, 1)
    ):
        op.set_domain(out[0])
    op.state.generated.append(op.node)
    return out


@axis_rule(*(f"aten::{n}" for n in SILENT))
def ignore_result(op: Op) -> None:
    """An op whose result no other op reads as a tensor of axes."""
    return None
