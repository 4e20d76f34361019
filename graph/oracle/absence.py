"""What each op means when some entries are absent: the semantics of the oracle, in terms of values
alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from secateur.graph.axes.rules import get_arg
from secateur.graph.axes.rules.factory import SILENT
from secateur.graph.axes.rules.pointwise import POINTWISE_NAMES
from secateur.graph.errors import UnsupportedOp

Tensor = torch.Tensor
Handler = Callable[["Call"], Any]
aten = torch.ops.aten


class Masked:
    """A tensor and which of its entries are absent; absent entries hold zero.

    A view's mask is a view of its base's mask, so that writing in place through either is seen by
    both.
    """

    __slots__ = ("absent", "value")

    def __init__(self, value: Tensor, absent: Tensor | None = None, *, clean: bool = False) -> None:
        if absent is None:
            self.absent = torch.zeros(value.shape, dtype=torch.bool)
        else:
            self.absent = absent
        fill = (
            not clean and absent is not None and (value.is_floating_point() or value.is_complex())
        )
        if fill and self.any_absent:
            self.value = value.masked_fill(self.absent, 0)
        else:
            self.value = value

    @property
    def any_absent(self) -> bool:
        """Whether any entry is absent."""
        return bool(self.absent.any())

    def fill_absent(self, number: float) -> Tensor:
        """The value with a number where entries are absent.

        Args:
            number: for floating values; others stay as they are.
        """
        if self.value.is_floating_point():
            return self.value.masked_fill(self.absent, number)
        return self.value

    def presence(self) -> Tensor:
        """1.0 where present: what contractions count."""
        return (~self.absent).to(torch.float32)

    def write_absence(self, other: Masked) -> Masked:
        """Take over another's absence in place: an op has written into this tensor."""
        self.absent.copy_(other.absent)
        if self.value.is_floating_point():
            self.value.masked_fill_(self.absent, 0)
        return self


class Call:
    """One call: its node, Masked operands by argument name, and the plain run of the op."""

    def __init__(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.node, self.args, self.kwargs = node, args, kwargs
        self.names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        self.bound = dict(zip(self.names, args, strict=False)) | kwargs

    def __getitem__(self, name: str) -> Any:
        if name in self.bound:
            return self.bound[name]
        return get_arg(self.node, name)

    def run_with(self, change: Callable[[Masked], Any], **replaced: Any) -> Any:
        """The op over ``change(operand)`` for every tensor operand."""
        args = [replaced.pop(n, a) for n, a in zip(self.names, self.args, strict=False)]
        kwargs = self.kwargs | replaced
        target = aten.reshape.default if self.node.target is aten.view.default else self.node.target
        return target(*map_masked(args, change), **map_masked(kwargs, change))  # type: ignore[operator]

    def masked_operands(self) -> list[Masked]:
        """All tensor operands, in order."""
        found: list[Masked] = []
        map_masked([list(self.args), self.kwargs], lambda m: found.append(m))
        return found

    def run_plain(self) -> Any:
        """The op over the plain values."""
        return self.run_with(lambda m: m.value)


def map_masked(value: Any, change: Callable[[Masked], Any]) -> Any:
    """A structure with every Masked in it changed.

    Args:
        value: Masked, lists, tuples and dicts of them, or anything else.
        change: gets each Masked.
    """
    if isinstance(value, Masked):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_masked(v, change) for v in value)
    if isinstance(value, dict):
        return {k: map_masked(v, change) for k, v in value.items()}
    return value


# Meanings, one function a class of ops
def run_plainly(call: Call) -> Any:
    """The meaning of ops that absence passes by: the result is wholly present.

    Args:
        call: of the graph.
    """
    return _wrap_result(call.run_plain())


def _wrap_result(result: Any, absent: Any = None, *, clean: bool = False) -> Any:
    if isinstance(result, (list, tuple)):
        if isinstance(absent, (list, tuple)):
            masks = absent
        else:
            masks = [absent] * len(result)
        return [_wrap_result(r, a, clean=clean) for r, a in zip(result, masks, strict=True)]
    if isinstance(result, Tensor):
        return Masked(result, absent, clean=clean)
    return result


def _handle_move(call: Call) -> Any:
    """The op moves entries: it moves their absence alike.  Integer operands without absence are
    indices."""
    result = call.run_plain()
    operands = call.masked_operands()
    if not operands[0].value.is_floating_point() and not any(m.any_absent for m in operands):
        return _wrap_result(result)
    if "value" in call.bound and not isinstance(call["value"], Masked):
        replaced = {"value": 0}
    else:
        replaced = {}
    masks = call.run_with(lambda m: m.absent if _is_values(m, operands[0]) else m.value, **replaced)
    return _wrap_result(result, masks, clean=True)


def _handle_pad(call: Call) -> Any:
    """A new entry is absent where the whole line that it prolongs is."""
    m = call.masked_operands()[0]
    widths = call["pad"]
    dims = []
    for i in range(len(widths) // 2):
        if widths[2 * i] or widths[2 * i + 1]:
            dims.append(m.value.dim() - 1 - i)
    result = call.run_plain()
    if dims:
        line = m.absent.all(dim=tuple(dims), keepdim=True)
    else:
        line = m.absent
    inside = torch.nn.functional.pad(m.absent, list(widths), value=False)
    return Masked(result, inside | line.expand(result.shape))


def _is_values(m: Masked, first: Masked) -> bool:
    return m is first or m.value.is_floating_point() or m.value.is_complex() or m.any_absent


def handle_pointwise(call: Call) -> Any:
    """A result is absent where any operand is."""
    result = call.run_plain()
    if isinstance(result, (tuple, list)):
        shape = result[0].shape
    else:
        shape = result.shape
    masks = []
    for m in call.masked_operands():
        if m.any_absent:
            masks.append(m.absent.expand(shape))
    absent = None
    if masks:
        absent = functools.reduce(torch.logical_or, masks)
    return _wrap_result(result, absent)


def _reduced_dims(call: Call, rank: int) -> list[int]:
    given = None
    if "dim" in call.names:
        given = call["dim"]
    if isinstance(given, (list, tuple)):
        dims = given
    elif given is None:
        dims = []
    else:
        dims = [given]
    return [d % rank for d in dims] or list(range(rank))


def _all_absent(call: Call, m: Masked) -> Tensor | None:
    if "keepdim" in call.names:
        keepdim = bool(call["keepdim"])
    else:
        keepdim = False
    if m.any_absent:
        return _all_absent_over(m.absent.all, _reduced_dims(call, m.value.dim()), keepdim)
    return None


def _all_absent_over(reduce: Callable[..., Tensor], dims: Sequence[int], keepdim: bool) -> Tensor:
    out: Tensor = reduce(dim=tuple(dims), keepdim=keepdim)
    return out


def _handle_sum(call: Call) -> Any:
    return _wrap_result(call.run_plain(), _all_absent(call, call.masked_operands()[0]))


def _handle_mean(call: Call) -> Any:
    m = call.masked_operands()[0]
    if not m.any_absent:
        return run_plainly(call)
    dims = _reduced_dims(call, m.value.dim())
    keepdim = bool(call["keepdim"])
    count = m.presence().sum(dims, keepdim=keepdim).clamp(min=1)
    return Masked(
        m.value.sum(dims, keepdim=keepdim) / count.to(m.value.dtype), _all_absent(call, m)
    )


def _handle_variance(call: Call) -> Any:
    m = call.masked_operands()[0]
    if not m.any_absent:
        return run_plainly(call)
    dims = _reduced_dims(call, m.value.dim())
    keepdim = bool(call["keepdim"])
    if "correction" in call.names:
        correction = call["correction"]
    else:
        correction = int(bool(call["unbiased"]))
    if correction is None:
        correction = 1
    else:
        correction = correction
    count = m.presence().sum(dims, keepdim=True)
    spread = Masked(
        m.value - m.value.sum(dims, keepdim=True) / count.clamp(min=1), m.absent
    ).value.square()
    denominator = (count - correction).clamp(min=1)
    var = spread.sum(dims, keepdim=True) / denominator
    if keepdim:
        var = var
    else:
        var = var.squeeze(dims)
    return Masked(var.sqrt() if "std" in str(call.node.target) else var, _all_absent(call, m))


def _handle_maximum(call: Call) -> Any:
    """Absent entries cannot win a maximum (or be among the top k)."""
    if "other" in call.names:
        return handle_pointwise(call)
    m = call.masked_operands()[0]
    result = call.run_with(lambda x: x.fill_absent(float("-inf")))
    if not m.any_absent or not isinstance(result, (tuple, list)):
        return _wrap_result(result, _all_absent(call, m))
    absent = m.absent.gather(call["dim"], result[1]) if "k" in call.names else _all_absent(call, m)
    return [Masked(result[0], absent), Masked(result[1])]


def _handle_minimum(call: Call) -> Any:
    if "other" in call.names:
        return handle_pointwise(call)
    return _wrap_result(
        call.run_with(lambda x: x.fill_absent(float("inf"))),
        _all_absent(call, call.masked_operands()[0]),
    )


def _handle_softmax(call: Call) -> Any:
    m = call.masked_operands()[0]
    return Masked(call.run_with(lambda x: x.fill_absent(float("-inf"))).nan_to_num(0.0), m.absent)


def _needs_presence(call: Call) -> Any:
    if any(m.any_absent for m in call.masked_operands()):
        raise UnsupportedOp(
            f"{call.node.target} ({call.node.name}) has no meaning with absent entries"
        )
    return run_plainly(call)


# Products
def _handle_contraction(call: Call) -> Any:
    """A result is absent where no pair of present factors meets (and no present bias is added)."""
    result = call.run_plain()
    if not any(m.any_absent for m in call.masked_operands()):
        return _wrap_result(result)
    bias = call.bound.get("bias")
    if "bias" in call.bound:
        removed: dict[str, Any] = {"bias": None}
    else:
        removed = {}
    counts = call.run_with(Masked.presence, **removed)
    absent = counts == 0
    if isinstance(bias, Masked):
        if "conv" in call.node.name:
            shape = [-1] + [1] * (result.dim() - 2)
        else:
            shape = [-1]
        absent = absent & bias.absent.reshape(shape)
    return Masked(result, absent)


def _handle_addmm(call: Call) -> Any:
    result = call.run_plain()
    if not any(m.any_absent for m in call.masked_operands()):
        return _wrap_result(result)
    bias, a, b = call.masked_operands()
    return Masked(result, (a.presence() @ b.presence() == 0) & bias.absent)


def _handle_attention(call: Call) -> Any:
    """A head's channel is absent with its value's channel; a head without any query channel is
    absent too."""
    query = call["query"]
    value = call["value"]
    result = call.run_plain()
    gone = value.absent.all(dim=-2, keepdim=True)
    if result.dim() > 2:
        repeat = result.shape[-3] // gone.shape[-3]
    else:
        repeat = 1
    if repeat > 1:
        gone = gone.repeat_interleave(repeat, dim=-3)
    else:
        gone = gone
    return Masked(result, (gone | query.absent.all(dim=-1, keepdim=True)).expand(result.shape))


def _handle_grouped_mm(call: Call) -> Any:
    """Rows of x times their group's matrix; a channel is absent with all its weights in every
    present group."""
    x, weight = call.masked_operands()[:2]
    result = call.run_plain()
    whole = weight.absent.all(dim=1)  # [groups, N]
    groups = weight.absent.flatten(1).all(1)
    if bool((~groups).any()):
        channel = whole[~groups].all(0)
    else:
        channel = whole.all(0)
    return Masked(result, channel.expand(result.shape) | x.absent.all(1, keepdim=True))


# Norms
def _handle_norm(call: Call) -> Any:
    x = call["input"]
    if not x.any_absent:
        if isinstance(call.run_plain(), Tensor):
            return handle_pointwise(call)
        return run_plainly(call)
    dims = list(range(x.value.dim() - len(call["normalized_shape"]), x.value.dim()))
    count = x.presence().sum(dims, keepdim=True).clamp(min=1)
    value = x.value.float()
    eps = call["eps"]
    if "layer_norm" in call.node.target._schema.name:  # type: ignore[union-attr]
        value = Masked(value - value.sum(dims, keepdim=True) / count, x.absent).value
    if eps is None:
        eps = torch.finfo(x.value.dtype).eps
    else:
        eps = eps
    value = value * (value.square().sum(dims, keepdim=True) / count + eps).rsqrt()
    weight = call.bound.get("weight")
    bias = call.bound.get("bias")
    if weight is None:
        value = value
    else:
        value = value * weight.value
    if bias is None:
        value = value
    else:
        value = value + bias.value
    return Masked(value.to(x.value.dtype), x.absent)


def _group_norm(call: Call) -> Any:
    x = call["input"]
    if not x.any_absent:
        return run_plainly(call)
    shape = x.value.shape
    groups = call["num_groups"]
    split = Masked(x.value.reshape(shape[0], groups, -1), x.absent.reshape(shape[0], groups, -1))
    count = split.presence().sum(-1, keepdim=True).clamp(min=1)
    centred = Masked(split.value - split.value.sum(-1, keepdim=True) / count, split.absent).value
    value = centred * (centred.square().sum(-1, keepdim=True) / count + call["eps"]).rsqrt()
    value = value.reshape(shape)
    channel = [1, -1] + [1] * (len(shape) - 2)
    weight = call.bound.get("weight")
    bias = call.bound.get("bias")
    if weight is None:
        value = value
    else:
        value = value * weight.value.reshape(channel)
    if bias is None:
        value = value
    else:
        value = value + bias.value.reshape(channel)
    return Masked(value, x.absent)


def _by_channel(call: Call) -> Any:
    return _wrap_result(call.run_plain(), call["input"].absent)


def _handle_pool(call: Call) -> Any:
    """Pooling mixes positions of one channel, so a channel is absent as before."""
    m = call.masked_operands()[0]
    result = call.run_plain()
    if not m.any_absent:
        return _wrap_result(result)
    if "1d" in call.node.name:
        spatial = 1
    else:
        spatial = 2
    gone = m.absent.flatten(-spatial).all(-1).reshape(*m.absent.shape[:-spatial], *[1] * spatial)
    if isinstance(result, (tuple, list)):
        outs = result
    else:
        outs = [result]
    wrapped = [Masked(out, gone.expand(out.shape)) for out in outs]
    if isinstance(result, (tuple, list)):
        return wrapped
    return wrapped[0]


def _handle_complex(call: Call) -> Any:
    m = call.masked_operands()[0]
    return Masked(call.run_plain(), m.absent[..., 0], clean=True)


def _handle_real(call: Call) -> Any:
    m = call.masked_operands()[0]
    return Masked(call.run_plain(), m.absent[..., None].expand(*m.absent.shape, 2), clean=True)


def _split_names(text: str) -> list[str]:
    return text.split()


MEANINGS: dict[str, Handler] = {
    **dict.fromkeys(
        _split_names(
            """
            view reshape view_as reshape_as _unsafe_view view_copy _reshape_alias flatten
            unflatten squeeze unsqueeze permute t numpy_T transpose swapaxes swapdims mT movedim
            expand broadcast_to repeat tile repeat_interleave slice narrow select split
            split_with_sizes chunk tensor_split unsafe_split unsafe_chunk unbind cat concat
            concatenate stack roll flip embedding index _unsafe_index index_select gather
            take_along_dim index_put scatter slice_scatter select_scatter index_copy index_add
            scatter_add unfold as_strided diagonal
            """
        ),
        _handle_move,
    ),
    **dict.fromkeys(
        [*POINTWISE_NAMES, "copy", "tril", "triu", "prelu", "expand_as"], handle_pointwise
    ),
    **dict.fromkeys(_split_names("sum norm linalg_vector_norm cumsum nansum"), _handle_sum),
    **dict.fromkeys(
        _split_names("any all count_nonzero new_empty new_zeros new_ones new_full one_hot histc"),
        run_plainly,
    ),
    **dict.fromkeys(
        _split_names("zeros_like ones_like empty_like full_like rand_like randn_like"), run_plainly
    ),
    "cumsum": lambda call: _wrap_result(call.run_plain(), call.masked_operands()[0].absent),
    "mean": _handle_mean,
    **dict.fromkeys(_split_names("var std"), _handle_variance),
    **dict.fromkeys(_split_names("amax max argmax logsumexp topk"), _handle_maximum),
    **dict.fromkeys(_split_names("amin min argmin"), _handle_minimum),
    **dict.fromkeys(
        _split_names("softmax _softmax _safe_softmax log_softmax _log_softmax"), _handle_softmax
    ),
    **dict.fromkeys(
        _split_names(
            "linear matmul mm bmm mv dot einsum outer conv1d conv2d conv3d convolution "
            "conv_transpose1d"
        ),
        _handle_contraction,
    ),
    **dict.fromkeys(_split_names("addmm baddbmm"), _handle_addmm),
    "scaled_dot_product_attention": _handle_attention,
    **dict.fromkeys(_split_names("grouped_mm_fallback _grouped_mm grouped_mm"), _handle_grouped_mm),
    **dict.fromkeys(_split_names("layer_norm rms_norm"), _handle_norm),
    **dict.fromkeys(_split_names("constant_pad_nd pad"), _handle_pad),
    **dict.fromkeys(SILENT, run_plainly),
    "type_as": lambda call: Masked(call.run_plain(), call["self"].absent, clean=True),
    "group_norm": _group_norm,
    "batch_norm": _by_channel,
    **dict.fromkeys(
        _split_names(
            "max_pool1d avg_pool1d adaptive_avg_pool1d max_pool2d avg_pool2d adaptive_avg_pool2d"
        ),
        _handle_pool,
    ),
    "view_as_complex": _handle_complex,
    "view_as_real": _handle_real,
    **dict.fromkeys(
        _split_names("sort argsort diff cumprod cummax searchsorted bucketize nonzero glu"),
        _needs_presence,
    ),
}
