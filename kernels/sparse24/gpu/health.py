"""Which kernel may serve on a device: each is tested there once, on small odd products, before it
is relied on."""

from __future__ import annotations

import logging
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.kernels.sparse24.formats import FLOAT_KINDS, LEVELS, Packed24, pack
from secateur.kernels.sparse24.gpu.configs import Config, KernelChoice
from secateur.kernels.sparse24.gpu.fragments import FLOATS, pack_fragments
from secateur.kernels.sparse24.gpu.launch import launch_product

logger = logging.getLogger(__name__)
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}
FLOAT_SUMS = 2.0**-19
SHAPES = {
    "decode": (72, 1216, 5),
    "gemm": (72, 704, 37),
    "wgmma": (72, 704, 133),
}  # N, K, B of the self-test
SMALL = (72, 704, 3)
CAPABILITY = {"decode": 80, "gemm": 80, "wgmma": 90, "cusparselt": 80}
ROUNDS_WEIGHT = ("expand", "cusparselt", "torch")  # level times scale is rounded to the dtype of x


class Chip(NamedTuple):
    """A CUDA device; `capability` is 10 * major + minor."""

    name: str
    capability: int
    multiprocessors: int


class Asked(NamedTuple):
    """A kernel that was asked for, and why it does not serve there; `trouble` empty: it does."""

    backend: str
    kind: str
    dtype: torch.dtype
    device: str
    trouble: str


@lru_cache
def find_chip(device: torch.device) -> Chip:
    """What a device is, asked once."""
    found = torch.cuda.get_device_properties(device)
    return Chip(
        str(found.name), 10 * int(found.major) + int(found.minor), int(found.multi_processor_count)
    )


def report_asked() -> list[Asked]:
    """What was asked for in this process, in order."""
    return list(_asked.values())


@cache
def find_trouble(
    backend: Any, config: Config | None, kind: str, dtype: torch.dtype, device: torch.device
) -> str:
    """Why a kernel does not serve on a device; empty: it does.  The first question runs its
    self-test and logs."""
    place = find_chip(device)
    found = explain_unfit(backend, kind, place) or self_test(
        KernelChoice(backend, config), kind, dtype, device
    )
    _asked[(backend, config, kind, dtype, device)] = Asked(backend, kind, dtype, place.name, found)
    if found:
        logger.warning(
            "2:4 kernel %s for %s with %s does not serve on %s: %s",
            backend,
            kind,
            dtype,
            place.name,
            found,
        )
    return found


_asked: dict[tuple[Any, ...], Asked] = {}


def explain_unfit(backend: str, kind: str, place: Chip) -> str:
    """Why a device or a kind is not for this kernel; empty: it is."""
    needs = CAPABILITY.get(backend, 0)
    reasons = [
        (torch.version.hip is not None, "not an NVIDIA device"),
        (
            place.capability < needs,
            f"needs compute capability {needs / 10}, the device has {place.capability / 10}",
        ),
        (
            backend == "wgmma" and place.capability >= 100,
            "its instruction exists on compute capability 9.0 alone",
        ),
        (
            backend == "wgmma" and kind not in FLOATS,
            f"takes bfloat16 and float16 weights, not {kind}",
        ),
    ]
    return next((text for wrong, text in reasons if wrong), "")


def self_test(choice: KernelChoice, kind: str, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with a kernel on a device, by small odd products, K whole and split; empty:
    nothing."""
    n, k, batch = SHAPES.get(choice.backend, SMALL)
    packed = random_weight(n, k, kind)
    x = torch.randn(batch, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(dtype)
    rounds = choice.backend in ROUNDS_WEIGHT
    try:
        weight = pack_fragments(packed.to(device))
        for splits, b in ((1, None), (3 if choice.backend in ("decode", "gemm") else 1, bias)):
            case = KernelChoice(choice.backend, choice.config, splits)
            y = launch_product(
                x.to(device), weight, None if b is None else b.to(device), case
            ).cpu()
            if wrong := describe_difference(y, x, packed, b, rounds):
                return f"self-test, K in {splits}: {wrong}"
    except (
        Exception
    ) as error:  # of the compiler, the driver or a library: another kernel serves, and this is why
        return f"self-test: {type(error).__name__}: {str(error)[-300:]}"
    return ""


def describe_difference(
    y: Tensor, x: Tensor, packed: Packed24, bias: Tensor | None = None, rounds_weight: bool = False
) -> str:
    """What is wrong with y [B, N] as x @ weight^T + bias; empty: each is right up to its rounding
    and fp32 sums.

    Allowed: a unit in the last place of y, and 2^-19 of sum |x| |w| (with `rounds_weight` also a
        unit of each weight).
    """
    dense = packed.to_dense(torch.float32).double()
    if bias is None:
        shift = torch.zeros(len(dense), dtype=torch.float64)
    else:
        shift = bias.double()
    exact = F.linear(x.double(), dense, shift)
    mass = F.linear(x.double().abs(), dense.abs(), shift.abs())
    if rounds_weight and packed.kind in LEVELS:
        weight_error = ULP[x.dtype]
    else:
        weight_error = 0.0
    allowed = ULP[y.dtype] * exact.abs() + (FLOAT_SUMS + weight_error) * mass + 1e-7
    bad = ~((y.double() - exact).abs() <= allowed)
    if not bool(bad.any()):
        return ""
    row, column = bad.nonzero()[0].tolist()
    first = (
        f"y[{row}, {column}] is {float(y[row, column]):.6g}, not {float(exact[row, column]):.6g}"
    )
    return f"{int(bad.sum())} of {bad.numel()} results are wrong, {first}"


def random_weight(n: int, k: int, kind: str, seed: int = 0, device: str = "cpu") -> Packed24:
    """A random 2:4 weight [n, k], k a multiple of 4; some groups hold fewer than two non-zeros."""
    generator = torch.Generator(device).manual_seed(seed)
    rank = torch.rand(n, k // 4, 4, generator=generator, device=device).argsort(-1).argsort(-1)
    kept = (rank < 2).view(n, k) & (torch.rand(n, k, generator=generator, device=device) > 0.1)
    dense = torch.randn(n, k, generator=generator, device=device) * kept
    if kind in FLOAT_KINDS:
        return pack(dense.to(FLOAT_KINDS[kind]))
    low, high = LEVELS[kind]
    shape = (n,) if kind == "int8" else (n, -(-k // 128))
    scale = torch.rand(shape, generator=generator, device=device) / high + 0.5 / high
    return pack((dense * high / 3).round().clamp(low, high).to(torch.int8), kind, scale)
