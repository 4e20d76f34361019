"""The kernels of the sparse tensor cores on CPU: pack, launch under the stand-in, compare.

Used by the properties and by the planted faults.  Each function says whether the product was right;
a kernel that reads or writes outside its tensors, or breaks the instruction's rules, raises
AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gluon_standin import Kernels
from torch import Tensor
from torch.nn import functional as F
from weights24 import close, exact, random_packed

from secateur.kernels.sparse24.gpu.fragments import FLOATS, Fragments, pack_fragments

EMPTY = torch.zeros(1, dtype=torch.int32)


@dataclass(frozen=True)
class Case:
    """A product to check: x [b, k] of `dtype` times a weight [n, k] of `kind`, K split `splits`
    ways."""

    n: int
    k: int
    b: int
    kind: str = "bfloat16"
    dtype: torch.dtype = torch.bfloat16
    splits: int = 1
    seed: int = 0

    @property
    def x_dtype(self) -> torch.dtype:
        return FLOATS.get(self.kind, self.dtype)


def prepare(case: Case) -> tuple[Tensor, Fragments, Callable[[Tensor], bool]]:
    """x [b, padded k], the weight in fragment order, and what says whether an output [.., b, n] is
    their product."""
    generator = torch.Generator().manual_seed(case.seed)
    packed = random_packed(case.n, case.k, case.kind, generator)
    x = torch.randn(case.b, case.k, generator=generator).to(case.x_dtype)
    weight = pack_fragments(packed)
    padded = F.pad(x, (0, weight.padded_columns - case.k))
    reference = exact(x, packed)
    return (
        padded,
        weight,
        lambda out: close(out.sum(0) if out.ndim == 3 else out, reference, x, packed),
    )


def launch(
    case: Case,
    kernels: Kernels,
    kernel: Any,
    grid: tuple[int, ...],
    x: Tensor,
    weight: Fragments,
    rest: dict[str, Any],
) -> Tensor:
    """Planes [splits, b, n] of the output, NaN before the kernel writes them."""
    dtype = x.dtype if case.splits == 1 else torch.float32
    out = torch.full((case.splits, case.b, case.n), float("nan"), dtype=dtype)
    kind = "float" if case.kind in FLOATS else case.kind
    scale = EMPTY if weight.scale is None else weight.scale
    tensors = (x.view(torch.int32), weight.values, weight.indices, scale, out)
    sizes = (case.b, case.n, weight.padded_columns)
    kernels.launch(kernel, grid, *tensors, *sizes, KIND=kind, F16=x.dtype == torch.float16, **rest)
    return out


def decode(
    case: Case, kernels: Kernels, p: int = 1, mt: int = 1, warps: int = 2, early: bool = False
) -> bool:
    nt = 1 if case.b <= 8 else 2
    x, weight, check = prepare(case)
    grid = (-(-case.n // (16 * mt)), case.splits)
    shape = {"P": p, "MT": mt, "NT": nt, "WARPS": warps, "L": None, "early": early}
    return check(launch(case, kernels, kernels.decode.decode, grid, x, weight, shape))


def gemm(
    case: Case,
    kernels: Kernels,
    mt: int = 1,
    nt: int = 1,
    wm: int = 1,
    wn: int = 1,
    ku: int = 1,
    stages: int = 3,
    early: bool = False,
) -> bool:
    x, weight, check = prepare(case)
    grid = (-(-case.n // (16 * mt * wm)), -(-case.b // (8 * nt * wn)), case.splits)
    shape = {"MT": mt, "NT": nt, "WM": wm, "WN": wn, "KU": ku, "STAGES": stages, "early": early}
    layouts = dict.fromkeys(("L", "LA", "LE", "LX"))
    return check(launch(case, kernels, kernels.gemm.gemm, grid, x, weight, {**shape, **layouts}))


def wgmma(case: Case, kernels: Kernels, wg: int = 1, stages: int = 3, early: bool = False) -> bool:
    x, weight, check = prepare(case)
    out = torch.full((case.b, case.n), float("nan"), dtype=x.dtype)
    grid = (-(-case.n // (64 * wg)), -(-case.b // 128))
    rest = {"F16": x.dtype == torch.float16, "WG": wg, "STAGES": stages, "L": None, "early": early}
    args = (x, weight.values, weight.indices, out, case.b, case.n, weight.padded_columns)
    kernels.launch(kernels.wgmma.wgmma, grid, *args, **rest)
    return check(out)
