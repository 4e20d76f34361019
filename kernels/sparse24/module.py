"""A drop-in for ``nn.Linear`` that holds a packed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from secateur.kernels.sparse24.formats import Packed24, pack
from secateur.kernels.sparse24.ops import linear


class Linear24(nn.Module):
    """``x @ weight^T + bias`` with a 2:4 weight, floats or quantised, in the canonical form; the weight is frozen.

    The buffers are those of ``Packed24``; the bias is a parameter, the layer's own where it had one.  Casting the
    module casts float values and the bias, never the scale, which keeps its own precision.
    """

    values: Tensor
    mask: Tensor
    scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, packed: Packed24, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.register_buffer("values", packed.values)
        self.register_buffer("mask", packed.mask)
        self.register_buffer("scale", packed.scale)
        kept = bias if isinstance(bias, nn.Parameter) or bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", kept)

    @classmethod
    def from_linear(cls, layer: nn.Linear, levels: Tensor | None = None, scale: Tensor | None = None) -> Linear24:
        """Pack a layer whose weight is 2:4.

        Args:  levels, scale: int8 levels [N, K] and their scale, [N] for int8 or [N, G] for int4, in place of the
        layer's float weight.
        Raises: FormatError: not 2:4, not finite, or out of range.
        """
        if levels is None or scale is None:
            return cls(pack(layer.weight), layer.bias)
        return cls(pack(levels, "int8" if scale.ndim == 1 else "int4", scale), layer.bias)

    @property
    def packed(self) -> Packed24:
        """The weight as data."""
        kind = "int4" if self.values.dtype == torch.uint8 else str(self.values.dtype).removeprefix("torch.")
        return Packed24(kind, (self.out_features, self.in_features), self.values, self.mask, self.scale)

    @property
    def weight(self) -> Tensor:
        """The dense weight [N, K], made anew at each use; float32 for quantised kinds."""
        return self.packed.dense()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features], same dtype."""
        return linear(x, self.values, self.mask, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kind={self.packed.kind}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None and self.scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self
