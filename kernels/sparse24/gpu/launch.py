"""Launches: one runner a backend, each [B, N] of x [B, padded K], a weight in fragment order, a
bias and a `Choice`.

The kernels are imported at the first launch: Triton is an optional package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from secateur.kernels.sparse24.gpu import configs
from secateur.kernels.sparse24.gpu.configs import (
    Config,
    DecodeConfig,
    GemmConfig,
    KernelChoice,
    WgmmaConfig,
    value_kind,
)
from secateur.kernels.sparse24.gpu.fragments import Fragments, restore_dense

COMBINE_BLOCK = 1024
Runner = Callable[[Tensor, Fragments, Tensor | None, KernelChoice], Tensor]


@lru_cache(maxsize=1)
def load_kernels() -> SimpleNamespace:
    """The kernel modules.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if find_spec("triton") is None:
        raise RuntimeError("the GPU kernels need Triton: pip install 'secateur[kernels]'")
    from secateur.kernels.sparse24.gpu import decode, gemm, portable, wgmma

    return SimpleNamespace(decode=decode, gemm=gemm, wgmma=wgmma, portable=portable)


@lru_cache
def compile_time_layouts(config: Config) -> dict[str, Any]:
    """Compile-time layouts of a configuration, by argument name."""
    if isinstance(config, DecodeConfig):
        return {"L": load_kernels().decode.layout(config.p, config.mt, config.nt, config.warps)}
    if isinstance(config, GemmConfig):
        found: dict[str, Any] = load_kernels().gemm.layouts(
            config.mt, config.nt, config.wm, config.wn
        )
        return found
    return {"L": load_kernels().wgmma.layout(config.wg)}


def planes_for(x: Tensor, weight: Fragments, bias: Tensor | None, splits: int) -> Tensor:
    """The kernel's output [splits, B, N]: fp32 where something is still to be added."""
    partial = splits > 1 or bias is not None
    return x.new_empty(splits, len(x), weight.shape[0], dtype=torch.float32 if partial else x.dtype)


def combine_planes(planes: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, N]: the sum of the planes, in order, + bias, rounded once."""
    splits, batch, n = planes.shape
    if planes.dtype == dtype:
        return planes[0]
    out = planes.new_empty(batch, n, dtype=dtype)
    grid = (-(-n // COMBINE_BLOCK), batch)
    if bias is None:
        b = out
    else:
        b = bias
    what = {"BIAS": bias is not None, "F16": dtype == torch.float16, "BLOCK": COMBINE_BLOCK}
    load_kernels().portable.combine[grid](planes, b, out, splits, n, **what)
    return out


def launch_options(x: Tensor, weight: Fragments) -> dict[str, Any]:
    """Compile-time options that all kernels share: the kind of the values, and whether x is
    fp16."""
    return {"KIND": value_kind(weight.kind), "F16": x.dtype == torch.float16}


def scale_or_placeholder(weight: Fragments) -> Tensor:
    """The scales, or where there are none a pointer that the kernel does not read."""
    if weight.scale is None:
        return weight.indices
    return weight.scale


def kernel_operands(x: Tensor, weight: Fragments, out: Tensor) -> tuple[Any, ...]:
    """Arguments that the decode and GEMM kernels share."""
    tensors = (
        x.view(torch.int32),
        weight.values,
        weight.indices,
        scale_or_placeholder(weight),
        out,
    )
    return (*tensors, len(x), weight.shape[0], weight.padded_columns)


def run_decode(x: Tensor, weight: Fragments, bias: Tensor | None, choice: KernelChoice) -> Tensor:
    """y = x W^T + b for few rows, by the decode kernel."""
    c = choice.config
    assert isinstance(c, DecodeConfig)
    if len(x) > 8 * c.nt:
        raise ValueError(f"a batch of {len(x)}: this decode configuration takes {8 * c.nt}")
    planes = planes_for(x, weight, bias, choice.splits)
    grid = (-(-weight.shape[0] // (16 * c.mt)), choice.splits)
    shape = {"P": c.p, "MT": c.mt, "NT": c.nt, "WARPS": c.warps, "num_warps": c.warps}
    load_kernels().decode.decode[grid](
        *kernel_operands(x, weight, planes),
        **launch_options(x, weight),
        **shape,
        **compile_time_layouts(c),
    )
    return combine_planes(planes, bias, x.dtype)


def run_gemm(x: Tensor, weight: Fragments, bias: Tensor | None, choice: KernelChoice) -> Tensor:
    """y = x W^T + b by the kernel on mma.sp."""
    c = choice.config
    assert isinstance(c, GemmConfig)
    planes = planes_for(x, weight, bias, choice.splits)
    grid = (-(-weight.shape[0] // c.rows), -(-len(x) // c.batch), choice.splits)
    shape = {
        "MT": c.mt,
        "NT": c.nt,
        "WM": c.wm,
        "WN": c.wn,
        "KU": c.ku,
        "STAGES": c.stages,
        "num_warps": c.wm * c.wn,
    }
    load_kernels().gemm.gemm[grid](
        *kernel_operands(x, weight, planes),
        **launch_options(x, weight),
        **shape,
        **compile_time_layouts(c),
    )
    return combine_planes(planes, bias, x.dtype)


def run_wgmma(x: Tensor, weight: Fragments, bias: Tensor | None, choice: KernelChoice) -> Tensor:
    """y = x W^T + b by the kernel on Hopper's warpgroup instruction."""
    c = choice.config
    assert isinstance(c, WgmmaConfig)
    planes = planes_for(x, weight, bias, 1)
    grid = (-(-weight.shape[0] // (64 * c.wg)), -(-len(x) // 128))
    sizes = (len(x), weight.shape[0], weight.padded_columns)
    shape = {"WG": c.wg, "STAGES": c.stages, "F16": x.dtype == torch.float16, "num_warps": 4 * c.wg}
    load_kernels().wgmma.wgmma[grid](
        x, weight.values, weight.indices, planes, *sizes, **shape, **compile_time_layouts(c)
    )
    return combine_planes(planes, bias, x.dtype)


def expand_weight(weight: Fragments, dtype: torch.dtype) -> Tensor:
    """Dense [N, padded K] by the `expand` kernel."""
    n = weight.shape[0]
    k = weight.padded_columns
    u = configs.EXPAND_BLOCKS
    out = torch.empty(n, k, dtype=dtype, device=weight.values.device)
    grid = (len(weight.values), -(-k // (64 * u)))
    tensors = (weight.values, weight.indices, scale_or_placeholder(weight), out.view(torch.int32))
    what = {"KIND": value_kind(weight.kind), "F16": dtype == torch.float16, "U": u}
    load_kernels().portable.expand[grid](*tensors, n, k, **what)
    return out


def run_expand(x: Tensor, weight: Fragments, bias: Tensor | None, choice: KernelChoice) -> Tensor:
    """y = x W^T + b by expanding W once and torch's dense product."""
    return F.linear(x, expand_weight(weight, x.dtype), bias)


def run_portable(x: Tensor, weight: Fragments, bias: Tensor | None, choice: KernelChoice) -> Tensor:
    """y = x W^T + b by the kernel in plain Triton."""
    planes = planes_for(x, weight, bias, 1)
    tensors = (
        x.view(torch.int32),
        weight.values,
        weight.indices,
        scale_or_placeholder(weight),
        planes,
    )
    what = {**launch_options(x, weight), "U": configs.EXPAND_BLOCKS}
    load_kernels().portable.gemv[(len(weight.values), len(x))](
        *tensors, weight.shape[0], weight.padded_columns, **what
    )
    return combine_planes(planes, bias, x.dtype)


_compressed: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # by values tensor: a second, compressed copy of the weight


def run_cusparselt(
    x: Tensor, weight: Fragments, bias: Tensor | None, choice: KernelChoice
) -> Tensor:
    """The vendor's sparse library on a copy of its own, kept beside the weight: 0.56 of the dense
    bytes more."""
    if weight.values not in _compressed:
        dense = restore_dense(
            weight.values, weight.indices, weight.scale, weight.kind, *weight.shape, x.dtype
        )
        padded = F.pad(dense, (0, x.shape[1] - dense.shape[1]))
        _compressed[weight.values] = torch.sparse.to_sparse_semi_structured(padded)
    return F.linear(x, _compressed[weight.values], bias)


def run_torch(x: Tensor, weight: Fragments, bias: Tensor | None, choice: KernelChoice) -> Tensor:
    """The last resort: the dense weight by plain torch."""
    n, k = weight.shape
    dense = restore_dense(weight.values, weight.indices, weight.scale, weight.kind, n, k, x.dtype)
    return F.linear(x[:, :k], dense, bias)


RUNNERS: dict[str, Runner] = {
    "decode": run_decode,
    "gemm": run_gemm,
    "wgmma": run_wgmma,
    "expand": run_expand,
    "cusparselt": run_cusparselt,
    "portable": run_portable,
    "torch": run_torch,
}


def align_input(x: Tensor, columns: int) -> Tensor:
    """x with zeros up to `columns`, rows dense, from a multiple of 16 bytes on: the kernels copy 16
    bytes at once."""
    if x.shape[1] < columns:
        x = F.pad(x, (0, columns - x.shape[1]))
    else:
        x = x.contiguous()
    if x.data_ptr() % 16 == 0:
        return x
    return x.clone()


def launch_product(
    x: Tensor, weight: Fragments, bias: Tensor | None, choice: KernelChoice
) -> Tensor:
    """x [B, K] @ weight^T + bias by the kernel that `choice` names, whether or not it was tested.
    B is at least 1."""
    return RUNNERS[choice.backend](align_input(x, weight.padded_columns), weight, bias, choice)
