"""The 2:4 products on one GPU: first whether they are right, then their times against the vendor's
libraries.

    python benchmarks/kernels_gpu.py --out FOLDER [--tune]      # --dry-run says what it would do,
    on any machine

Each product runs over several copies of its weight, more bytes than the last-level cache holds,
captured in one CUDA graph, so that neither the cache nor the launches of Python flatter it.
Candidates are timed in turn, round after round; medians and spread are over rounds.  What is not
right at a shape is not timed there, and the program then ends with status 1 (cuSPARSELt and the
experimental warpgroup kernel are only reported). Writes kernels_gpu.json and kernels_gpu.md, and
with --tune table.json, which SECATEUR_GPU_TABLE=.../table.json selects.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.kernels.sparse24.formats import Packed24
from secateur.kernels.sparse24.gpu import configs, health
from secateur.kernels.sparse24.gpu.configs import KernelChoice
from secateur.kernels.sparse24.gpu.fragments import Fragments, pack_fragments
from secateur.kernels.sparse24.gpu.launch import launch_product

SHAPES = {  # Llama-3.1-8B, N x K: projections with a common input are one product
    "query-key-value": (6144, 4096),
    "attention output": (4096, 4096),
    "gate and up": (28672, 4096),
    "down": (4096, 14336),
}
BATCHES = (1, 4, 8, 16, 32, 64, 256, 1024, 4096)
KINDS = ("bfloat16", "int8", "int4")
CYCLED_BYTES = 400e6
OPTIONAL = ("wgmma", "cusparselt")
BARS = {
    "bfloat16": 1.5,
    "int8": 2.4,
    "int4": 3.2,
}  # times cuBLAS bf16, batch 1-16, on the large layers


@dataclass
class Row:
    """One candidate at one shape and batch; times in microseconds a product; `red`: why it was not
    timed."""

    layer: str
    n: int
    k: int
    batch: int
    kind: str
    backend: str
    config: dict[str, Any] | None = None
    splits: int = 1
    red: str = ""
    microseconds: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    speedup: float = float("nan")  # of dense bf16 by cuBLAS
    roofline: float = float(
        "nan"
    )  # share of the measured bandwidth, by the bytes that must be read and written
    samples: list[float] = field(default_factory=list, repr=False)


def candidates(
    kind: str, n: int, k: int, batch: int, capability: int, many: int, tune: bool
) -> Iterator[KernelChoice]:
    """The guess alone, or with --tune every kernel, configuration and split that can serve."""
    first = configs.guess_config(kind, n, k, batch, capability, many)
    yield first
    values = configs.value_kind(kind)
    if batch > 16:
        yield from (KernelChoice("expand"),) if first.backend != "expand" else ()
        yield from (
            KernelChoice("wgmma", c)
            for c in configs.WGMMA
            if kind == "bfloat16" and capability == 90
        )
    if batch >= 16 and kind == "bfloat16":
        yield KernelChoice("cusparselt")
    if not tune:
        yield from (KernelChoice("gemm", configs.GEMM[values][0]),) if batch > 256 else ()
        return
    decode = [c for c in configs.DECODE[values] if 8 * c.nt >= batch]
    gemm = [c for c in configs.GEMM[values] if batch >= 16]
    for splits in (1, 2, 4, 8):
        yield from (KernelChoice("decode", c, splits) for c in decode)
        yield from (KernelChoice("gemm", c, splits) for c in gemm if splits == 1 or batch <= 256)


def plan(
    options: argparse.Namespace, capability: int, many: int
) -> list[tuple[str, int, str, list[KernelChoice]]]:
    """(layer, batch, kind, candidates), each candidate once."""
    found = []
    for layer in options.layers:
        for batch in options.batches:
            for kind in options.kinds:
                every = candidates(kind, *SHAPES[layer], batch, capability, many, options.tune)
                unlike = {(c.backend, c.config, c.splits): c for c in every}
                found.append((layer, batch, kind, list(unlike.values())))
    return found


def bytes_moved(kind: str, n: int, k: int, batch: int) -> float:
    """Of one product at the least: weight, indices, scales, x and y.  `dense`: bf16."""
    weight = {"dense": 2.0, "bfloat16": 1.125, "int8": 0.625, "int4": 0.390625}[kind]
    return weight * n * k + 2 * batch * (n + k) + (4 * n if kind == "int8" else 0)


class Cycled:
    """One product over each of several weights, as a CUDA graph; `times` gives microseconds a
    product of one replay."""

    def __init__(self, calls: list[Callable[[], Tensor]]) -> None:
        self.n = len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()
        self.graph.replay()

    def time(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / self.n


def bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(int(2e9), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timed = Cycled([lambda: target.copy_(source)] * 3)
    return 2 * source.numel() / (min(timed.time() for _ in range(5)) * 1e-6)


def checked(y: Tensor, x: Tensor, packed: Packed24, backend: str) -> str:
    return health.describe_difference(y, x, packed, None, backend in health.ROUNDS_WEIGHT)


@functools.lru_cache(maxsize=len(KINDS))
def weights_of(n: int, k: int, kind: str, cycled_bytes: float) -> tuple[Packed24, list[Fragments]]:
    """A random weight and its copies in fragment order, together at least `cycled_bytes` and
    two."""
    packed = health.random_weight(n, k, kind, device="cuda")
    first = pack_fragments(packed)
    rest = range(1, max(2, math.ceil(cycled_bytes / first.nbytes)))
    return packed, [first, *(pack_fragments(packed) for _ in rest)]


def prepare(
    row: Row, choice: KernelChoice, x: Tensor, packed: Packed24, weights: list[Fragments]
) -> Cycled | None:
    """The candidate ready to be timed; None, and the reason in `row.red`, where it is not right."""
    try:
        row.red = checked(launch_product(x, weights[0], None, choice), x, packed, choice.backend)
        if row.red:
            return None
        return Cycled([lambda w=weight: launch_product(x, w, None, choice) for weight in weights])
    except Exception as error:
        row.red = f"{type(error).__name__}: {str(error)[-300:]}"
        return None


def measure(
    layer: str, batch: int, options: argparse.Namespace, todo: list[tuple[str, list[KernelChoice]]]
) -> list[Row]:
    """All candidates of one layer and batch beside dense bf16, interleaved."""
    n, k = SHAPES[layer]
    x = torch.randn(batch, k, device="cuda").bfloat16()
    copies = range(max(2, math.ceil(options.cycled_bytes / (2 * n * k))))
    dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in copies]
    rows = [Row(layer, n, k, batch, "dense", "cublas")]
    timed: list[Cycled | None] = [Cycled([lambda w=weight: F.linear(x, w) for weight in dense])]
    for kind, choices in todo:
        packed, weights = weights_of(n, k, kind, options.cycled_bytes)
        for choice in choices:
            config = None if choice.config is None else asdict(choice.config)
            rows.append(Row(layer, n, k, batch, kind, choice.backend, config, choice.splits))
            timed.append(prepare(rows[-1], choice, x, packed, weights))
    for _ in range(options.rounds):
        for row, cycled in zip(rows, timed, strict=True):
            if cycled is not None:
                row.samples.append(cycled.time())
    return rows


def summarise(rows: list[Row], bytes_per_second: float) -> None:
    base = statistics.median(rows[0].samples)
    for row in (r for r in rows if r.samples):
        row.microseconds, row.low, row.high = (
            statistics.median(row.samples),
            min(row.samples),
            max(row.samples),
        )
        row.speedup = base / row.microseconds
        row.roofline = (
            bytes_moved(row.kind, row.n, row.k, row.batch)
            / (row.microseconds * 1e-6)
            / bytes_per_second
        )


def best(rows: list[Row]) -> list[Row]:
    """The fastest row of each layer, batch and kind, dense first."""
    found: dict[tuple[str, int, str], Row] = {}
    for row in (r for r in rows if r.samples):
        key = (row.layer, row.batch, row.kind)
        if key not in found or row.microseconds < found[key].microseconds:
            found[key] = row
    return list(found.values())


def markdown(report: dict[str, Any], rows: list[Row]) -> str:
    machine = report["machine"]
    lines = [
        f"# 2:4 products on {machine['device']}",
        "",
        f"torch {machine['torch']}, Triton {machine['triton']}, "
        f"{machine['gigabytes_per_second']:.0f} GB/s by a copy.",
        "Medians over rounds, weights cycled past the caches, one CUDA graph; speed-up over dense "
        "bf16 by cuBLAS.",
        "",
        "| layer | N x K | batch | values | kernel | us | low .. high | speed-up | roofline |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in best(rows):
        spread, shape = f"{r.low:.1f} .. {r.high:.1f}", f"{r.n} x {r.k}"
        numbers = f"{r.microseconds:.1f} | {spread} | {r.speedup:.2f} | {r.roofline:.0%}"
        lines.append(f"| {r.layer} | {shape} | {r.batch} | {r.kind} | {r.backend} | {numbers} |")
    red = [r for r in rows if r.red]
    lines += ["", f"Not timed, because not right or not there: {len(red)}", ""]
    lines += [
        f"* {r.layer}, batch {r.batch}, {r.kind}, {r.backend} {r.config or ''}: {r.red}"
        for r in red
    ]
    return "\n".join(lines) + "\n"


def tuned(rows: list[Row], device: str) -> dict[str, Any]:
    """The fastest kernel of each shape as a table that the kernels read; dense is no row of it."""
    fastest = [r for r in best(rows) if r.kind != "dense"]
    found = [
        {
            key: getattr(r, key)
            for key in ("kind", "n", "k", "batch", "microseconds", "backend", "config", "splits")
        }
        for r in fastest
    ]
    return {"version": configs.TABLE_VERSION, "devices": {device: found}}


def machine(chip: health.Chip) -> dict[str, Any]:
    import triton

    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    return {
        "device": chip.name,
        "capability": chip.capability,
        "multiprocessors": chip.multiprocessors,
        **versions,
    }


def dry_run(options: argparse.Namespace) -> None:
    """What would be done, by the guesses for a Hopper of 132 multiprocessors."""
    steps = plan(options, 90, 132)
    for layer, batch, kind, choices in steps:
        names = ", ".join(sorted({c.backend for c in choices}))
        n, k = SHAPES[layer]
        print(
            f"{layer:18} {n:6} x {k:5}  batch {batch:5}  {kind:9} {len(choices):3} "
            f"candidates: {names}"
        )
    total = sum(len(choices) for *_, choices in steps)
    shapes = len({(c.backend, c.config, kind) for _, _, kind, choices in steps for c in choices})
    print(
        f"{total} candidates, {options.rounds} rounds: each is compared with the exact product "
        "before it is timed"
    )
    print(
        f"about {total * (0.15 + options.rounds * 0.01) + 3 * shapes:.0f} s, of these {3 * shapes} "
        "s for compiling"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("kernels-gpu"), help="folder for the results"
    )
    parser.add_argument("--layers", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cycled-bytes", type=float, default=CYCLED_BYTES)
    parser.add_argument(
        "--tune", action="store_true", help="time every configuration and write a table of the best"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.dry_run:
        dry_run(options)
        return 0
    if not torch.cuda.is_available():
        print(
            "no CUDA device: nothing can be measured here; --dry-run prints the plan",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    chip = health.find_chip(torch.device("cuda", torch.cuda.current_device()))
    facts = {**machine(chip), "gigabytes_per_second": bandwidth() / 1e9}
    print(json.dumps(facts))
    steps, rows = plan(options, chip.capability, chip.multiprocessors), []
    for layer, batch in dict.fromkeys((layer, batch) for layer, batch, *_ in steps):
        todo = [
            (kind, choices) for at, size, kind, choices in steps if (at, size) == (layer, batch)
        ]
        found = measure(layer, batch, options, todo)
        summarise(found, facts["gigabytes_per_second"] * 1e9)
        rows += found
        for row in best(found):
            name = f"{layer:18} batch {batch:5} {row.kind:9} {row.backend:10}"
            print(f"{name} {row.microseconds:9.1f} us {row.speedup:5.2f}x")
        torch.cuda.empty_cache()
        report = {"machine": facts, "bars": BARS, "rows": [asdict(row) for row in rows]}
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kernels_gpu.json").write_text(json.dumps(report, indent=1))
        (options.out / "kernels_gpu.md").write_text(markdown(report, rows))
        if options.tune:
            (options.out / "table.json").write_text(json.dumps(tuned(rows, chip.name), indent=1))
    wrong = [row for row in rows if row.red and row.backend not in OPTIONAL]
    for row in wrong:
        print(
            f"RED {row.layer} batch {row.batch} {row.kind} {row.backend} {row.config}: {row.red}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
