"""Random 2:4 weights for these tests, and the product that they are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.kernels.sparse24.formats import FLOAT_KINDS, LEVELS, Packed24, pack

KINDS = ("bfloat16", "float16", "int8", "int4")


def random_24(n: int, k: int, generator: torch.Generator, thin: float = 0.1) -> Tensor:
    """[n, k] with two random places of each four kept, and some of these zero: groups with none and
    with one occur."""
    dense = torch.randn(n, k + -k % 4, generator=generator)
    keep = torch.rand(n, dense.shape[1] // 4, 4, generator=generator).topk(2, -1).indices
    mask = torch.zeros(n, dense.shape[1] // 4, 4).scatter_(-1, keep, 1.0)
    mask *= torch.rand(mask.shape, generator=generator) > thin
    return (dense * mask.view(n, -1))[:, :k].contiguous()


def random_packed(
    n: int, k: int, kind: str, generator: torch.Generator, thin: float = 0.1
) -> Packed24:
    weight = random_24(n, k, generator, thin)
    if kind in FLOAT_KINDS:
        return pack(weight.to(FLOAT_KINDS[kind]))
    low, high = LEVELS[kind]
    levels = (weight * high / 2).round().clamp(low, high).to(torch.int8)
    groups = -(-(k + -k % 8) // 128)
    scale = torch.rand((n,) if kind == "int8" else (n, groups), generator=generator) + 0.25
    return pack(levels, kind, scale)


def exact(x: Tensor, packed: Packed24) -> Tensor:
    """x @ weight^T in float64 [B, N]."""
    return F.linear(x.double(), packed.to_dense(torch.float32).double())


def close(y: Tensor, reference: Tensor, x: Tensor, packed: Packed24) -> bool:
    """Whether every y is the product up to its rounding (a unit of its last place) and 2^-19 of sum
    |x| |w|.

    NaN is never close.
    """
    ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}[y.dtype]
    mass = F.linear(x.double().abs(), packed.to_dense(torch.float32).double().abs())
    return bool(
        ((y.double() - reference).abs() <= ulp * reference.abs() + 2.0**-19 * mass + 1e-7).all()
    )
