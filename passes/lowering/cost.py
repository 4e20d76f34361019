"""A roofline model of products of a weight and a few rows: bytes over bandwidth, or FLOPs.

The model is a roofline with a fixed cost for each op; where the machine at hand was measured, the
measurement is used, and for shapes that were not, the part of the bandwidth that each form reached
on those that were.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from pydantic import TypeAdapter

from secateur.graph.errors import PipelineError
from secateur.graph.reading import reason_of
from secateur.passes.language.options import did_you_mean

DENSE = "dense"
SPARSE = "2:4"
INT8 = "int8"
INT4 = "int4"
SPARSE_INT8 = "2:4+int8"
SPARSE_INT4 = "2:4+int4"
KINDS = (DENSE, SPARSE, SPARSE_INT8, SPARSE_INT4, INT8, INT4)
BITS: Mapping[str, int | None] = {
    SPARSE_INT8: 8,
    INT8: 8,
    SPARSE_INT4: 4,
    INT4: 4,
    DENSE: None,
    SPARSE: None,
}
SMALLEST_PRODUCT = 256  # rows and columns
LONG_ENOUGH = 0.02  # seconds of a product
STREAM_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """One measured product: milliseconds of a kind for a weight [n, k] and so many rows of a
    dtype."""

    kind: str
    n: int
    k: int
    batch: int
    dtype: str
    ms: float


@dataclass(frozen=True)
class Machine:
    """What a plan is made for.

    bytes_per_s: of reading weights.
    flops_per_s: of dense products in 16 bits.   overhead_s: fixed, of each op.
    expands_above: rows above which a packed weight is made dense first.
    source: where the numbers come from.
    timings: products measured on it.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float
    overhead_s: float
    expands_above: int
    source: str
    timings: tuple[Timing, ...] = field(default=(), repr=False)

    def milliseconds(
        self, kind: str, n: int, k: int, batch: int, dtype: torch.dtype
    ) -> tuple[float, bool]:
        """(ms, measured) of ``y = x W^T`` with W [n, k] of a kind and x [batch, k] of a dtype.

        Args:
            kind: form of the weight.
            n: outputs.
            k: inputs.
            batch: rows of x.
            dtype: of x.
        """
        known = []
        for t in self.timings:
            if (t.kind, t.n, t.k, t.batch, t.dtype) == (kind, n, k, batch, _dtype_name(dtype)):
                known.append(t.ms)
        if known:
            return statistics.median(known), True
        return self._roofline_ms(kind, n, k, batch, dtype) / self._roofline_share(
            kind, batch, dtype
        ), False

    def _roofline_ms(self, kind: str, n: int, k: int, batch: int, dtype: torch.dtype) -> float:
        """Milliseconds of a product by the roofline model."""
        moved = weight_bytes(kind, n, k, dtype)
        if kind != DENSE and batch > self.expands_above:
            moved += 2 * weight_bytes(DENSE, n, k, dtype)
        computed = 2 * n * k * batch / (self.flops_per_s * (0.5 if dtype is torch.float32 else 1.0))
        return 1e3 * (max(moved / self.bytes_per_s, computed) + self.overhead_s)

    def _roofline_share(self, kind: str, batch: int, dtype: torch.dtype) -> float:
        """The part of the roofline that a kind reached where it was measured; 1 where it was
        not."""
        parts = []
        for t in self.timings:
            if (t.kind, t.batch, t.dtype) == (kind, batch, _dtype_name(dtype)):
                parts.append(self._roofline_ms(kind, t.n, t.k, batch, dtype) / t.ms)
        if parts:
            return statistics.median(parts)
        return 1.0


def weight_bytes(kind: str, n: int, k: int, dtype: torch.dtype) -> int:
    """Bytes of a weight [n, k] in a form: values, mask and scales (4 bytes a row, or 2 bytes for
    128 inputs).

    Args:
        kind: form of the weight.
        n: outputs.
        k: inputs.
        dtype: of dense and sparse values.
    """
    stored = -(-k // 8) * 8
    bits: Mapping[str, float] = {DENSE: 8.0 * dtype.itemsize, SPARSE: 4.0 * dtype.itemsize + 1}
    bits = {**bits, INT8: 8, INT4: 4, SPARSE_INT8: 5, SPARSE_INT4: 3}
    scales = {8: 4 * n, 4: 2 * n * -(-k // 128), None: 0}[BITS[kind]]
    return int(n * (k if kind == DENSE else stored) * bits[kind] / 8) + scales


DATA_SHEET = "published rates; kernels of ours were not timed on it"
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "h200": Machine("h200", 4.3e12, 788e12, 2e-6, 64, DATA_SHEET),
        "h100": Machine("h100", 3.0e12, 788e12, 2e-6, 64, DATA_SHEET),
        "a100": Machine("a100", 1.75e12, 280e12, 2e-6, 64, DATA_SHEET),
    }
)


def machine_named(name: str) -> Machine:
    """A machine of the table, ``here``, or one from a JSON file with the fields of ``Machine``.

    Args:
        name: of a machine, or a path.

    Raises:
        PipelineError: no such machine, or a file that does not hold one.
    """
    if name == "here":
        return measure_machine()
    if name in MACHINES:
        return MACHINES[name]
    if not name.endswith(".json"):
        raise PipelineError(
            f"machine={name!r} is unknown; {did_you_mean(name, ['here', *MACHINES])} Or give "
            "a .json file"
        )
    try:
        fields = json.loads(Path(name).read_text("utf-8"))
        machine: Machine = TypeAdapter(Machine).validate_python(fields)
        return machine
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise PipelineError(f"{name} does not describe a machine: {reason_of(error)}") from error


@functools.cache
def measure_machine() -> Machine:
    """The machine this runs on: its bandwidth and rate, measured in about a second, and its
    timings, where kept."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    bandwidth = stream_bandwidth(device)
    rate = _product_rate(device)
    timings = read_timings()
    if timings:
        source = f"measured here, {len(timings)} products timed"
    else:
        source = "bandwidth and rate measured here, products modelled"
    return Machine(
        "here", bandwidth, rate, 4e-6 if gpu else 3e-6, 64 if gpu else 16, source, timings
    )


def stream_bandwidth(device: torch.device) -> float:
    """Bytes a second of reading memory past the caches: the best of a few sums over 256 MiB.

    Args:
        device: whose memory is read.
    """
    data = torch.zeros(STREAM_BYTES // 4, device=device)
    return STREAM_BYTES / min(_measure_seconds(lambda: data.sum(), device) for _ in range(7))


def _product_rate(device: torch.device) -> float:
    """Operations a second of a dense product in bfloat16.

    The product grows until it takes long enough to be timed: where a processor has no instruction
    for it, a large one would take minutes.
    """
    if device.type == "cpu":
        largest = 2048
    else:
        largest = 8192
    width = SMALLEST_PRODUCT
    while True:
        a = torch.ones(width // 2, width, dtype=torch.bfloat16, device=device)
        b = torch.ones(width, width, dtype=torch.bfloat16, device=device)
        seconds = min(
            _measure_seconds(functools.partial(torch.matmul, a, b), device) for _ in range(3)
        )
        if width >= largest or seconds >= LONG_ENOUGH:
            return width**3 / seconds
        width *= 2


def _measure_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with the device synchronised."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def machine_fingerprint() -> dict[str, object]:
    """What timings depend on; those of another machine, thread count or torch are not used."""
    return {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def timings_file() -> Path:
    """Where timings are kept: ``$SECATEUR_TIMINGS``, or ``secateur/timings.json`` in the user's
    cache folder."""
    path = os.environ.get("SECATEUR_TIMINGS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if path:
        return Path(path)
    return cache / "secateur" / "timings.json"


def read_timings() -> tuple[Timing, ...]:
    """The timings kept for this machine; none where there is no such file, or it is another
    machine's."""
    try:
        timings = json.loads(timings_file().read_text("utf-8"))
        if timings["fingerprint"] == machine_fingerprint():
            rows = timings["timings"]
        else:
            rows = ()
        return tuple(Timing(**row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()


def keep_timings(timings: Iterable[Timing]) -> Path:
    """Replace the timings kept for this machine; whole or not at all.

    Args:
        timings: measured on this machine.

    Returns:
        path of the file.
    """
    file = timings_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(
        json.dumps(
            {"fingerprint": machine_fingerprint(), "timings": [vars(t) for t in timings]}, indent=1
        )
        + "\n"
    )
    os.replace(part, file)
    measure_machine.cache_clear()
    return file


def _dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")
