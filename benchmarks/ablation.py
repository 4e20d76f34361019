"""What each idea is worth: score x repair x allocation, one-shot width pruning of the demo's model,
on held-out text.

Run ``python benchmarks/ablation.py --out FOLDER`` after ``make assets``.  Rows that
FOLDER/ablation.json holds already are not measured again, so that a run that was stopped goes on.
Writes ablation.json, ablation.md and ablation.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
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
from secateur.tools.evaluate.corpus import calibration_windows, read_documents, token_stream
from secateur.tools.machine import describe_machine, peak_memory_bytes

PEERS = {
    "random": "random",
    "LLM-Pruner": "taylor",
    "Minitron": "activation",
    "Wanda-sp": "wanda",
    "FLAP": "flap",
    "OBS": "obs",
    "fisher": "fisher",
}
REPAIRS = {
    "no repair": "",
    "own outputs": "repair{target=own}",
    "residual stream": "repair{target=stream}",
}
HELD_OUT = 9_216


def rows(ratios: list[float]) -> list[tuple[str, str]]:
    """(what it is, the pipeline) of every row: all scores with and without repair, then what the
    best ones add."""
    found = []
    for ratio in ratios:
        cut = f"prune-width{{mlp={ratio}}}"
        for peer, metric in PEERS.items():
            for told, repair in REPAIRS.items():
                if told == "own outputs" and peer not in ("Wanda-sp", "fisher"):
                    continue
                found.append((f"{peer}, {told}", _joined(f"score{{metric={metric}}}", cut, repair)))
        ranked = f"prune-width{{mlp={ratio},uniform=false,normalize=none}}"
        by_kl, by_error = (
            f"allocate{{ratio={ratio},damage={damage}}}" for damage in ("kl", "error")
        )
        evolved = f"allocate{{ratio={ratio},damage=kl,generations=20}}"
        for told, one in {
            "ranked": ranked,
            "by KL": by_kl,
            "by error": by_error,
            "evolved": evolved,
        }.items():
            for metric in ("wanda", "fisher") if told == "by KL" else ("fisher",):
                found.append(
                    (
                        f"{metric}, {told}, stream",
                        _joined(f"score{{metric={metric}}}", one, "repair"),
                    )
                )
        for told, one in {"uniform": cut, "ranked": ranked}.items():
            found.append(
                (f"fisher, {told}, rebuilt", _joined("score{metric=fisher}", one, "reconstruct"))
            )
    return found


def _joined(*parts: str) -> str:
    return ",".join(part for part in parts if part)


def measure(program: Any, held: Any, dense: tuple[CachedLogProbs, ...]) -> dict[str, float]:
    """Perplexity and KL(dense || pruned) of the held-out text, with quantiles of the tokens' KL."""
    losses = torch.cat([next_token_losses(program, sample) for sample in held])
    found = kl_to(dense, program, held)
    return {
        "perplexity": math.exp(losses.double().mean().item()),
        "kl": found.mean,
        "kl_stderr": found.stderr,
        "kl_q99": found.quantiles[0.99],
        "kl_of_worst_fifth": found.shares[0.2],
    }


class Report:
    """The rows measured so far, on the disk after each."""

    def __init__(self, out: Path, head: dict[str, Any]) -> None:
        self.out, self.file = out, out / "ablation.json"
        self.body = (
            json.loads(self.file.read_text()) if self.file.is_file() else {**head, "rows": []}
        )
        if self.body["protocol"] != head["protocol"]:
            raise SystemExit(f"{self.file} holds another protocol: choose another --out")

    def has(self, pipeline: str) -> bool:
        return any(row["pipeline"] == pipeline for row in self.body["rows"])

    def add(self, row: dict[str, Any]) -> None:
        self.body["rows"].append(row)
        self.out.mkdir(parents=True, exist_ok=True)
        _replace(self.file, json.dumps(self.body, indent=1) + "\n")
        _replace(self.out / "ablation.md", self.markdown())

    def markdown(self) -> str:
        protocol = "\n".join(
            f"- {k}: {v}" for k, v in {**self.body["protocol"], **self.body["machine"]}.items()
        )
        head = "| what | pipeline | perplexity | x dense | KL | +- | KL q99 | seconds | on |"
        here = self.body["machine"]["processor"]
        dense = self.body["rows"][0]["perplexity"]
        table = [
            f"| {r['what']} | `{r['pipeline']}` | {r['perplexity']:.2f} | "
            f"{r['perplexity'] / dense:.3f} "
            f"| {r['kl']:.4f} | {r['kl_stderr']:.4f} | {r['kl_q99']:.2f} | {r['seconds']:.0f} "
            f"| {r.get('processor', here)} |"
            for r in self.body["rows"]
        ]
        rule = "|" + "---|" * 2 + "---:|" * 6 + "---|"
        page = ["# What each idea is worth", "", protocol, "", head, rule, *table]
        return "\n".join(page) + "\n"

    def draw(self) -> None:
        """KL of every row as bars."""
        from matplotlib.figure import Figure

        rows = [row for row in self.body["rows"] if row["kl"] > 0]
        figure = Figure(figsize=(9, 1 + 0.24 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.barh(
            [f"{r['what']} ({r['pipeline'].split('prune-width')[-1][:14]})" for r in rows],
            [r["kl"] for r in rows],
        )
        axes.set(xscale="log", xlabel="KL(dense || pruned), nats a token")
        axes.invert_yaxis()
        figure.savefig(self.out / "ablation.png", dpi=130)


def _replace(file: Path, body: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(body, encoding="utf-8")
    os.replace(part, file)


def documents_of(options: argparse.Namespace) -> tuple[str, list[str], list[str]]:
    """(Name of the text, documents to calibrate on, documents to measure on)."""
    if options.text is None:
        found = load_text(default_cache())
        return "Wikipedia leads", found.calibration, found.held_out
    calibration, held_out = (
        read_documents([options.text / f"{name}.jsonl"]) for name in ("calibration", "held-out")
    )
    return options.text.name, calibration, held_out


def run(asked: list[tuple[str, str]], options: argparse.Namespace) -> None:
    folder, out, window = default_cache() / MODEL_FOLDER, options.out, options.window
    named, to_calibrate, to_measure = documents_of(options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration = calibration_windows(to_calibrate, tokenizer, tokens=options.tokens, window=window)
    stream, _ = token_stream(to_measure, tokenizer, tokens=HELD_OUT)
    dense = secateur.capture(folder)
    context, held = (
        Context(data=samples(calibration, dense)),
        samples(stream.view(-1, window), dense),
    )
    predicted = predict_reference(dense, held)
    head = {
        "protocol": {
            "model": folder.name,
            "dtype": "float32",
            "text": named,
            "calibration": calibration.describe(),
            "held_out": f"{stream.numel()} tokens of other documents, windows of {window}, no "
            "beginning token",
            "kl": "KL(dense || pruned), nats, mean over all positions; +- standard error over "
            "the windows",
        },
        "machine": describe_machine(),
    }
    report = Report(out, head)
    if not report.has("dense"):
        report.add(
            {
                "what": "dense",
                "pipeline": "dense",
                "seconds": 0.0,
                **measure(dense, held, predicted),
            }
        )
    scored: dict[str, Any] = {}
    for what, pipeline in sorted(asked, key=lambda row: row[1].partition("},")[0]):
        if report.has(pipeline):
            continue
        first, *rest = secateur.Pipeline.parse(pipeline).passes
        start = time.perf_counter()
        scores = first.to_text() if hasattr(first, "to_text") else repr(first)
        if scores not in scored:
            scored = {scores: first(dense, context)}
        program = scored[scores]
        for one in rest:
            program = one(program, context)
        spent = {step.name: step.figures["seconds"] for step in program.history}
        row = {"what": what, "pipeline": pipeline, "seconds": sum(spent.values()), "passes": spent}
        row |= {"processor": describe_machine()["processor"]}
        report.add({**row, **measure(program, held, predicted), "peak_bytes": peak_memory_bytes()})
        print(
            what,
            pipeline,
            f"{report.body['rows'][-1]['kl']:.4f}",
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    report.draw()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=[0.5, 0.25],
        help="parts of the MLP neurons to remove",
    )
    parser.add_argument("--tokens", type=int, default=10_240, help="of calibration text")
    parser.add_argument("--window", type=int, default=512, help="tokens of a sequence")
    parser.add_argument(
        "--text",
        type=Path,
        help="folder with calibration.jsonl and held-out.jsonl; else the demo's",
    )
    parser.add_argument(
        "--only",
        default="",
        help="rows whose description or pipeline this regular expression finds",
    )
    parser.add_argument("--rows", nargs="*", help="these pipelines instead")
    options = parser.parse_args()
    known = {pipeline: told for told, pipeline in rows(options.ratios)}
    asked = [(known.get(row, "as given"), row) for row in options.rows or ()] or rows(
        options.ratios
    )
    chosen = [(told, row) for told, row in asked if re.search(options.only, f"{told} {row}")]
    run(chosen, options)


if __name__ == "__main__":
    main()
