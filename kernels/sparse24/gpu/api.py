"""The CUDA implementation of `secateur::linear_24_fragment` (``ops``): chooses a kernel and falls
back, never silently.

The order of a call: the choice of `configs.choose` (a measured row, else a guess); if that kernel
does not serve on the device (`health.trouble`: compute capability, self-test), a dense copy of the
weight made by the `expand` kernel and the vendor's product; else a dense copy made by plain torch.
Each refusal is logged once with its reason; `report` has all.

The first product of a kind compiles and tests kernels, which waits for the device: make it before
capturing a CUDA graph (`warm_up`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from secateur.kernels.sparse24.formats import LEVELS
from secateur.kernels.sparse24.gpu import configs, health
from secateur.kernels.sparse24.gpu.configs import KernelChoice
from secateur.kernels.sparse24.gpu.fragments import FLOATS, Fragments
from secateur.kernels.sparse24.gpu.health import report_asked
from secateur.kernels.sparse24.gpu.launch import launch_product

__all__ = ["linear_24_fragment", "report_asked", "serving", "warm_up"]
HALVES = (torch.bfloat16, torch.float16)


def linear_24_fragment(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kind: str,
    n: int,
) -> Tensor:
    """x @ weight^T + bias for a weight in fragment order (``fragments``), on the CUDA device of x.

    Args:
        x: [..., K] bfloat16 or float16, of the values' dtype for float kinds.
        bias: [n], dtype of x.

    Returns:
        [..., n], dtype of x, summed in fp32.

    Raises:
        ValueError: dtypes, devices or shapes disagree.
    """
    weight = Fragments(kind, (n, int(x.shape[-1])), values, indices, scale)
    check_operands(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], n)
    with torch.cuda.device(x.device):
        choice = serving(weight, len(rows), x.dtype, x.device)
        return launch_product(rows, weight, bias, choice).view(*x.shape[:-1], n)


def serving(
    weight: Fragments, batch: int, dtype: torch.dtype, device: torch.device
) -> KernelChoice:
    """The tested kernel that serves a product of this batch here; its `reason` says why, and what
    was refused."""
    place = health.find_chip(device)
    choice = configs.choose_config(
        weight.kind, *weight.shape, batch, place.name, place.capability, place.multiprocessors
    )
    refused: list[str] = []
    for candidate in (
        choice,
        KernelChoice("expand", reason="fallback"),
        KernelChoice("torch", reason="last resort"),
    ):
        trouble = health.find_trouble(
            candidate.backend, candidate.config, weight.kind, dtype, device
        )
        if not trouble:
            why = "; ".join([candidate.reason, *refused])
            return KernelChoice(candidate.backend, candidate.config, candidate.splits, why)
        refused.append(f"{candidate.backend}: {trouble}")
    raise RuntimeError(f"no way to multiply a 2:4 weight on {place.name}: {'; '.join(refused)}")


def warm_up(
    weights: Iterable[Fragments], batches: Iterable[int], dtype: torch.dtype
) -> list[KernelChoice]:
    """Chooses, compiles and tests the kernels for these weights and batches; the choices made,
    weight by weight."""
    sizes = list(batches)
    made = []
    for weight in weights:
        for batch in sizes:
            x = torch.zeros(batch, weight.shape[1], dtype=dtype, device=weight.values.device)
            n = weight.shape[0]
            linear_24_fragment(x, weight.values, weight.indices, weight.scale, None, weight.kind, n)
            made.append(serving(weight, batch, dtype, weight.values.device))
    return made


def check_operands(x: Tensor, weight: Fragments, bias: Tensor | None) -> None:
    """Raises ValueError where the operands of `linear_24_fragment` disagree."""
    n, k = weight.shape
    want = FLOATS.get(weight.kind, x.dtype)
    tensors = [t for t in (weight.values, weight.indices, weight.scale, bias) if t is not None]
    tiles = int(weight.values.shape[0])
    columns = weight.padded_columns
    troubles = [
        (
            weight.kind not in (*FLOATS, *LEVELS),
            f"kind {weight.kind!r}: expected bfloat16, float16, int8 or int4",
        ),
        (x.dtype not in HALVES, f"x is {x.dtype}: expected bfloat16 or float16"),
        (x.dtype != want, f"x is {x.dtype}, the weight {want}"),
        (
            (weight.scale is None) == (weight.kind in LEVELS),
            "int8 and int4 have a scale, floats have none",
        ),
        (not 0 <= columns - k < 128, f"x has {k} columns, the weight {columns}"),
        (not 0 <= 16 * tiles - n < 16, f"n is {n}, the weight has {tiles} x 16 rows"),
        (
            bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype),
            "bias is not [n] of the dtype of x",
        ),
        (any(t.device != x.device for t in tensors), f"x is on {x.device}, another operand is not"),
        (
            any(not t.is_contiguous() for t in tensors),
            "the weight's tensors and the bias must be contiguous",
        ),
    ]
    found = []
    for wrong, text in troubles:
        if wrong:
            found.append(text)
    if found:
        raise ValueError(f"secateur::linear_24_fragment: {'; '.join(found)}")
