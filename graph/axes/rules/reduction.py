"""Ops that read a whole axis at once: norms, softmax, sums, extrema.

Dropping units of such an axis changes what the op averages over.  ``sum``, ``mean``, ``var``, norms
and softmax have a meaning with fewer units (the dropped ones are absent, see ``graph.masked``) and
leave a mark; an extremum or a product is locked unless its input is a softmax over that axis, where
a dropped unit counts as the zero that it would be.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from secateur.graph.axes.atoms import Atom
from secateur.graph.axes.rules.base import Axes, Op, Value, axis_rule
from secateur.graph.axes.rules.pointwise import IDENTITY

_SOFT = (
    "sum mean var std var_mean std_mean logsumexp norm linalg_vector_norm count_nonzero nansum"
).split()
_HARD = "amax amin max min argmax argmin prod any all median aminmax nanmedian mode".split()


@axis_rule(*(f"aten::{n}" for n in _SOFT))
def reduce(op: Op) -> Value:
    """Sums and means: an absent unit adds nothing, so that the axis stays free."""
    return _drop_reduced_axes(op, lambda axis: op.space.mark(axis, f"reduced by {op.name}"))


@axis_rule(*(f"aten::{n}" for n in _HARD))
def extremum(op: Op) -> Value:
    """Choices among the entries of an axis: locked, but after a softmax."""
    if op.first_argument("dim") is None and len(list(op.tensors())) == 2:  # maximum of two tensors
        return op.broadcast([op.axes(x) for x in op.tensors()], len(op.value.shape))
    return _drop_reduced_axes(op, lambda axis: lock_unless_softmax(op, axis))


def lock_unless_softmax(op: Op, axis: Atom) -> None:
    """A choice among units is the same without the dropped ones only if a dropped one could not be
    chosen."""
    if not _is_softmax(op.first_argument("self", "input")):
        op.lock(
            [axis], f"{op.name} chooses among its units, and a zeroed unit could still be chosen"
        )


def _is_softmax(node: fx.Node) -> bool:
    """Whether a value is a softmax, seen through casts and views."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[1]
        if name in ("softmax", "_softmax", "_safe_softmax"):
            return True
        if name not in (*IDENTITY, "view", "reshape", "flatten", "unsqueeze", "squeeze"):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return False


def _drop_reduced_axes(op: Op, note: Callable[[Atom], None]) -> Value:
    axes = op.axes(op.first_argument("self", "input"))
    given = op.first_argument("dim", "dims")
    if isinstance(given, (list, tuple)):
        dims = list(given)
    elif given is None:
        dims = []
    else:
        dims = [given]
    if dims:
        reduced = {d % len(axes) for d in dims}
    else:
        reduced = set(range(len(axes)))
    for d in reduced:
        if axes[d].size > 1:
            note(axes[d])
    out = [axis for d, axis in enumerate(axes) if d not in reduced]
    if op.first_argument("keepdim"):
        out = [Atom(1) if d in reduced else axis for d, axis in enumerate(axes)]
    several = isinstance(op.value, (tuple, list))
    if op.name in ("max", "min", "argmax", "argmin", "median", "mode") and dims:
        op.set_domain(axes[dims[0] % len(axes)], 1 if several else None)
    if several:
        return [list(out) for _ in op.value]
    return out


# Softmax and running sums
@axis_rule(
    *(f"aten::{n}" for n in "softmax _softmax log_softmax _log_softmax _safe_softmax".split())
)
def softmax(op: Op) -> Axes:
    """An axis on which an absent unit is worth minus infinity."""
    axes = op.axes(op["self"])
    op.space.mark(axes[op.dim(len(axes))], "softmax")
    return axes


@axis_rule("aten::cumsum")
def cumsum(op: Op) -> Axes:
    """Running sums: an absent unit adds nothing."""
    axes = op.axes(op["self"])
    op.space.mark(axes[op.dim(len(axes))], "running sum")
    return axes


@axis_rule("aten::cumprod", "aten::logcumsumexp")
def tie_running_reduction(op: Op) -> Axes:
    """Running products and the like: the axis is locked."""
    axes = op.axes(op["self"])
    op.lock([axes[op.dim(len(axes))]], f"{op.name} runs over it")
    return axes


@axis_rule("aten::cummax", "aten::cummin")
def running_extremum(op: Op) -> Value:
    """Running maxima and minima: the axis is locked."""
    axes = op.axes(op["self"])
    op.lock([axes[op.dim(len(axes))]], f"{op.name} runs over it")
    return [axes, list(axes)]


@axis_rule("aten::diff")
def diff(op: Op) -> Axes:
    """Differences of neighbours: the axis is locked."""
    axes = op.axes(op["self"])
    dim = op.dim(len(axes))
    op.lock([axes[dim]], "neighbours are subtracted")
    axes[dim] = op.make_fresh_axes(lock="neighbours are subtracted")[dim]
    return axes


@axis_rule(
    *(
        f"aten::{n}"
        for n in "fft_fft fft_ifft fft_fft2 fft_fftn fft_rfft fft_irfft "
        "fft_rfft2 fft_irfft2".split()
    )
)
def fourier(op: Op) -> Axes:
    """Fourier transforms: all axes are locked."""
    op.lock(op.axes(op["self"]), "a Fourier transform runs over it")
    return op.make_fresh_axes(lock="a Fourier transform runs over it")


# Norms
@axis_rule("aten::layer_norm", "aten::rms_norm", "aten::native_layer_norm", "aten::_fused_rms_norm")
def norm(op: Op) -> Value:
    """Norms over the last axes: weight and bias are tied to them, and scale."""
    axes = op.axes(op["input"])
    own = axes[len(axes) - len(op["normalized_shape"]) :]
    for name in ("weight", "bias"):
        parameter = op.first_argument(name)
        for mine, theirs in zip(op.axes(parameter), own, strict=False):
            op.space.unify(mine, theirs)
            op.state.record_role(parameter, mine, "scales")
    for axis in own:
        op.space.mark(axis, "normalized")
    op.resize_list("normalized_shape", own)
    if isinstance(op.value, (tuple, list)):
        return [axes, *(op.make_fresh_axes(extra) for extra in op.value[1:])]
    return axes


@axis_rule(
    "aten::batch_norm", "aten::native_batch_norm", "aten::_native_batch_norm_legit_no_training"
)
def batch_norm(op: Op) -> Value:
    """Statistics of each channel: tied to axis 1."""
    axes = op.axes(op["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        for mine in op.axes(op.first_argument(name)):
            op.space.unify(mine, axes[1])
            op.state.record_role(op[name], mine, "scales")
    if isinstance(op.value, (tuple, list)):
        return [axes, *(op.make_fresh_axes(extra) for extra in op.value[1:])]
    return axes


@axis_rule("aten::group_norm")
def group_norm(op: Op) -> Axes:
    """Norms of groups of channels: whole groups can go."""
    axes = op.axes(op["input"])
    for name in ("weight", "bias"):
        for mine in op.axes(op[name]):
            op.space.unify(mine, axes[1])
            op.state.record_role(op[name], mine, "scales")
    parts = op.space.split_product(axes[1], [op["num_groups"], axes[1].size // op["num_groups"]])
    if parts is None:
        op.lock([axes[1]], "norm groups cut across its units")
        return axes
    op.space.mark(parts[1], "normalized")
    op.resize("num_groups", parts[0], lambda keep: keep.size(parts[0]))
    return axes


@axis_rule("aten::instance_norm")
def by_channel(op: Op) -> Axes:
    """Norms of an instance: locked."""
    axes = op.axes(op.first_argument("input", "self"))
    op.lock(axes, f"{op.name} runs over it")
    return op.make_fresh_axes(lock=f"{op.name} runs over it")


# Pooling and resizing of spatial axes
_POOLS = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool".split()
_RESIZES = (
    "upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_linear1d"
).split()


@axis_rule(
    *(f"aten::{n}{d}d" for n in _POOLS for d in (1, 2, 3)),
    *(f"aten::{n}" for n in _RESIZES),
    "aten::max_pool2d_with_indices",
    "aten::_adaptive_avg_pool2d",
    "aten::_upsample_bilinear2d_aa",
    "aten::_upsample_bicubic2d_aa",
)
def pool(op: Op) -> Value:
    """Pooling and resizing: spatial axes are locked, the others pass."""
    axes = op.axes(op.first_argument("self", "input"))
    if "1d" in op.name:
        spatial = 1
    elif "3d" in op.name:
        spatial = 3
    else:
        spatial = 2
    several = isinstance(op.value, (tuple, list))
    outs = []
    for value in op.value if several else (op.value,):
        out = op.make_fresh_axes(value, lock="a spatial axis")
        out[:-spatial] = axes[:-spatial]
        outs.append(out)
    op.lock(axes[-spatial:], "a spatial axis")
    if several:
        return list(outs)
    return outs[0]
