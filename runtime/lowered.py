"""Modules that stand where linear layers stood and multiply by packed weights.

Dims: N outputs, K inputs.  The tensors are those of ``kernels.sparse24.formats``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from secateur.kernels.sparse24 import ops
from secateur.kernels.sparse24.formats import Packed24

Tensors = Mapping[str, Tensor]
NAMES = ("values", "mask", "scale")


class PackedLinear(nn.Module):
    """``x @ weight^T + bias`` with one packed weight, or several stacked ones that read the same x.

    The first of those that share an input computes all; the others take their rows if they are asked about the very
    same tensor, and compute their own rows if not, so the result never depends on the order of calls.

    kind: of ``passes.lower_cost.KINDS``.   sizes: outputs of each stacked weight.
    order: what the tensors are laid out for: "" is the canonical form, which any device takes; a kind of
    ``gpu.fragments`` is fragment order, for CUDA.
    forward: [..., K] -> [..., N] of the first.
    """

    values: Tensor
    mask: Tensor | None
    indices: Tensor | None
    scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, kind: str, columns: int, tensors: Tensors, bias: Tensor | None, sizes: Sequence[int]) -> None:
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, columns, sizes[0]
        self.sizes, self.order = list(sizes), ""
        for name in (*NAMES, "indices"):
            self.register_buffer(name, tensors.get(name))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.held: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        result = self.product(x)
        if len(self.sizes) == 1:
            return result
        parts: tuple[Tensor, ...] = result.split(self.sizes, -1)
        self.held = (x, parts)
        return parts[0]

    def part(self, index: int, x: Tensor) -> Tensor:
        """The outputs of one of the other stacked weights."""
        held = self.held
        if index == len(self.sizes) - 1:
            self.held = None
        if held is not None and held[0] is x:
            return held[1][index]
        if self.order:
            whole: tuple[Tensor, ...] = self.product(x).split(self.sizes, -1)
            return whole[index]
        rows = slice(start := sum(self.sizes[:index]), start + self.sizes[index])
        mask, scale, bias = (None if t is None else t[rows] for t in (self.mask, self.scale, self.bias))
        return ops.linear(x, self.values[rows], mask, scale, bias)

    def product(self, x: Tensor) -> Tensor:
        """The outputs of all stacked weights, side by side."""
        if not self.order:
            return ops.linear(x, self.values, self.mask, self.scale, self.bias)
        operands = (self.values, self.indices, self.scale, self.bias, self.order, sum(self.sizes))
        result: Tensor = torch.ops.secateur.linear_24_fragment(x, *operands)
        return result

    def rearrange(self) -> None:
        """Lay the tensors out for the tensor cores of a GPU, once; nothing for what they cannot take."""
        kind = {torch.int8: "int8", torch.uint8: "int4"}.get(self.values.dtype, str(self.values.dtype)[6:])
        if self.order or self.mask is None or kind == "float32":
            return
        from secateur.kernels.sparse24.gpu.fragments import pack_fragments

        packed = Packed24(kind, (sum(self.sizes), self.in_features), self.values, self.mask, self.scale)
        made = pack_fragments(packed)
        self.order, self.mask = kind, None
        self.values, self.indices, self.scale = made.values, made.indices, made.scale

    @property
    def nbytes(self) -> int:
        """Bytes of values, masks and scales, of all stacked weights."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casting a model leaves scales as they are: they belong to the packed form."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None and self.scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        stacked = f", stacked={self.sizes}" if len(self.sizes) > 1 else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind!r}{stacked}"


class StackedPart(nn.Module):
    """One of the weights that a ``PackedLinear`` holds beside its first."""

    def __init__(self, first: PackedLinear, index: int) -> None:
        super().__init__()
        self.first = (first,)  # in a tuple: a plain attribute would register the module, and its tensors, twice
        self.index = index
        self.kind, self.in_features, self.out_features = first.kind, first.in_features, first.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.first[0].part(self.index, x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind!r}"


@dataclass(frozen=True)
class PackedLayer:
    """One weight in its packed form.   name: of the module that holds it, without ``.weight``."""

    name: str
    kind: str
    shape: tuple[int, int]
    tensors: Tensors

    @property
    def nbytes(self) -> int:
        """Bytes of values, masks and scales."""
        return sum(t.nbytes for t in self.tensors.values())


def stacked(layers: Sequence[PackedLayer], biases: Sequence[Tensor | None]) -> list[nn.Module]:
    """The modules of layers that read one input, in order: the first holds the tensors of all.

    Raises: ValueError: they differ in kind or inputs, or some have a bias and others none.
    """
    kinds = {(layer.kind, layer.shape[1], bias is None) for layer, bias in zip(layers, biases, strict=True)}
    if len(kinds) != 1:
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(
            f"{names} cannot be one product: they differ in form, inputs or bias: {sorted(map(str, kinds))}"
        )
    first = layers[0]
    tensors = {name: torch.cat([layer.tensors[name] for layer in layers]) for name in first.tensors}
    given = [bias.detach() for bias in biases if bias is not None]
    bias = torch.cat(given) if given else None
    leader = PackedLinear(first.kind, first.shape[1], tensors, bias, [layer.shape[0] for layer in layers])
    return [leader, *(StackedPart(leader, at) for at in range(1, len(layers)))]


def rearrange_for_gpu(model: nn.Module) -> None:
    """Lay the packed weights of a model that stands on a CUDA device out for its tensor cores."""
    for _, module in packed_modules(model):
        if isinstance(module, PackedLinear):
            module.rearrange()


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedLinear | StackedPart]]:
    """The modules that multiply by packed weights, by name."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | StackedPart):
            yield name, module
