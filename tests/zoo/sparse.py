"""2:4 weights for tests: the two largest of every four stay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from secateur.graph import Pattern, Program, Sparse, with_parameters
from secateur.passes.lowering.layers import linear_layers


def keep_two_of_four(weight: Tensor) -> Tensor:
    """[N, K] with the two smallest of every four neighbours along K set to zero; K a multiple of
    4."""
    groups = weight.detach().reshape(len(weight), -1, 4)
    drop = groups.abs().argsort(dim=-1, stable=True)[..., :2]
    return groups.scatter(-1, drop, 0.0).reshape(weight.shape)


def made_24(program: Program, but: Iterable[str] = ()) -> Program:
    """The program with every linear layer 2:4, but heads and those whose name holds one of the
    words."""
    layers = [
        one
        for one in linear_layers(program)[0]
        if not one.head and not any(word in one.parameter for word in but)
    ]
    known = dict(program.named_parameters())
    return with_parameters(
        program, {one.parameter: keep_two_of_four(known[one.parameter]) for one in layers}
    )


def as_sparse(program: Program, pattern: str = "2:4") -> Program:
    """The program with every linear layer but the head in a pattern, by magnitude."""
    one = Sparse(Pattern.parse(pattern))
    known = dict(program.named_parameters())
    layers = [layer.parameter for layer in linear_layers(program)[0] if not layer.head]
    kept = {name: one.pattern.select_mask(known[name].detach().abs()) for name in layers}
    values = {name: torch.where(mask, known[name].detach(), 0.0) for name, mask in kept.items()}
    return with_parameters(program, values).replace(sparse=dict.fromkeys(layers, one))


def grams(weight: Tensor, rows: int = 400) -> Tensor:
    """x^T x of correlated inputs, [K, K] float64."""
    columns = weight.shape[1]
    causes = torch.randn(rows, columns // 4, dtype=torch.float64)
    x = causes @ torch.randn(columns // 4, columns, dtype=torch.float64) / columns**0.5
    x += 0.2 * torch.randn(rows, columns, dtype=torch.float64)
    return x.T @ x
