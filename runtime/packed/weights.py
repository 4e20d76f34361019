"""Packed weights of a model: one after another as data, as the modules that hold them, and found
again in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.kernels.sparse24 import PackedLinear, StackedPart
from secateur.kernels.sparse24.module import Tensors

BESIDE = "packed"  # the packed weight's name in a module that adds something to its product


@dataclass(frozen=True)
class PackedLayer:
    """One weight in its packed form.

    name: of the module that holds it, without ``.weight``.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    tensors: Tensors

    @property
    def count_bytes(self) -> int:
        """Bytes of values, masks and scales."""
        return sum(t.nbytes for t in self.tensors.values())


def stack_layers(layers: Sequence[PackedLayer], biases: Sequence[Tensor | None]) -> list[nn.Module]:
    """The modules of layers that read one input, in order: the first holds the tensors of all.

    Args:
        layers: in the order of their rows.
        biases: [N] of each layer, or None.

    Raises:
        ValueError: they differ in kind or inputs, or some have a bias and others none.
    """
    kinds = set[tuple[str, int, bool]]()
    for layer, bias in zip(layers, biases, strict=True):
        kinds.add((layer.kind, layer.shape[1], bias is None))
    if len(kinds) != 1:
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(
            f"{names} cannot be one product: they differ in form, inputs or bias: "
            f"{sorted(map(str, kinds))}"
        )
    first = layers[0]
    tensors = {name: torch.cat([layer.tensors[name] for layer in layers]) for name in first.tensors}
    parts = [bias.detach() for bias in biases if bias is not None]
    stacked_bias = None
    if parts:
        stacked_bias = torch.cat(parts)
    rows = [layer.shape[0] for layer in layers]
    leader = PackedLinear(first.kind, first.shape[1], tensors, stacked_bias, rows)
    return [leader, *(StackedPart(leader, place) for place in range(1, len(layers)))]


def rearrange_for_gpu(model: nn.Module) -> None:
    """Lay the packed weights of a model that stands on a CUDA device out for its tensor cores.

    Args:
        model: changed in place.
    """
    for _, module in iterate_packed_modules(model):
        if isinstance(module, PackedLinear):
            module.arrange_for_gpu()


def iterate_packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedLinear | StackedPart]]:
    """The modules that multiply by packed weights, by name."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | StackedPart):
            yield name, module
