"""The CPU kernels beside torch's own and beside our own dense loops, layer by layer.

Run ``python benchmarks/kernels_cpu.py --out FOLDER`` on a quiet machine.  Writes kernels_cpu.json
and kernels_cpu.md. All rows of a shape and batch run in turn, one call each, round after round,
over enough copies of the weight that none is in a cache when its turn comes.  A kernel whose result
is not that of the reference is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.kernels.sparse24 import cpu, pack, pack_dense
from secateur.kernels.sparse24.reference import linear as reference
from secateur.kernels.sparse24.selftest import TOLERANCE
from secateur.tools.machine import describe_machine

SHAPES = "4096x4096,11008x4096"
BATCHES = "1,2,4,8,16,32"
# What must be reached at batch 1: (row, baseline, factor).
BARS = (
    ("2:4 bf16", "own dense bf16", 1.5),
    ("2:4 bf16", "torch bf16", 3.0),
    ("2:4 fp32", "torch fp32", 1.8),
)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass
class Row:
    """A competitor: how it multiplies, and its copies of one weight."""

    name: str
    dtype: torch.dtype
    run: Callable[..., Tensor]
    copies: list[tuple[Tensor, ...]]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.copies[0])


def sparse_weight(rows: int, columns: int) -> Tensor:
    """[rows, columns] of normal numbers, the two largest of each four kept."""
    groups = torch.randn(rows, columns // 4, 4)
    kept = groups.abs().topk(2, -1).indices
    return torch.zeros_like(groups).scatter_(-1, kept, groups.gather(-1, kept)).view(rows, columns)


def levels_of(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    groups = weight.view(weight.shape[0], -1, 128 if kind == "int4" else weight.shape[1])
    scale = groups.abs().amax(-1) / (7 if kind == "int4" else 127)
    scale = scale.bfloat16() if kind == "int4" else scale
    levels = (
        (groups / scale.float()[..., None])
        .round()
        .clamp(-7 if kind == "int4" else -127, 7 if kind == "int4" else 127)
    )
    return levels.view_as(weight).to(torch.int8), scale if kind == "int4" else scale[:, 0]


def own(x: Tensor, values: Tensor, mask: Tensor | None, scale: Tensor | None) -> Tensor:
    y = torch.empty(x.shape[0], values.shape[0], dtype=x.dtype)
    torch.ops.secateur_cpu.linear_out(x, values, mask, scale, None, y)
    return y


def rows_of(weight: Tensor, cache_bytes: int) -> list[Row]:
    """Every competitor, with copies that together are four times the caches."""
    found: list[Row] = []

    def add(name: str, dtype: torch.dtype, run: Callable[..., Tensor], *tensors: Tensor) -> None:
        count = max(2, -(-4 * cache_bytes // sum(t.nbytes for t in tensors)))
        found.append(
            Row(name, dtype, run, [tuple(t.clone() for t in tensors) for _ in range(count)])
        )

    narrow = weight.bfloat16()
    add("torch fp32", F32, F.linear, weight)
    add("torch bf16", BF16, F.linear, narrow)
    add("own dense fp32", F32, lambda x, w: own(x, w, None, None), weight)
    add("own dense bf16", BF16, lambda x, w: own(x, w, None, None), narrow)
    for name, dtype in (("fp32", F32), ("fp16", F16), ("bf16", BF16)):
        packed = pack(weight.to(dtype))
        add(f"2:4 {name}", dtype, lambda x, v, m: own(x, v, m, None), packed.values, packed.mask)
    for kind in ("int8", "int4"):
        levels, scale = levels_of(weight, kind)
        packed = pack(levels, kind, scale)
        assert packed.scale is not None
        add(f"2:4 {kind}", BF16, own, packed.values, packed.mask, packed.scale)
        add(f"dense {kind}", BF16, lambda x, v, s: own(x, v, None, s), *pack_dense(levels, scale))
        if kind == "int8":
            add("torch int8", BF16, torch._weight_int8pack_mm, levels, scale.bfloat16())
    return found


def check(row: Row, x: Tensor) -> str:
    """Why a row may not be timed; empty: its result is the reference's."""
    tensors = row.copies[0]
    quantized = tensors[0].dtype in (torch.int8, torch.uint8)
    mask = tensors[1] if row.name.startswith("2:4") else None
    wanted = reference(x, tensors[0], mask, tensors[-1] if quantized else None, None).float()
    worst = float((row.run(x, *tensors).float() - wanted).abs().max() / wanted.abs().max())
    return "" if worst <= 2 * TOLERANCE[row.dtype] else f"relative error {worst:.2g}"


@torch.inference_mode()
def measure(rows: list[Row], columns: int, batch: int, seconds: float) -> list[dict[str, Any]]:
    """Interleaved calls for about ``seconds``; medians and quartiles in milliseconds."""
    inputs = {dtype: torch.randn(batch, columns).to(dtype) for dtype in (F32, F16, BF16)}
    red = {row.name: why for row in rows if (why := check(row, inputs[row.dtype]))}
    times: dict[str, list[float]] = {row.name: [] for row in rows if row.name not in red}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 5:
        for row in rows:
            if row.name in times:
                tensors = row.copies[turn % len(row.copies)]
                start = time.perf_counter()
                row.run(inputs[row.dtype], *tensors)
                times[row.name].append(1e3 * (time.perf_counter() - start))
        turn += 1
    return [result(row, times.get(row.name), red.get(row.name, "")) for row in rows]


def result(row: Row, times: list[float] | None, red: str) -> dict[str, Any]:
    if not times:
        return {"row": row.name, "bytes": row.nbytes, "not_timed": red}
    low, middle, high = statistics.quantiles(times, n=4)
    gbps = row.nbytes / middle / 1e6
    return {"row": row.name, "bytes": row.nbytes, "median_ms": middle, "quartiles_ms": [low, high],
            "best_ms": min(times), "gbps": gbps, "calls": len(times)}  # fmt: skip


def cache_bytes() -> int:
    """The largest cache of the processor; 32 MB where the system does not say."""
    sizes = [
        p.read_text().strip()
        for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(s[:-1]) << {"K": 10, "M": 20}[s[-1]] for s in sizes), default=32 << 20)


def bars(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for case in (c for c in results if c["batch"] == 1):
        at = {r["row"]: r.get("median_ms") for r in case["rows"]}
        for name, baseline, factor in BARS:
            reached = at[baseline] / at[name] if at.get(name) and at.get(baseline) else None
            found.append(
                {
                    "shape": case["shape"],
                    "row": name,
                    "over": baseline,
                    "bar": factor,
                    "reached": reached,
                    "ok": reached is not None and reached >= factor,
                }
            )
    return found


def markdown(report: dict[str, Any]) -> str:
    machine, lines = report["machine"], ["# 2:4 kernels on a CPU", ""]
    lines += [f"{machine['processor']}, {machine['torch_threads']} threads, torch "
              f"{machine['versions']['torch']}; "
              f"load average before: {report['load_average']:.2f}; kernels: "
              f"{report['backend']}.", ""]  # fmt: skip
    lines += ["| shape | row | over | bar | reached |", "|---|---|---|---|---|"]
    for b in report["bars"]:
        reached = "not timed" if b["reached"] is None else f"{b['reached']:.2f} x"
        lines.append(
            f"| {b['shape']} | {b['row']} | {b['over']} | {b['bar']} x | {reached} "
            f"{'' if b['ok'] else '(missed)'} |"
        )
    for case in report["results"]:
        base = next((r.get("median_ms") for r in case["rows"] if r["row"] == "torch bf16"), None)
        lines += ["", f"## {case['shape']}, batch {case['batch']}", ""]
        lines += [
            "| row | MB | median ms | quartiles | GB/s | torch bf16 / this |",
            "|---|---|---|---|---|---|",
        ]
        for r in case["rows"]:
            if "not_timed" in r:
                lines.append(
                    f"| {r['row']} | {r['bytes'] / 1e6:.1f} | not timed: {r['not_timed']} | | | |"
                )
                continue
            low, high = r["quartiles_ms"]
            ratio = f"{base / r['median_ms']:.2f} x" if base else ""
            lines.append(f"| {r['row']} | {r['bytes'] / 1e6:.1f} | {r['median_ms']:.3f} | "
                         f"{low:.3f}-{high:.3f} | "
                         f"{r['gbps']:.1f} | {ratio} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--shapes", default=SHAPES, help="NxK,...")
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice if not given")
    parser.add_argument("--seconds", type=float, default=20, help="for one shape and batch")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not cpu.is_active():
        raise SystemExit(f"nothing to measure: {cpu.backend().reason}")
    torch.manual_seed(0)
    report: dict[str, Any] = {"machine": describe_machine(), "load_average": os.getloadavg()[0],
                              "backend": cpu.backend().reason, "results": []}  # fmt: skip
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        rows = rows_of(sparse_weight(n, k), cache_bytes())
        for batch in map(int, args.batches.split(",")):
            case = {"shape": shape, "batch": batch, "rows": measure(rows, k, batch, args.seconds)}
            report["results"].append(case)
            report["bars"] = bars(report["results"])
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "kernels_cpu.json").write_text(json.dumps(report, indent=1) + "\n")
            (args.out / "kernels_cpu.md").write_text(markdown(report))
            print(
                f"{shape} batch {batch}: "
                + ", ".join(f"{r['row']} {r.get('median_ms', 0):.3f}" for r in case["rows"])
            )
    print(markdown(report).split("\n## ")[0])


if __name__ == "__main__":
    main()
