"""The launches themselves, without a GPU: Triton binds the arguments and compiles as it would on a
device.

Catches what ahead-of-time compilation by hand cannot: a missing argument, one that cannot be
hashed, an integer that the just-in-time compiler makes a constant.  Only the last step, handing
machine code to the driver, is left out.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from secateur.kernels.sparse24.gpu import configs, launch
from secateur.kernels.sparse24.gpu.configs import KernelChoice
from secateur.kernels.sparse24.gpu.fragments import FLOATS, pack_fragments
from secateur.kernels.sparse24.gpu.health import random_weight


def pretend(capability: int) -> None:
    """Tells Triton of a device with that capability, and to stop before the driver would be
    asked."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", capability, 32)
    told = {"get_current_device": 0, "get_current_stream": 0, "get_current_target": target}
    driver.set_active(
        SimpleNamespace(**{name: (lambda *_, value=value: value) for name, value in told.items()})
    )
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kw: run(
        self, *args, grid=grid, warmup=True, **kw
    )


def cases() -> list[tuple[str, int, int, KernelChoice]]:
    """(kind, n, batch, choice): each kernel and kind, whole and split; batches and weights of one
    row."""
    found = []
    for kind in ("bfloat16", "float16", "int8", "int4"):
        values = configs.value_kind(kind)
        decode, gemm = configs.DECODE[values][0], configs.GEMM[values][0]
        found += [
            (kind, 72, 1, KernelChoice("decode", decode)),
            (kind, 1, 5, KernelChoice("decode", decode, 3)),
        ]
        found += [
            (kind, 72, 37, KernelChoice("gemm", gemm)),
            (kind, 1, 1, KernelChoice("gemm", gemm, 2)),
        ]
        found += [(kind, 72, 3, KernelChoice("expand")), (kind, 1, 1, KernelChoice("portable"))]
        found += (
            [(kind, 72, 133, KernelChoice("wgmma", configs.WGMMA[0]))] if kind in FLOATS else []
        )
    return found


def launched(capability: int) -> dict[str, str]:
    """Errors by case; empty text: it would be launched."""
    pretend(capability)
    found = {}
    for kind, n, batch, choice in cases():
        name = f"{choice.backend} {kind} n {n} batch {batch} splits {choice.splits}"
        found[name] = error(kind, n, batch, choice)
    return found


def error(kind: str, n: int, batch: int, choice: KernelChoice) -> str:
    x: Any = torch.randn(batch, 196).to(FLOATS.get(kind, torch.bfloat16))
    bias = torch.randn(n).to(x.dtype) if batch % 2 else None
    try:
        y = launch.launch_product(x, pack_fragments(random_weight(n, 196, kind)), bias, choice)
        return "" if y.shape == (batch, n) else f"shape {tuple(y.shape)}"
    except Exception as problem:
        cause = problem.__cause__ or problem
        return f"{type(cause).__name__}: {str(cause)[-1500:]}"
