"""What each op means when some entries are absent: the semantics of the oracle, in terms of values alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from secateur.graph.errors import UnsupportedOp
from secateur.graph.rules import get_arg
from secateur.graph.rules.factory import SILENT
from secateur.graph.rules.pointwise import POINTWISE_NAMES

Tensor = torch.Tensor
Handler = Callable[["Call"], Any]
aten = torch.ops.aten


class Masked:
    """A tensor and which of its entries are absent; absent entries hold zero.

    A view's mask is a view of its base's mask, so that writing in place through either is seen by both.
    """

    __slots__ = ("absent", "value")

    def __init__(self, value: Tensor, absent: Tensor | None = None, *, clean: bool = False) -> None:
        self.absent = torch.zeros(value.shape, dtype=torch.bool) if absent is None else absent
        fill = not clean and absent is not None and (value.is_floating_point() or value.is_complex())
        self.value = value.masked_fill(self.absent, 0) if fill and self.some else value

    @property
    def some(self) -> bool:
        """Whether any entry is absent."""
        return bool(self.absent.any())

    def filled(self, number: float) -> Tensor:
        return self.value.masked_fill(self.absent, number) if self.value.is_floating_point() else self.value

    def present(self) -> Tensor:
        """1.0 where present: what contractions count."""
        return (~self.absent).to(torch.float32)

    def write(self, other: Masked) -> Masked:
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
        return self.bound[name] if name in self.bound else get_arg(self.node, name)

    def run(self, change: Callable[[Masked], Any], **replaced: Any) -> Any:
        """The op over ``change(operand)`` for every tensor operand."""
        args = [replaced.pop(n, a) for n, a in zip(self.names, self.args, strict=False)]
        kwargs = self.kwargs | replaced
        target = aten.reshape.default if self.node.target is aten.view.default else self.node.target
        return target(*map_masked(args, change), **map_masked(kwargs, change))  # type: ignore[operator]

    def operands(self) -> list[Masked]:
        found: list[Masked] = []
        map_masked([list(self.args), self.kwargs], lambda m: found.append(m))
        return found

    def plain(self) -> Any:
        return self.run(lambda m: m.value)


def map_masked(value: Any, change: Callable[[Masked], Any]) -> Any:
    if isinstance(value, Masked):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_masked(v, change) for v in value)
    return {k: map_masked(v, change) for k, v in value.items()} if isinstance(value, dict) else value


# ---------------------------------------------------------------------- meanings, one function a class of ops
def plain(call: Call) -> Any:
    return _wrap(call.plain())


def _wrap(result: Any, absent: Any = None, *, clean: bool = False) -> Any:
    if isinstance(result, (list, tuple)):
        masks = absent if isinstance(absent, (list, tuple)) else [absent] * len(result)
        return [_wrap(r, a, clean=clean) for r, a in zip(result, masks, strict=True)]
    return Masked(result, absent, clean=clean) if isinstance(result, Tensor) else result


def _move(call: Call) -> Any:
    """The op moves entries: it moves their absence alike.  Integer operands without absence are indices."""
    result = call.plain()
    operands = call.operands()
    if not operands[0].value.is_floating_point() and not any(m.some for m in operands):
        return _wrap(result)
    replaced = {"value": 0} if "value" in call.bound and not isinstance(call["value"], Masked) else {}
    masks = call.run(lambda m: m.absent if _is_values(m, operands[0]) else m.value, **replaced)
    return _wrap(result, masks, clean=True)


def _pad(call: Call) -> Any:
    """A new entry is absent where the whole line that it prolongs is."""
    m, widths = call.operands()[0], call["pad"]
    dims = [m.value.dim() - 1 - i for i in range(len(widths) // 2) if widths[2 * i] or widths[2 * i + 1]]
    result = call.plain()
    line = m.absent.all(dim=tuple(dims), keepdim=True) if dims else m.absent
    inside = torch.nn.functional.pad(m.absent, list(widths), value=False)
    return Masked(result, inside | line.expand(result.shape))


def _is_values(m: Masked, first: Masked) -> bool:
    return m is first or m.value.is_floating_point() or m.value.is_complex() or m.some


def pointwise(call: Call) -> Any:
    """A result is absent where any operand is."""
    result = call.plain()
    shape = result[0].shape if isinstance(result, (tuple, list)) else result.shape
    masks = [m.absent.expand(shape) for m in call.operands() if m.some]
    absent = functools.reduce(torch.logical_or, masks) if masks else None
    return _wrap(result, absent)


def _dims(call: Call, rank: int) -> list[int]:
    given = call["dim"] if "dim" in call.names else None
    dims = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    return [d % rank for d in dims] or list(range(rank))


def _all_absent(call: Call, m: Masked) -> Tensor | None:
    keepdim = bool(call["keepdim"]) if "keepdim" in call.names else False
    return _over(m.absent.all, _dims(call, m.value.dim()), keepdim) if m.some else None


def _over(reduce: Callable[..., Tensor], dims: Sequence[int], keepdim: bool) -> Tensor:
    out: Tensor = reduce(dim=tuple(dims), keepdim=keepdim)
    return out


def _sum(call: Call) -> Any:
    return _wrap(call.plain(), _all_absent(call, call.operands()[0]))


def _mean(call: Call) -> Any:
    m = call.operands()[0]
    if not m.some:
        return plain(call)
    dims, keepdim = _dims(call, m.value.dim()), bool(call["keepdim"])
    count = m.present().sum(dims, keepdim=keepdim).clamp(min=1)
    return Masked(m.value.sum(dims, keepdim=keepdim) / count.to(m.value.dtype), _all_absent(call, m))


def _var(call: Call) -> Any:
    m = call.operands()[0]
    if not m.some:
        return plain(call)
    dims, keepdim = _dims(call, m.value.dim()), bool(call["keepdim"])
    correction = call["correction"] if "correction" in call.names else int(bool(call["unbiased"]))
    correction = 1 if correction is None else correction
    count = m.present().sum(dims, keepdim=True)
    spread = Masked(m.value - m.value.sum(dims, keepdim=True) / count.clamp(min=1), m.absent).value.square()
    denominator = (count - correction).clamp(min=1)
    var = spread.sum(dims, keepdim=True) / denominator
    var = var if keepdim else var.squeeze(dims)
    return Masked(var.sqrt() if "std" in str(call.node.target) else var, _all_absent(call, m))


def _highest(call: Call) -> Any:
    """Absent entries cannot win a maximum (or be among the top k)."""
    if "other" in call.names:
        return pointwise(call)
    m = call.operands()[0]
    result = call.run(lambda x: x.filled(float("-inf")))
    if not m.some or not isinstance(result, (tuple, list)):
        return _wrap(result, _all_absent(call, m))
    absent = m.absent.gather(call["dim"], result[1]) if "k" in call.names else _all_absent(call, m)
    return [Masked(result[0], absent), Masked(result[1])]


def _lowest(call: Call) -> Any:
    if "other" in call.names:
        return pointwise(call)
    return _wrap(call.run(lambda x: x.filled(float("inf"))), _all_absent(call, call.operands()[0]))


def _softmax(call: Call) -> Any:
    m = call.operands()[0]
    return Masked(call.run(lambda x: x.filled(float("-inf"))).nan_to_num(0.0), m.absent)


def _needs_presence(call: Call) -> Any:
    if any(m.some for m in call.operands()):
        raise UnsupportedOp(f"{call.node.target} ({call.node.name}) has no meaning with absent entries")
    return plain(call)


# ---------------------------------------------------------------------- products
def _contract(call: Call) -> Any:
    """A result is absent where no pair of present factors meets (and no present bias is added)."""
    result = call.plain()
    if not any(m.some for m in call.operands()):
        return _wrap(result)
    bias = call.bound.get("bias")
    removed: dict[str, Any] = {"bias": None} if "bias" in call.bound else {}
    counts = call.run(Masked.present, **removed)
    absent = counts == 0
    if isinstance(bias, Masked):
        shape = [-1] + [1] * (result.dim() - 2) if "conv" in call.node.name else [-1]
        absent = absent & bias.absent.reshape(shape)
    return Masked(result, absent)


def _addmm(call: Call) -> Any:
    result = call.plain()
    if not any(m.some for m in call.operands()):
        return _wrap(result)
    bias, a, b = call.operands()
    return Masked(result, (a.present() @ b.present() == 0) & bias.absent)


def _attention(call: Call) -> Any:
    """A head's channel is absent with its value's channel; a head without any query channel is absent too."""
    query, value = call["query"], call["value"]
    result = call.plain()
    gone = value.absent.all(dim=-2, keepdim=True)
    repeat = result.shape[-3] // gone.shape[-3] if result.dim() > 2 else 1
    gone = gone.repeat_interleave(repeat, dim=-3) if repeat > 1 else gone
    return Masked(result, (gone | query.absent.all(dim=-1, keepdim=True)).expand(result.shape))


def _grouped_mm(call: Call) -> Any:
    """Rows of x times their group's matrix; a channel is absent with all its weights in every present group."""
    x, weight = call.operands()[:2]
    result = call.plain()
    whole = weight.absent.all(dim=1)  # [groups, N]
    groups = weight.absent.flatten(1).all(1)
    channel = whole[~groups].all(0) if bool((~groups).any()) else whole.all(0)
    return Masked(result, channel.expand(result.shape) | x.absent.all(1, keepdim=True))


# ---------------------------------------------------------------------- norms
def _norm(call: Call) -> Any:
    x = call["input"]
    if not x.some:
        return pointwise(call) if isinstance(call.plain(), Tensor) else plain(call)
    dims = list(range(x.value.dim() - len(call["normalized_shape"]), x.value.dim()))
    count = x.present().sum(dims, keepdim=True).clamp(min=1)
    value, eps = x.value.float(), call["eps"]
    if "layer_norm" in call.node.target._schema.name:  # type: ignore[union-attr]
        value = Masked(value - value.sum(dims, keepdim=True) / count, x.absent).value
    eps = torch.finfo(x.value.dtype).eps if eps is None else eps
    value = value * (value.square().sum(dims, keepdim=True) / count + eps).rsqrt()
    weight, bias = call.bound.get("weight"), call.bound.get("bias")
    value = value if weight is None else value * weight.value
    value = value if bias is None else value + bias.value
    return Masked(value.to(x.value.dtype), x.absent)


def _group_norm(call: Call) -> Any:
    x = call["input"]
    if not x.some:
        return plain(call)
    shape, groups = x.value.shape, call["num_groups"]
    split = Masked(x.value.reshape(shape[0], groups, -1), x.absent.reshape(shape[0], groups, -1))
    count = split.present().sum(-1, keepdim=True).clamp(min=1)
    centred = Masked(split.value - split.value.sum(-1, keepdim=True) / count, split.absent).value
    value = centred * (centred.square().sum(-1, keepdim=True) / count + call["eps"]).rsqrt()
    value, channel = value.reshape(shape), [1, -1] + [1] * (len(shape) - 2)
    weight, bias = call.bound.get("weight"), call.bound.get("bias")
    value = value if weight is None else value * weight.value.reshape(channel)
    value = value if bias is None else value + bias.value.reshape(channel)
    return Masked(value, x.absent)


def _by_channel(call: Call) -> Any:
    return _wrap(call.plain(), call["input"].absent)


def _pool(call: Call) -> Any:
    """Pooling mixes positions of one channel, so a channel is absent as before."""
    m = call.operands()[0]
    result = call.plain()
    if not m.some:
        return _wrap(result)
    spatial = 1 if "1d" in call.node.name else 2
    gone = m.absent.flatten(-spatial).all(-1).reshape(*m.absent.shape[:-spatial], *[1] * spatial)
    outs = result if isinstance(result, (tuple, list)) else [result]
    wrapped = [Masked(out, gone.expand(out.shape)) for out in outs]
    return wrapped if isinstance(result, (tuple, list)) else wrapped[0]


def _complex(call: Call) -> Any:
    m = call.operands()[0]
    return Masked(call.plain(), m.absent[..., 0], clean=True)


def _real(call: Call) -> Any:
    m = call.operands()[0]
    return Masked(call.plain(), m.absent[..., None].expand(*m.absent.shape, 2), clean=True)


def _names(text: str) -> list[str]:
    return text.split()


MEANINGS: dict[str, Handler] = {
    **dict.fromkeys(
        _names("""view reshape view_as reshape_as _unsafe_view view_copy _reshape_alias flatten unflatten squeeze
        unsqueeze permute t numpy_T transpose swapaxes swapdims mT movedim expand broadcast_to repeat tile
        repeat_interleave slice narrow select split split_with_sizes chunk tensor_split unsafe_split
        unsafe_chunk unbind cat concat concatenate stack roll flip embedding index _unsafe_index
        index_select gather take_along_dim index_put scatter slice_scatter select_scatter index_copy
        index_add scatter_add unfold as_strided diagonal"""),
        _move,
    ),
    **dict.fromkeys([*POINTWISE_NAMES, "copy", "tril", "triu", "prelu", "expand_as"], pointwise),
    **dict.fromkeys(_names("sum norm linalg_vector_norm cumsum nansum"), _sum),
    **dict.fromkeys(_names("any all count_nonzero new_empty new_zeros new_ones new_full one_hot histc"), plain),
    **dict.fromkeys(_names("zeros_like ones_like empty_like full_like rand_like randn_like"), plain),
    "cumsum": lambda call: _wrap(call.plain(), call.operands()[0].absent),
    "mean": _mean,
    **dict.fromkeys(_names("var std"), _var),
    **dict.fromkeys(_names("amax max argmax logsumexp topk"), _highest),
    **dict.fromkeys(_names("amin min argmin"), _lowest),
    **dict.fromkeys(_names("softmax _softmax _safe_softmax log_softmax _log_softmax"), _softmax),
    **dict.fromkeys(
        _names("linear matmul mm bmm mv dot einsum outer conv1d conv2d conv3d convolution conv_transpose1d"), _contract
    ),
    **dict.fromkeys(_names("addmm baddbmm"), _addmm),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(_names("grouped_mm_fallback _grouped_mm grouped_mm"), _grouped_mm),
    **dict.fromkeys(_names("layer_norm rms_norm"), _norm),
    **dict.fromkeys(_names("constant_pad_nd pad"), _pad),
    **dict.fromkeys(SILENT, plain),
    "type_as": lambda call: Masked(call.plain(), call["self"].absent, clean=True),
    "group_norm": _group_norm,
    "batch_norm": _by_channel,
    **dict.fromkeys(
        _names("max_pool1d avg_pool1d adaptive_avg_pool1d max_pool2d avg_pool2d adaptive_avg_pool2d"), _pool
    ),
    "view_as_complex": _complex,
    "view_as_real": _real,
    **dict.fromkeys(_names("sort argsort diff cumprod cummax searchsorted bucketize nonzero glu"), _needs_presence),
}
