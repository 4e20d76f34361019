"""Which kernel serves which op on which device, and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from secateur.kernels.sparse24 import cpu
from secateur.kernels.sparse24.formats import FLOAT_KINDS, KINDS
from secateur.kernels.sparse24.ops import op_of


@dataclass(frozen=True)
class Served:
    """One line of the report: ``backend`` serves ``op`` with values of ``kind`` on ``device``, for
    ``reason``."""

    device: str
    op: str
    kind: str
    backend: str
    reason: str


def backend_report() -> list[Served]:
    """Every op and kind on every kind of device; loads the CPU kernels if that was not done yet."""
    found = cpu.backend()
    rows = [Served("cpu", op_of(kind), kind, found.name, found.reason) for kind in KINDS]
    rows += [
        Served("cpu", op_of(kind, sparse=False), kind, found.name, found.reason)
        for kind in ("int8", "int4")
    ]
    if torch.cuda.is_available():
        canonical = (
            "canonical tensors are expanded on CUDA: rearrange the weight for linear_24_fragment"
        )
        rows += [Served("cuda", op_of(kind), kind, "reference", canonical) for kind in KINDS]
    name, reason = _report_fragments()
    return rows + [
        Served("cuda", "linear_24_fragment", k, name, reason)
        for k in KINDS
        if k not in _NO_TENSOR_CORES
    ]


_NO_TENSOR_CORES = tuple(kind for kind, dtype in FLOAT_KINDS.items() if dtype == torch.float32)


def _report_fragments() -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "none", "no CUDA device"
    if find_spec("triton") is None:
        return "none", "triton is not installed: pip install 'secateur[kernels]'"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return (
            "none",
            f"sparse tensor cores need compute capability 8.0, this device has {major}.{minor}",
        )
    return "gpu", f"sparse tensor cores of compute capability {major}.{minor}"
