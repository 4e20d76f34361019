"""What distillation gives back: a fifth of the demo's model removed out of everything, repaired,
then trained.

Run ``python benchmarks/distill.py --out FOLDER`` after ``make assets``.  One cell is one (loss,
learning rate, seed); each goes on from its last kept step when the command is given again, and a
finished one is not run again.  Writes distill.json, distill.md and distill.png after every cell.
``--also TEXT.jsonl`` measures all finished cells on a text of another kind, too.
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
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer

import secateur
from secateur.passes import Context, samples
from secateur.passes.storage.journal import hash_tensor
from secateur.passes.training.adapt_lora import AdaptLora
from secateur.passes.training.distill import Distill
from secateur.passes.training.plan import TrainingPass
from secateur.runtime import save, to_transformers
from secateur.tools.demo.assets import MODEL_FOLDER, default_cache, load_text, training_text
from secateur.tools.evaluate.corpus import calibration_windows, read_documents, token_stream
from secateur.tools.machine import describe_machine, peak_memory_bytes
from secateur.tools.report.console import CommandConsole
from secateur.tools.report.curves import Panel, draw_curves
from secateur.tools.report.units import format_spread

PIPELINE = "score{metric=wanda},prune-width{hidden=504,mlp=1312},repair"
CALIBRATION, WINDOW, HELD_OUT = 10_240, 512, 9_216
TEXT = "train.safetensors"  # the tokenised training text, in the output folder
FIGURES = (("kl", ".4f"), ("perplexity", ".2f"))
LOSSES: dict[str, dict[str, Any]] = {
    "kl": {"kl": 1.0, "ce": 0.0},
    "ce": {"kl": 0.0, "ce": 1.0},
    "both": {"kl": 1.0, "ce": 1.0},
    "top512": {"kl": 1.0, "ce": 0.0, "top_k": 512},
    "states": {"kl": 1.0, "ce": 0.0, "states": ((0, 0), (-3, -3))},
    "lora": {"kl": 1.0, "ce": 0.0},
}


def prepare(out: Path, pipeline: str, voice: CommandConsole) -> None:
    """The pruned model and the tokenised training text, once."""
    folder, cache = default_cache() / MODEL_FOLDER, default_cache()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not (out / TEXT).is_file():
        documents = training_text(cache)
        windows = calibration_windows(
            documents, tokenizer, tokens=_count(documents, tokenizer), window=WINDOW
        )
        out.mkdir(parents=True, exist_ok=True)
        save_file({"input_ids": windows.windows.int()}, out / "train.part")
        os.replace(out / "train.part", out / TEXT)
    if not (out / "pruned" / "secateur.json").is_file():
        windows = calibration_windows(
            load_text(cache).calibration, tokenizer, tokens=CALIBRATION, window=WINDOW
        )
        program = secateur.capture(folder)
        passes = secateur.Pipeline.parse(pipeline)
        secateur.plan_config(
            passes.preview(program)
        )  # a shape that no stock class holds is refused before the work
        small = passes.run(program, data=windows, progress=voice.progress)
        save(small, out / "pruned", overwrite=True)


def _count(documents: list[str], tokenizer: Any) -> int:
    """Tokens of the documents, in whole windows."""
    return int(token_stream(documents, tokenizer)[0].numel() // WINDOW * WINDOW)


@torch.no_grad()
def quality(model: Any, dense: Any, held: torch.Tensor, end: int) -> dict[str, float]:
    """Perplexity and mean KL(dense || model) on held-out documents, in nats a token; end tokens are
    no targets."""
    losses, kls = [], []
    for row in held:
        logs, wanted = (
            F.log_softmax(m(input_ids=row[None]).logits[0, :-1].float(), -1) for m in (model, dense)
        )
        counted = row[1:] != end
        losses.append(F.nll_loss(logs, row[1:], reduction="none")[counted])
        kls.append((wanted.exp() * (wanted - logs)).sum(-1)[counted])
    return {
        "perplexity": math.exp(torch.cat(losses).double().mean()),
        "kl": float(torch.cat(kls).double().mean()),
    }


def cell_pass(loss: str, lr: float, options: argparse.Namespace, out: Path) -> TrainingPass:
    """The pass of a cell; the teacher is the dense model's folder."""
    kind = AdaptLora if loss == "lora" else Distill
    return kind(
        tokens=options.tokens,
        lr=lr,
        batch_tokens=options.batch_tokens,
        micro_batch=options.micro_batch,
        window=WINDOW,
        data=str(out / TEXT),
        teacher=str(default_cache() / MODEL_FOLDER),
        precision=options.precision,
        held_out=options.windows,
        evaluations=options.evaluations,
        save_every=options.save_every,
        **LOSSES[loss],
    )


def run_cell(
    name: str, one: TrainingPass, seed: int, out: Path, held: Any, end: int, voice: CommandConsole
) -> dict[str, Any]:
    """Train, measure and write one cell; what a killed run kept is used."""
    work, small = out / "cells" / name, secateur.capture(out / "pruned")
    dense = secateur.capture(default_cache() / MODEL_FOLDER)
    context = Context(
        data=samples(held[:2], small),
        progress=voice.progress,
        seed=seed,
        output=work / "curves",
        resume=work / "kept",
        raise_model=to_transformers,
    )
    begun = time.perf_counter()
    trained = one(small, context)
    step = trained.history[-1]
    found = {
        "cell": name,
        "seed": seed,
        "options": _kept_options(one),
        "figures": step.figures,
        "held_out_documents": quality(trained, dense, held, end),
        "seconds_of_this_run": time.perf_counter() - begun,
        "peak_bytes": peak_memory_bytes(),
    }
    save(trained, work / "model", overwrite=True)
    _write(work / "result.json", json.dumps(found, indent=1) + "\n")
    for kept in (work / "kept").rglob("*.safetensors"):
        kept.unlink()
    return found


def _kept_options(one: TrainingPass) -> dict[str, Any]:
    """A pass's options as JSON keeps them, wherever the folders lie."""
    found: dict[str, Any] = json.loads(
        json.dumps({**one.to_json(), "data": TEXT, "teacher": MODEL_FOLDER})
    )
    return found


def measure_also(out: Path, options: argparse.Namespace, tokenizer: Any) -> None:
    """Quality of the dense, the pruned and every finished model on the other text, each measured
    once."""
    file = out / "also.json"
    stream, _ = token_stream(
        read_documents([options.also]), tokenizer, tokens=options.held_out_tokens
    )
    head = {"text": options.also.name, "tokens": stream.numel(), "sha256": hash_tensor(stream)}
    found: dict[str, Any] = (
        json.loads(file.read_text()) if file.is_file() else {**head, "models": {}}
    )
    if {key: found[key] for key in head} != head:
        raise SystemExit(
            f"{file} was measured on another text: remove it, or give --also that text"
        )
    dense, held = secateur.capture(default_cache() / MODEL_FOLDER), stream.view(-1, WINDOW)
    folders = {"dense": default_cache() / MODEL_FOLDER, "pruned": out / "pruned"}
    folders |= {one.parent.name: one for one in sorted((out / "cells").glob("*/model"))}
    for name, folder in folders.items():
        if name not in found["models"]:
            found["models"][name] = quality(
                secateur.capture(folder), dense, held, tokenizer.eos_token_id
            )
            _write(file, json.dumps(found, indent=1) + "\n")
            print(name, found["models"][name], flush=True)


def _write(file: Path, body: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(body, encoding="utf-8")
    os.replace(part, file)


def report(out: Path, facts: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """All finished cells as JSON, table and picture."""
    also = json.loads((out / "also.json").read_text()) if (out / "also.json").is_file() else {}
    _write(
        out / "distill.json", json.dumps({**facts, "cells": cells, "also": also}, indent=1) + "\n"
    )
    rows = [
        "| cell | tokens | KL | perplexity | KL, other documents | perplexity, other documents "
        "| tokens/s |"
    ]
    rows.append("|---|---:|---:|---:|---:|---:|---:|")
    start, base = cells[0]["figures"]["held_out"][0], facts["before"]
    rows.append(_row("pruned", 0, start, base, ""))
    for cell in cells:
        figures = cell["figures"]
        last, speed = figures["held_out"][-1], figures["tokens_per_s"]
        rows.append(_row(cell["cell"], figures["tokens"], last, cell["held_out_documents"], speed))
    protocol = "\n".join(
        f"- {key}: {value}" for key, value in {**facts["protocol"], **facts["machine"]}.items()
    )
    page = [
        "# What distillation gives back",
        "",
        protocol,
        "",
        *rows,
        *_summary(cells),
        *_other_kind(also),
    ]
    _write(out / "distill.md", "\n".join(page) + "\n")
    runs: dict[str, list[Any]] = {}
    for cell in cells:
        runs.setdefault(cell["cell"].rpartition("-seed")[0], []).append(cell["figures"]["held_out"])
    panels = [
        Panel("KL to the dense model", "kl", "nats a token, held-out windows"),
        Panel(
            "perplexity",
            "perplexity",
            "held-out windows",
            (facts["dense"]["perplexity_held_out_windows"], "dense"),
            True,
        ),
    ]
    draw_curves(runs, panels, out / "distill.png", facts["protocol"]["pipeline"])


def _summary(cells: list[dict[str, Any]]) -> list[str]:
    """Cells that differ in their seed alone, together; and what each loss costs beside the first,
    seed by seed."""
    groups: dict[str, dict[int, list[float]]] = {}
    for cell in cells:
        last, other = cell["figures"]["held_out"][-1], cell["held_out_documents"]
        figures = [last["kl"], last["perplexity"], other["kl"], other["perplexity"]]
        groups.setdefault(cell["cell"].rpartition("-seed")[0], {})[cell["seed"]] = figures
    first, base = next(iter(groups.items()))
    rows = [
        "",
        "Mean over seeds ± half its 95 % interval; below, the difference to the first row, seed "
        "by seed:",
        "",
    ]
    rows += [
        "| cells | seeds | KL | perplexity | KL, other documents | perplexity, other documents |"
    ]
    rows += ["|---|---:|---:|---:|---:|---:|"]
    for name, seeds in groups.items():
        told = (format_spread(values, ".4f") for values in zip(*seeds.values(), strict=True))
        rows.append(f"| {name} | {len(seeds)} | {' | '.join(told)} |")
    for name, seeds in groups.items():
        both = [seed for seed in seeds if seed in base]
        if name != first and both:
            pairs = [[a - b for a, b in zip(seeds[seed], base[seed], strict=True)] for seed in both]
            told = (format_spread(values, "+.4f") for values in zip(*pairs, strict=True))
            rows.append(f"| {name} minus {first} | {len(both)} | {' | '.join(told)} |")
    return rows


def _other_kind(also: dict[str, Any]) -> list[str]:
    """Models on the text of another kind; those that differ in their seed alone together."""
    if not also:
        return []
    told = (
        f"On a text of another kind than the one trained on ({also['text']}, "
        f"{also['tokens']:,} tokens):"
    )
    rows = ["", told, "", "| models | seeds | KL | perplexity |", "|---|---:|---:|---:|"]
    groups: dict[str, list[dict[str, float]]] = {}
    for name, found in also["models"].items():
        groups.setdefault(name.rpartition("-seed")[0] or name, []).append(found)
    for name, found in groups.items():
        kl, perplexity = (
            format_spread([one[key] for one in found], shape) for key, shape in FIGURES
        )
        rows.append(f"| {name} | {len(found)} | {kl} | {perplexity} |")
    return rows


def _row(
    name: str, tokens: int, mine: dict[str, float], other: dict[str, float], speed: Any
) -> str:
    cells = (f"{found['kl']:.4f} | {found['perplexity']:.2f}" for found in (mine, other))
    return f"| {name} | {tokens:,} | {' | '.join(cells)} | {speed} |"


def facts_of(
    out: Path, options: argparse.Namespace, held: torch.Tensor, end: int
) -> dict[str, Any]:
    """Protocol, machine, and what the pruned model is worth before it is trained; measured once."""
    file = out / "before.json"
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text())
        if kept["protocol"]["pipeline"] != options.pipeline:
            raise SystemExit(
                f"{out} holds {kept['protocol']['pipeline']}: give another --out for "
                f"{options.pipeline}"
            )
        return kept
    dense, small = (
        secateur.capture(default_cache() / MODEL_FOLDER),
        secateur.capture(out / "pruned"),
    )
    windows = load_file(out / TEXT)["input_ids"].long()
    found = {
        "protocol": {
            "model": MODEL_FOLDER,
            "pipeline": options.pipeline,
            "parameters": f"{dense.num_parameters:,} -> {small.num_parameters:,}",
            "training_text": f"{windows.numel():,} tokens of Wikipedia leads, windows of {WINDOW}",
            "held_out_windows": f"the first {options.windows} of the training text, not trained "
            "on; end tokens count",
            "other_documents": f"{held.numel():,} tokens of documents in no other set, windows "
            f"of {WINDOW}",
            "kl": "KL(dense || trained), nats, mean over tokens; on other documents in float32",
            "products in training": options.precision,
        },
        "machine": describe_machine(),
        "before": quality(small, dense, held, end),
        "dense": quality(dense, dense, held, end),
    }
    found["dense"]["perplexity_held_out_windows"] = quality(
        dense, dense, windows[: options.windows], -1
    )["perplexity"]
    _write(file, json.dumps(found, indent=1) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--losses", nargs="*", choices=list(LOSSES), default=["kl", "ce"])
    parser.add_argument("--lrs", nargs="*", type=float, default=[3e-4])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--pipeline", default=PIPELINE)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--precision", default="bfloat16", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument(
        "--windows", type=int, default=16, help="windows of the training text held out"
    )
    parser.add_argument("--held-out-tokens", type=int, default=HELD_OUT)
    parser.add_argument("--also", type=Path, help="text of another kind to measure on, too: .jsonl")
    options = parser.parse_args()
    out, voice = options.out, CommandConsole(False)
    prepare(out, options.pipeline, voice)
    tokenizer = AutoTokenizer.from_pretrained(default_cache() / MODEL_FOLDER)
    stream, _ = token_stream(
        load_text(default_cache()).held_out, tokenizer, tokens=options.held_out_tokens
    )
    held, end = stream.view(-1, WINDOW), tokenizer.eos_token_id
    facts, cells = facts_of(out, options, held, end), []
    for seed in options.seeds:
        for loss in options.losses:
            for lr in options.lrs:
                name = f"{loss}-lr{lr:g}-{options.tokens}-seed{seed}"
                done = out / "cells" / name / "result.json"
                one = cell_pass(loss, lr, options, out)
                if done.is_file():
                    cell = json.loads(done.read_text())
                    if cell["options"] != _kept_options(one):
                        raise SystemExit(
                            f"{done} was made with other options: give another --out, or remove it"
                        )
                else:
                    cell = run_cell(name, one, seed, out, held, end, voice)
                cells.append(cell)
                print(name, cell["figures"]["held_out"][-1], cell["held_out_documents"], flush=True)
                report(out, facts, cells)
    if options.also is not None:
        measure_also(out, options, tokenizer)
        report(out, facts, cells)


if __name__ == "__main__":
    main()
