"""What training under masks gives back to a sparse model, and what the moving of masks adds.

Run ``python benchmarks/retrain.py --out FOLDER`` after ``make assets``.  One cell is one (arm,
learning rate, tokens, seed); each goes on from its last kept step when the command is given again,
and a finished one is not run again. Writes retrain.json, retrain.md, retrain.png and masks.png
after every cell.

The gap is counted in logarithms of perplexity: 0 is the sparse model before training, 1 the dense
model after the best of its own trainings on the same tokens (the arm ``dense``; without it, the
dense model as it came).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer

import secateur
from secateur.graph import Program
from secateur.passes import Context, samples
from secateur.passes.storage.journal import Journal
from secateur.passes.training.distill import Distill
from secateur.passes.training.masks.schedule import RECORDS
from secateur.passes.training.plan import TrainingPass
from secateur.passes.training.retrain_sparse import RetrainSparse
from secateur.runtime import to_transformers
from secateur.runtime.resume.fingerprint import hash_parameters
from secateur.runtime.resume.state import rebuild_program, state_of
from secateur.tools.demo.assets import MODEL_FOLDER, default_cache, load_text, training_text
from secateur.tools.evaluate.corpus import calibration_windows, token_stream
from secateur.tools.machine import describe_machine, peak_memory_bytes
from secateur.tools.report.console import CommandConsole
from secateur.tools.report.curves import Panel, draw_curves
from secateur.tools.report.units import format_spread

START = "sparsify{metric=wanda}"
TEXT = "train.safetensors"  # the tokenised training text, in the output folder
CE: dict[str, Any] = {"kl": 0.0, "ce": 1.0}
KL: dict[str, Any] = {"kl": 1.0, "ce": 0.0, "temperature": 1.0}
MOVING: dict[str, Any] = {"mode": "adaptive"}
ARMS: dict[str, tuple[type[TrainingPass], dict[str, Any]]] = {
    "dense": (Distill, CE),
    "ce": (RetrainSparse, {"mode": "fixed", **CE}),
    "fixed": (RetrainSparse, {"mode": "fixed"}),
    "fixed-kl": (RetrainSparse, {"mode": "fixed", **KL}),
    "static": (RetrainSparse, {**MOVING, "ramp": 0.0}),
    "adaptive": (RetrainSparse, MOVING),
    "adaptive-kl": (RetrainSparse, {**MOVING, **KL}),
    "adaptive-ce": (RetrainSparse, {**MOVING, **CE}),
    "magnitude": (RetrainSparse, {**MOVING, "score": "magnitude", "revive": "zero"}),
    "magnitude-revived": (RetrainSparse, {**MOVING, "score": "magnitude"}),
    **{
        f"pull-{by:g}": (RetrainSparse, {**MOVING, "strength": by})
        for by in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
    },
    "zero": (RetrainSparse, {**MOVING, "revive": "zero"}),
    "sum": (RetrainSparse, {**MOVING, "moment": "sum"}),
    "cast": (RetrainSparse, {"mode": "cast"}),
    "boost-16": (RetrainSparse, {**MOVING, "boost": 16}),
    "fixed-sum": (RetrainSparse, {"mode": "fixed", "moment": "sum"}),
}
"""Losses without a word are the paper's: 0.67 KL at temperature 2, 0.33 cross entropy."""


def prepare(
    out: Path, options: argparse.Namespace, voice: CommandConsole
) -> tuple[Program, Program]:
    """The dense and the sparse model, and the tokenised training text; made once."""
    folder, cache = default_cache() / MODEL_FOLDER, default_cache()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not (out / TEXT).is_file():
        documents, window = training_text(cache), options.train_window
        tokens = int(token_stream(documents, tokenizer)[0].numel() // window * window)
        ids = calibration_windows(documents, tokenizer, tokens=tokens, window=window).windows.int()
        out.mkdir(parents=True, exist_ok=True)
        save_file({"input_ids": ids}, out / "train.part")
        os.replace(out / "train.part", out / TEXT)
    dense, journal = secateur.capture(folder), Journal(out / "start")
    kept = journal.read("start")
    if kept is None:
        documents, window = load_text(cache).calibration, options.window
        calibration = calibration_windows(
            documents, tokenizer, tokens=options.calibration, window=window
        )
        begun = time.perf_counter()
        sparse = secateur.Pipeline.parse(options.start).run(
            dense, data=calibration, progress=voice.progress
        )
        entry = state_of(sparse, hash_parameters(dense))
        journal.write("start", entry.tensors, entry.facts)
        print(f"{options.start}: {time.perf_counter() - begun:.0f} s", flush=True)
        return dense, sparse
    return dense, rebuild_program(dense, kept)


@torch.no_grad()
def perplexity(model: Any, held: torch.Tensor, end: int) -> float:
    """Of held-out documents; end tokens are no targets."""
    losses = []
    for row in held:
        logs = F.log_softmax(model(input_ids=row[None]).logits[0, :-1].float(), -1)
        losses.append(F.nll_loss(logs, row[1:], reduction="none")[row[1:] != end])
    return math.exp(torch.cat(losses).double().mean())


def cell_pass(arm: str, lr: float, tokens: int, options: argparse.Namespace) -> TrainingPass:
    """The pass of a cell."""
    kind, own = ARMS[arm]
    moving = {"refresh": options.refresh} if kind is RetrainSparse else {}
    return kind(
        tokens=tokens,
        lr=lr,
        batch_tokens=options.batch_tokens,
        micro_batch=options.micro_batch,
        window=options.train_window,
        data=str(options.out / TEXT),
        precision=options.precision,
        held_out=options.windows,
        evaluations=options.evaluations,
        save_every=options.save_every,
        **moving,
        **own,
    )


def run_cell(
    name: str, one: TrainingPass, seed: int, out: Path, models: Any, held: Any, end: int
) -> dict[str, Any]:
    """Train, measure and write one cell; what a killed run kept is used."""
    work, (dense, sparse) = out / "cells" / name, models
    start = dense if type(one) is Distill else sparse
    context = Context(
        data=samples(held[:2], start),
        progress=CommandConsole(False).progress,
        seed=seed,
        output=work / "curves",
        resume=work / "kept",
        raise_model=to_transformers,
    )
    begun, worked = time.perf_counter(), time.process_time()
    trained = one(start, context)
    worked, took = time.process_time() - worked, time.perf_counter() - begun
    step = trained.history[-1]
    rate = step.figures["tokens_per_s"]  # of this call; none where all steps were kept from before
    found = {
        "cell": name,
        "seed": seed,
        "options": _kept_options(one),
        "figures": step.figures,
        "curve": json.loads((work / "curves" / f"{one.name}.json").read_text())["curve"],
        "perplexity": perplexity(trained, held, end),
        "cpu_seconds_per_step": worked / took * one.batch_tokens / rate if rate else None,
        "seconds_of_this_run": took,
        "peak_bytes": peak_memory_bytes(),
    }
    _write(work / "result.json", json.dumps(found, indent=1) + "\n")
    for kept in (work / "kept").rglob("*.safetensors"):
        kept.unlink()
    return found


def _kept_options(one: TrainingPass) -> dict[str, Any]:
    """A pass's options as JSON keeps them, wherever the output folder lies."""
    found: dict[str, Any] = json.loads(json.dumps({**one.to_json(), "data": TEXT}))
    return found


def _write(file: Path, body: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(body, encoding="utf-8")
    os.replace(part, file)


def summary(facts: dict[str, Any], cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all seeds of an arm, a rate and a number of tokens."""
    groups: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(
            (cell["arm"], cell["options"]["lr"], cell["options"]["tokens"]), []
        ).append(cell)
    rows = []
    for (arm, lr, tokens), found in groups.items():
        controls: dict[float, list[float]] = {}
        for cell in cells:
            if cell["arm"] == "dense" and cell["options"]["tokens"] == tokens:
                controls.setdefault(cell["options"]["lr"], []).append(cell["perplexity"])
        best = min([statistics.mean(v) for v in controls.values()] + [facts["dense"]])
        reached = [cell["perplexity"] for cell in found]
        wide = math.log(facts["before"] / best)
        rows.append(
            {
                "arm": arm,
                "lr": lr,
                "tokens": tokens,
                "seeds": len(found),
                "perplexity": reached,
                "kl": [c["figures"]["held_out"][-1]["kl"] for c in found if arm != "dense"],
                "dense_control": best,
                "gap_closed": []
                if arm == "dense"
                else [1 - math.log(p / best) / wide for p in reached],
                "mask_changed": [
                    cell["figures"].get("mask_bits_changed", 0)
                    / cell["figures"].get("mask_bits", 1)
                    for cell in found
                ],
                "cpu_seconds_per_step": [
                    c["cpu_seconds_per_step"] for c in found if c["cpu_seconds_per_step"]
                ],
            }
        )
    return rows


def report(out: Path, facts: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """All finished cells as JSON, table and pictures."""
    rows = summary(facts, cells)
    _write(
        out / "retrain.json", json.dumps({**facts, "rows": rows, "cells": cells}, indent=1) + "\n"
    )
    table = [
        "| arm | lr | tokens | seeds | perplexity | KL | gap closed | mask bits changed | CPU-s "
        "a step |"
    ]
    table.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in ("dense", "before"):
        table.append(f"| {name}, untrained | | 0 | | {facts[name]:.2f} | | | | |")
    for row in rows:
        gap = (
            format_spread([100 * g for g in row["gap_closed"]], ".1f") + " %"
            if row["gap_closed"]
            else ""
        )
        reached, kl = (
            format_spread(row["perplexity"], ".2f"),
            format_spread(row["kl"], ".3f") if row["kl"] else "",
        )
        moved, times = 100 * statistics.mean(row["mask_changed"]), row["cpu_seconds_per_step"]
        seconds = f"{statistics.mean(times):.1f}" if times else ""
        table.append(
            f"| {row['arm']} | {row['lr']:g} | {row['tokens']:,} | {row['seeds']} | {reached} | "
            f"{kl} | {gap} "
            f"| {moved:.2f} % | {seconds} |"
        )
    protocol = "\n".join(
        f"- {key}: {value}" for key, value in {**facts["protocol"], **facts["machine"]}.items()
    )
    _write(
        out / "retrain.md",
        f"# What training under masks gives back\n\n{protocol}\n\n" + "\n".join(table) + "\n",
    )
    level = (facts["dense_on_held_out_windows"], "dense, untrained")
    panels = [
        Panel("perplexity", "perplexity", "held-out windows", level, True),
        Panel("KL to the dense model", "kl", "nats a token, held-out windows"),
    ]
    _draw(cells, "held_out", panels, out / "retrain.png", facts["protocol"]["start"])
    moving = [cell for cell in cells if cell["figures"].get("mask_bits_changed")]
    if moving:
        titles = (
            "bits flipped by a refresh",
            "bits unlike the first mask",
            "sum |W| removed",
            "decay to gradient",
        )
        shares = [
            Panel(t, key, "share", None, at == 0)
            for at, (t, key) in enumerate(zip(titles, RECORDS, strict=True))
        ]
        _draw(moving, "curve", shares, out / "masks.png", facts["protocol"]["start"])


def _draw(
    cells: list[dict[str, Any]], what: str, panels: list[Panel], file: Path, title: str
) -> None:
    runs: dict[str, list[Any]] = {}
    for cell in cells:
        points = cell["curve"] if what == "curve" else cell["figures"][what]
        shown = [point for point in points if what != "curve" or point["removed_mass"]]
        if cell["arm"] == "dense":  # the control has no teacher, so no KL
            shown = [{key: value for key, value in point.items() if key != "kl"} for point in shown]
        runs.setdefault(cell["cell"].rpartition("-seed")[0], []).append(shown)
    draw_curves(runs, panels, file, title)


def facts_of(
    options: argparse.Namespace, models: Any, held: torch.Tensor, end: int
) -> dict[str, Any]:
    """Protocol, machine, and what both models are worth before they are trained; measured once."""
    file, (dense, sparse) = options.out / "before.json", models
    protocol = {
        "model": MODEL_FOLDER,
        "start": options.start,
        "calibration": f"{options.calibration:,} tokens of Wikipedia leads, windows of "
        f"{options.window}",
        "batch": f"{options.batch_tokens:,} tokens a step, windows of {options.train_window}",
        "held_out_windows": f"the first {options.windows} windows of the training text, "
        "not trained on",
        "perplexity": f"of {held.numel():,} tokens of leads in no other set, windows of "
        f"{options.window}, float32",
        "kl": "KL(dense || trained) on held_out_windows, nats, mean over tokens",
        "products in training": options.precision,
    }
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text())
        if kept["protocol"] != protocol:
            raise SystemExit(f"{options.out} holds another protocol: give another --out")
        return kept
    windows = load_file(options.out / TEXT)["input_ids"].long()
    found = {
        "protocol": protocol,
        "machine": describe_machine(),
        "before": perplexity(sparse, held, end),
        "dense": perplexity(dense, held, end),
        "dense_on_held_out_windows": perplexity(dense, windows[: options.windows], -1),
    }
    _write(file, json.dumps(found, indent=1) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--arms",
        nargs="*",
        choices=list(ARMS),
        default=["dense", "ce", "fixed", "static", "adaptive"],
    )
    parser.add_argument("--tokens", nargs="*", type=int, default=[61_440])
    parser.add_argument("--lrs", nargs="*", type=float, default=[5e-4])
    parser.add_argument(
        "--dense-lrs", nargs="*", type=float, default=[5e-5], help="of the arm dense"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--start", default=START, help="the pipeline that makes the sparse model")
    parser.add_argument("--calibration", type=int, default=32_768)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--train-window", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--refresh", type=int, default=10)
    parser.add_argument("--precision", default="float32", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument(
        "--windows", type=int, default=8, help="windows of the training text held out"
    )
    parser.add_argument("--held-out-tokens", type=int, default=24_576)
    options = parser.parse_args()
    models = prepare(options.out, options, CommandConsole(False))
    tokenizer = AutoTokenizer.from_pretrained(default_cache() / MODEL_FOLDER)
    stream, _ = token_stream(
        load_text(default_cache()).held_out, tokenizer, tokens=options.held_out_tokens
    )
    held, end = stream.view(-1, options.window), tokenizer.eos_token_id
    facts, cells = facts_of(options, models, held, end), []
    print({key: facts[key] for key in ("dense", "before")}, flush=True)
    for seed in options.seeds:
        for tokens in options.tokens:
            for arm in options.arms:
                for lr in options.dense_lrs if arm == "dense" else options.lrs:
                    name = f"{arm}-lr{lr:g}-{tokens}-seed{seed}"
                    done, one = (
                        options.out / "cells" / name / "result.json",
                        cell_pass(arm, lr, tokens, options),
                    )
                    if done.is_file():
                        cell = json.loads(done.read_text())
                        if cell["options"] != _kept_options(one):
                            raise SystemExit(
                                f"{done} was made with other options: give another --out, "
                                "or remove it"
                            )
                    else:
                        cell = run_cell(name, one, seed, options.out, models, held, end)
                    cells.append({"arm": arm, **cell})
                    print(name, cell["figures"]["held_out"][-1], cell["perplexity"], flush=True)
                    report(options.out, facts, cells)


if __name__ == "__main__":
    main()
