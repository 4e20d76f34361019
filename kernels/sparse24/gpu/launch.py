"""Launches: one runner a backend, each [B, N] of x [B, padded K], a weight in fragment order, a bias and a `Choice`.

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
from secateur.kernels.sparse24.gpu.configs import Choice, Config, DecodeConfig, GemmConfig, WgmmaConfig, value_kind
from secateur.kernels.sparse24.gpu.fragments import Fragments, dense_weight

COMBINE_BLOCK = 1024
Runner = Callable[[Tensor, Fragments, Tensor | None, Choice], Tensor]


@lru_cache(maxsize=1)
def kernels() -> SimpleNamespace:
    """The kernel modules.  Raises: RuntimeError: Triton is not installed."""
    if find_spec("triton") is None:
        raise RuntimeError("the GPU kernels need Triton: pip install 'secateur[kernels]'")
    from secateur.kernels.sparse24.gpu import decode, gemm, portable, wgmma

    return SimpleNamespace(decode=decode, gemm=gemm, wgmma=wgmma, portable=portable)


@lru_cache
def layouts(config: Config) -> dict[str, Any]:
    """Compile-time layouts of a configuration, by argument name."""
    if isinstance(config, DecodeConfig):
        return {"L": kernels().decode.layout(config.p, config.mt, config.nt, config.warps)}
    if isinstance(config, GemmConfig):
        found: dict[str, Any] = kernels().gemm.layouts(config.mt, config.nt, config.wm, config.wn)
        return found
    return {"L": kernels().wgmma.layout(config.wg)}


def planes_for(x: Tensor, weight: Fragments, bias: Tensor | None, splits: int) -> Tensor:
    """The kernel's output [splits, B, N]: fp32 where something is still to be added."""
    partial = splits > 1 or bias is not None
    return x.new_empty(splits, len(x), weight.shape[0], dtype=torch.float32 if partial else x.dtype)


def combined(planes: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, N]: the sum of the planes, in order, + bias, rounded once."""
    splits, batch, n = planes.shape
    if planes.dtype == dtype:
        return planes[0]
    out = planes.new_empty(batch, n, dtype=dtype)
    grid = (-(-n // COMBINE_BLOCK), batch)
    b = out if bias is None else bias
    what = {"BIAS": bias is not None, "F16": dtype == torch.float16, "BLOCK": COMBINE_BLOCK}
    kernels().portable.combine[grid](planes, b, out, splits, n, **what)
    return out


def options(x: Tensor, weight: Fragments) -> dict[str, Any]:
    return {"KIND": value_kind(weight.kind), "F16": x.dtype == torch.float16}


def scales(weight: Fragments) -> Tensor:
    """The scales, or where there are none a pointer that the kernel does not read."""
    return weight.indices if weight.scale is None else weight.scale


def operands(x: Tensor, weight: Fragments, out: Tensor) -> tuple[Any, ...]:
    """Arguments that the decode and GEMM kernels share."""
    tensors = (x.view(torch.int32), weight.values, weight.indices, scales(weight), out)
    return (*tensors, len(x), weight.shape[0], weight.padded_columns)


def run_decode(x: Tensor, weight: Fragments, bias: Tensor | None, choice: Choice) -> Tensor:
    c = choice.config
    assert isinstance(c, DecodeConfig)
    if len(x) > 8 * c.nt:
        raise ValueError(f"a batch of {len(x)}: this decode configuration takes {8 * c.nt}")
    planes = planes_for(x, weight, bias, choice.splits)
    grid = (-(-weight.shape[0] // (16 * c.mt)), choice.splits)
    shape = {"P": c.p, "MT": c.mt, "NT": c.nt, "WARPS": c.warps, "num_warps": c.warps}
    kernels().decode.decode[grid](*operands(x, weight, planes), **options(x, weight), **shape, **layouts(c))
    return combined(planes, bias, x.dtype)


def run_gemm(x: Tensor, weight: Fragments, bias: Tensor | None, choice: Choice) -> Tensor:
    c = choice.config
    assert isinstance(c, GemmConfig)
    planes = planes_for(x, weight, bias, choice.splits)
    grid = (-(-weight.shape[0] // c.rows), -(-len(x) // c.batch), choice.splits)
    shape = {"MT": c.mt, "NT": c.nt, "WM": c.wm, "WN": c.wn, "KU": c.ku, "STAGES": c.stages, "num_warps": c.wm * c.wn}
    kernels().gemm.gemm[grid](*operands(x, weight, planes), **options(x, weight), **shape, **layouts(c))
    return combined(planes, bias, x.dtype)


def run_wgmma(x: Tensor, weight: Fragments, bias: Tensor | None, choice: Choice) -> Tensor:
    c = choice.config
    assert isinstance(c, WgmmaConfig)
    planes = planes_for(x, weight, bias, 1)
    grid = (-(-weight.shape[0] // (64 * c.wg)), -(-len(x) // 128))
    sizes = (len(x), weight.shape[0], weight.padded_columns)
    shape = {"WG": c.wg, "STAGES": c.stages, "F16": x.dtype == torch.float16, "num_warps": 4 * c.wg}
    kernels().wgmma.wgmma[grid](x, weight.values, weight.indices, planes, *sizes, **shape, **layouts(c))
    return combined(planes, bias, x.dtype)


def expanded(weight: Fragments, dtype: torch.dtype) -> Tensor:
    """Dense [N, padded K] by the `expand` kernel."""
    n, k, u = weight.shape[0], weight.padded_columns, configs.EXPAND_BLOCKS
    out = torch.empty(n, k, dtype=dtype, device=weight.values.device)
    grid = (len(weight.values), -(-k // (64 * u)))
    tensors = (weight.values, weight.indices, scales(weight), out.view(torch.int32))
    what = {"KIND": value_kind(weight.kind), "F16": dtype == torch.float16, "U": u}
    kernels().portable.expand[grid](*tensors, n, k, **what)
    return out


def run_expand(x: Tensor, weight: Fragments, bias: Tensor | None, choice: Choice) -> Tensor:
    return F.linear(x, expanded(weight, x.dtype), bias)


def run_portable(x: Tensor, weight: Fragments, bias: Tensor | None, choice: Choice) -> Tensor:
    planes = planes_for(x, weight, bias, 1)
    tensors = (x.view(torch.int32), weight.values, weight.indices, scales(weight), planes)
    what = {**options(x, weight), "U": configs.EXPAND_BLOCKS}
    kernels().portable.gemv[(len(weight.values), len(x))](*tensors, weight.shape[0], weight.padded_columns, **what)
    return combined(planes, bias, x.dtype)


_compressed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by values tensor: a second, compressed copy of the weight


def run_cusparselt(x: Tensor, weight: Fragments, bias: Tensor | None, choice: Choice) -> Tensor:
    """The vendor's sparse library on a copy of its own, kept beside the weight: 0.56 of the dense bytes more."""
    if weight.values not in _compressed:
        dense = dense_weight(weight.values, weight.indices, weight.scale, weight.kind, *weight.shape, x.dtype)
        padded = F.pad(dense, (0, x.shape[1] - dense.shape[1]))
        _compressed[weight.values] = torch.sparse.to_sparse_semi_structured(padded)
    return F.linear(x, _compressed[weight.values], bias)


def run_torch(x: Tensor, weight: Fragments, bias: Tensor | None, choice: Choice) -> Tensor:
    """The last resort: the dense weight by plain torch."""
    n, k = weight.shape
    dense = dense_weight(weight.values, weight.indices, weight.scale, weight.kind, n, k, x.dtype)
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


def aligned(x: Tensor, columns: int) -> Tensor:
    """x with zeros up to `columns`, rows dense, from a multiple of 16 bytes on: the kernels copy 16 bytes at once."""
    x = F.pad(x, (0, columns - x.shape[1])) if x.shape[1] < columns else x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def product(x: Tensor, weight: Fragments, bias: Tensor | None, choice: Choice) -> Tensor:
    """x [B, K] @ weight^T + bias by the kernel that `choice` names, whether or not it was tested.  B is at least 1."""
    return RUNNERS[choice.backend](aligned(x, weight.padded_columns), weight, bias, choice)
