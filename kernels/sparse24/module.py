"""Modules that stand where linear layers stood and multiply by packed weights.

Dims: N outputs, K inputs.  The tensors are those of ``formats``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from secateur.kernels.sparse24 import ops
from secateur.kernels.sparse24.formats import Packed24, pack

Tensors = Mapping[str, Tensor]
NAMES = ("values", "mask", "scale")


class PackedLinear(nn.Module):
    """``x @ weight^T + bias`` with one packed weight, or several stacked ones that read the same x.

    The first of those that share an input computes all; the others take their rows if they are
    asked about the very same tensor, and compute their own rows if not, so the result never depends
    on the order of calls.

    kind: "2:4", "2:4+int8", "2:4+int4", "int8" or "int4".
    sizes: outputs of each stacked weight.
    bias: a Parameter stays the one that was given.
    order: what the tensors are laid out for: "" is the canonical form, which any device takes; a
        kind of
    ``gpu.fragments`` is fragment order, for CUDA.
    The weight is frozen.  Casting the module casts float values and the bias, never the scale,
    which keeps its own precision.
    forward: [..., K] -> [..., N] of the first.
    """

    values: Tensor
    mask: Tensor | None
    indices: Tensor | None
    scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, kind: str, columns: int, tensors: Tensors, bias: Tensor | None, sizes: Sequence[int]
    ) -> None:
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, columns, sizes[0]
        self.sizes, self.order = list(sizes), ""
        for name in (*NAMES, "indices"):
            self.register_buffer(name, tensors.get(name))
        if isinstance(bias, nn.Parameter) or bias is None:
            kept = bias
        else:
            kept = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", kept)
        self.held: tuple[Tensor, tuple[Tensor, ...]] | None = None

    @classmethod
    def from_linear(
        cls, layer: nn.Linear, levels: Tensor | None = None, scale: Tensor | None = None
    ) -> PackedLinear:
        """Pack a layer whose weight is 2:4; the bias is the layer's own.

        Args:
            levels, scale: int8 levels [N, K] and their scale, [N] for int8 or [N, G] for int4, in
                place of the layer's float weight.

        Raises:
            FormatError: not 2:4, not finite, or out of range.
        """
        if levels is None or scale is None:
            return cls.from_packed(pack(layer.weight), layer.bias)
        return cls.from_packed(
            pack(levels, "int8" if scale.ndim == 1 else "int4", scale), layer.bias
        )

    @classmethod
    def from_packed(cls, packed: Packed24, bias: Tensor | None = None) -> PackedLinear:
        """The layer of a packed 2:4 weight."""
        if packed.scale is not None:
            kind = f"2:4+{packed.kind}"
        else:
            kind = "2:4"
        return cls(kind, packed.shape[1], packed.to_tensors(), bias, [packed.shape[0]])

    @property
    def to_packed(self) -> Packed24:
        """All stacked 2:4 weights as data, in the canonical form."""
        assert self.mask is not None and not self.order, (
            "dense levels and fragments are no Packed24"
        )
        kind = {torch.int8: "int8", torch.uint8: "int4"}.get(
            self.values.dtype, str(self.values.dtype)[6:]
        )
        return Packed24(
            kind, (sum(self.sizes), self.in_features), self.values, self.mask, self.scale
        )

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + b: [..., K] -> [..., N]."""
        result = self.all_outputs(x)
        if len(self.sizes) == 1:
            return result
        parts: tuple[Tensor, ...] = result.split(self.sizes, -1)
        self.held = (x, parts)
        return parts[0]

    def part_output(self, index: int, x: Tensor) -> Tensor:
        """The outputs of one of the other stacked weights."""
        held = self.held
        if index == len(self.sizes) - 1:
            self.held = None
        if held is not None and held[0] is x:
            return held[1][index]
        if self.order:
            whole: tuple[Tensor, ...] = self.all_outputs(x).split(self.sizes, -1)
            return whole[index]
        rows = slice(start := sum(self.sizes[:index]), start + self.sizes[index])
        mask, scale, bias = (
            None if t is None else t[rows] for t in (self.mask, self.scale, self.bias)
        )
        return ops.linear(x, self.values[rows], mask, scale, bias)

    def all_outputs(self, x: Tensor) -> Tensor:
        """The outputs of all stacked weights, side by side."""
        if not self.order:
            return ops.linear(x, self.values, self.mask, self.scale, self.bias)
        operands = (self.values, self.indices, self.scale, self.bias, self.order, sum(self.sizes))
        result: Tensor = torch.ops.secateur.linear_24_fragment(x, *operands)
        return result

    def arrange_for_gpu(self) -> None:
        """Lay the tensors out for the tensor cores of a GPU, once; nothing for what they cannot
        take."""
        if self.order or self.mask is None or self.values.dtype == torch.float32:
            return
        from secateur.kernels.sparse24.gpu.fragments import pack_fragments

        packed = self.to_packed
        made = pack_fragments(packed)
        self.order, self.mask = packed.kind, None
        self.values, self.indices, self.scale = made.values, made.indices, made.scale

    @property
    def nbytes(self) -> int:
        """Bytes of values, masks and scales, of all stacked weights."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None and self.scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, form and dtype, as torch prints modules."""
        if len(self.sizes) > 1:
            stacked = f", stacked={self.sizes}"
        else:
            stacked = ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"kind={self.kind!r}{stacked}"
        )


class StackedPart(nn.Module):
    """One of the weights that a ``PackedLinear`` holds beside its first."""

    def __init__(self, first: PackedLinear, index: int) -> None:
        super().__init__()
        self.first = (
            first,
        )  # in a tuple: a plain attribute would register the module, and its tensors, twice
        self.index = index
        self.kind, self.in_features, self.out_features = (
            first.kind,
            first.in_features,
            first.sizes[index],
        )

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + b of this part of a stacked weight: [..., K] -> [..., N]."""
        return self.first[0].part_output(self.index, x)

    def extra_repr(self) -> str:
        """Sizes and part, as torch prints modules."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind!r}"
        )
