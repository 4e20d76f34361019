"""What repair is worth: one-shot width pruning of the demo's model, with and without it, on held-out text.

Run ``python benchmarks/repair.py --out FOLDER`` after ``make assets``.  Writes repair.json and repair.md, row by row.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

import secateur
from secateur.passes.base import Context
from secateur.passes.data import samples
from secateur.tools.corpus import TokenWindows, calibration_windows, token_stream
from secateur.tools.demo.assets import MODEL_FOLDER, default_cache, text
from secateur.tools.machine import describe_machine, peak_memory_bytes

METRICS = ("activation", "wanda", "flap")
RATIOS = (0.5, 0.25)
REPAIRS = ("", "repair{target=own}", "repair{target=stream}")
CALIBRATION, WINDOW, HELD_OUT = 10_240, 512, 4_608


@torch.no_grad()
def quality(program: Any, windows: torch.Tensor, reference: list[torch.Tensor] | None, end: int) -> dict[str, float]:
    """Perplexity, and mean and 99 % quantile of the KL(dense || pruned) of a token, nats; end tokens are no targets."""
    losses, kls = [], []
    for at, row in enumerate(windows):
        logs = F.log_softmax(program(input_ids=row[None]).logits[0, :-1].float(), -1)
        counted = row[1:] != end
        losses.append(F.nll_loss(logs, row[1:], reduction="none")[counted])
        if reference is not None:
            kls.append((reference[at].exp() * (reference[at] - logs)).sum(-1)[counted])
    found = {"perplexity": math.exp(torch.cat(losses).double().mean().item())}
    if kls:
        kl = torch.cat(kls).double()
        found |= {"kl": kl.mean().item(), "kl_q99": kl.quantile(0.99).item()}
    return found


def pipelines(only: str) -> list[str]:
    rows = [
        ",".join(filter(None, [f"score{{metric={metric}}}", f"prune-width{{mlp={ratio}}}", repair]))
        for ratio in RATIOS
        for metric in METRICS
        for repair in REPAIRS
    ]
    return [row for row in rows if only in row]


def write(out: Path, report: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table = ["| pipeline | perplexity | KL | KL q99 | seconds of repair |", "|---|---:|---:|---:|---:|"]
    for row in report["rows"]:
        cells = (f"{row[key]:.3f}" if key in row else "" for key in ("kl", "kl_q99"))
        table.append(f"| `{row['pipeline']}` | {row['perplexity']:.2f} | {' | '.join(cells)} | {row['repair_s']:.0f} |")
    protocol = "\n".join(f"- {key}: {value}" for key, value in {**report["protocol"], **report["machine"]}.items())
    for name, body in {
        "repair.json": json.dumps(report, indent=1) + "\n",
        "repair.md": f"# What repair is worth\n\n{protocol}\n\n" + "\n".join(table) + "\n",
    }.items():
        part = out / f"{name}.part"
        part.write_text(body, encoding="utf-8")
        os.replace(part, out / name)


def repair_seconds(program: Any) -> float:
    return sum(step.figures["seconds"] for step in program.history if step.name == "repair")


def measure(rows: list[str], folder: Path, calibration: TokenWindows, held: torch.Tensor, end: int, out: Path) -> None:
    dense = secateur.capture(folder)
    with torch.no_grad():
        reference = [F.log_softmax(dense(input_ids=row[None]).logits[0, :-1].float(), -1) for row in held]
    report: dict[str, Any] = {
        "protocol": {
            "model": folder.name,
            "dtype": "float32",
            "calibration": calibration.describe(),
            "held_out": f"{held.numel()} tokens of other documents, windows of {held.shape[1]}, no beginning token",
            "kl": "KL(dense || pruned), nats, mean over the scored tokens",
        },
        "machine": describe_machine(),
        "rows": [{"pipeline": "dense", "repair_s": 0.0, **quality(dense, held, None, end)}],
    }
    context = Context(data=samples(calibration, dense))
    done: dict[str, Any] = {}
    for row in rows:
        start, program = time.perf_counter(), dense
        parts = secateur.Pipeline.parse(row).passes
        for count, one in enumerate(parts, 1):
            key = secateur.Pipeline(passes=parts[:count]).to_text()
            program = done[key] = done.get(key) or one(program, context)
        found = quality(program, held, reference, end)
        spent = {"repair_s": repair_seconds(program), "seconds": time.perf_counter() - start}
        consumers = next((s.figures["consumers"] for s in program.history if s.name == "repair"), {})
        report["rows"].append(
            {"pipeline": row, **found, **spent, "peak_bytes": peak_memory_bytes(), "consumers": consumers}
        )
        done = {key: value for key, value in done.items() if "repair" not in key}
        print(row, found, spent, flush=True)
        write(out, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose pipeline holds this text")
    parser.add_argument("--rows", nargs="*", help="these pipelines instead")
    options = parser.parse_args()
    folder, documents = default_cache() / MODEL_FOLDER, text(default_cache())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration = calibration_windows(documents.calibration, tokenizer, tokens=CALIBRATION, window=WINDOW)
    stream, _ = token_stream(documents.held_out, tokenizer, tokens=HELD_OUT)
    rows = options.rows or pipelines(options.only)
    measure(rows, folder, calibration, stream.view(-1, WINDOW), tokenizer.eos_token_id, options.out)


if __name__ == "__main__":
    main()
