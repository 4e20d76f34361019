"""What it costs to leave blocks out: every method of prune-depth on the demo's model, on held-out
text.

Run ``python benchmarks/depth.py --out FOLDER`` after ``make assets``.  Finished rows of
FOLDER/depth.json are not measured again, and greedy goes on after its last finished round, so that
a run that was stopped loses little.
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
from transformers import AutoTokenizer

import secateur
from secateur.passes.base import Context
from secateur.passes.calibration.data import samples
from secateur.passes.calibration.kl import (
    CachedLogProbs,
    kl_to,
    next_token_losses,
    predict_reference,
)
from secateur.tools.demo.assets import MODEL_FOLDER, default_cache, load_text
from secateur.tools.evaluate.corpus import calibration_windows, token_stream
from secateur.tools.machine import describe_machine
from secateur.tools.report.console import CommandConsole

METHODS = {
    "block influence, one pass": "method=influence",
    "each alone, perplexity": "method=alone,by=perplexity",
    "each alone, KL": "method=alone",
    "neighbours, KL": "method=contiguous",
    "greedy, perplexity": "method=greedy,by=perplexity",
    "greedy, KL": "method=greedy",
    "greedy, KL, sub-blocks": "method=greedy,level=sub-block",
}
WINDOW, HELD_OUT = 512, 9_216


def measure(program: Any, held: Any, dense: tuple[CachedLogProbs, ...]) -> dict[str, float]:
    """Perplexity and KL(dense || shallower) of the held-out text."""
    losses = torch.cat([next_token_losses(program, sample) for sample in held])
    found = kl_to(dense, program, held)
    return {
        "perplexity": math.exp(losses.double().mean().item()),
        "kl": found.mean,
        "kl_stderr": found.stderr,
        "kl_q99": found.quantiles[0.99],
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    protocol = "\n".join(
        f"- {key}: {value}" for key, value in {**report["protocol"], **report["machine"]}.items()
    )
    table = [
        "| what | pipeline | parameters | perplexity | KL | +- | KL q99 | seconds | on | dropped |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in report["rows"]:
        gone = ", ".join(name.split("layers.")[-1] for name in row["dropped"])
        table.append(
            f"| {row['what']} | `{row['pipeline']}` | {row['parameters']:,} | "
            f"{row['perplexity']:.2f} "
            f"| {row['kl']:.4f} | {row['kl_stderr']:.4f} | {row['kl_q99']:.2f} | "
            f"{row['seconds']:.0f} "
            f"| {row.get('processor', report['machine']['processor'])} | {gone} |"
        )
    return f"# What it costs to leave blocks out\n\n{protocol}\n\n" + "\n".join(table) + "\n"


def write(out: Path, report: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, body in {
        "depth.json": json.dumps(report, indent=1) + "\n",
        "depth.md": markdown(report),
    }.items():
        part = out / f"{name}.part"
        part.write_text(body, encoding="utf-8")
        os.replace(part, out / name)


def run(pipelines: dict[str, str], out: Path, tokens: int) -> None:
    folder, documents = default_cache() / MODEL_FOLDER, load_text(default_cache())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration = calibration_windows(
        documents.calibration, tokenizer, tokens=tokens, window=WINDOW
    )
    stream, _ = token_stream(documents.held_out, tokenizer, tokens=HELD_OUT)
    dense = secateur.capture(folder)
    held = samples(stream.view(-1, WINDOW), dense)
    predicted = predict_reference(dense, held)
    protocol = {
        "model": folder.name,
        "dtype": "float32",
        "calibration": calibration.describe(),
        "held_out": f"{HELD_OUT} tokens of other documents, windows of {WINDOW}, no "
        "beginning token",
        "kl": "KL(dense || shallower), nats, mean over all positions; +-: standard error "
        "over windows",
        "repair": "none",
    }
    report: dict[str, Any] = {"protocol": protocol, "machine": describe_machine(), "rows": []}
    if (out / "depth.json").is_file():
        found = json.loads((out / "depth.json").read_text())
        if found["protocol"] != protocol:
            raise SystemExit(f"{out / 'depth.json'} holds another protocol: choose another --out")
        report = found
    for what, pipeline in {"dense": "", **pipelines}.items():
        if any(row["pipeline"] == pipeline for row in report["rows"]):
            continue
        start, smaller = time.perf_counter(), dense
        if pipeline:
            kept = out / "rounds" / pipeline
            context = Context(
                data=samples(calibration, dense), resume=kept, progress=CommandConsole().progress
            )
            (one,) = secateur.Pipeline.parse(pipeline).passes
            smaller = one(dense, context)
        row = {"what": what, "pipeline": pipeline, "seconds": time.perf_counter() - start}
        row |= {"processor": describe_machine()["processor"]}
        row |= {
            "parameters": smaller.num_parameters,
            "dropped": smaller.cut.dropped if smaller.cut else [],
        }
        report["rows"].append({**row, **measure(smaller, held, predicted)})
        write(out, report)
        print(f"{what}: {report['rows'][-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drop", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4_096, help="calibration tokens")
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    args = parser.parse_args()
    chosen = {what: options for what, options in METHODS.items() if args.only in what}
    run(
        {what: f"prune-depth{{drop={args.drop},{options}}}" for what, options in chosen.items()},
        args.out,
        args.tokens,
    )


if __name__ == "__main__":
    main()
