"""One-shot 2:4 of the demo's model on held-out text: each method beside a plain implementation from
its paper.

Run ``python benchmarks/sparsity.py --out FOLDER`` after ``make assets``.  Rows that
FOLDER/sparsity.json holds already are not measured again, so that a run that was stopped goes on.
Writes sparsity.json, sparsity.md and sparsity.png.
``--rows PIPELINE ...`` measures these instead; ``--cost`` takes time and peak memory of each
pipeline, each in a process of its own, and the time of choosing all masks anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

import secateur
from secateur.graph import Pattern, Program
from secateur.passes import Context, Sample, samples
from secateur.passes.calibration.kl import mean_stderr, next_token_losses, token_losses
from secateur.passes.lowering.layers import linear_layers
from secateur.tools.demo.assets import MODEL_FOLDER, default_cache, load_text
from secateur.tools.evaluate.corpus import TokenWindows, calibration_windows, token_stream
from secateur.tools.machine import describe_machine, peak_memory_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from zoo.sparsity_reference import magnitude_mask, ria_mask, sparsegpt_by_columns, wanda_mask

MODEL = "the demo's model"
GPT, BEST = "sparsify{refine=0}", "sparsify"
ROWS = {
    "magnitude": "sparsify{metric=magnitude}",
    "Wanda": "sparsify{metric=wanda}",
    "RIA": "sparsify{metric=ria}",
    "SparseGPT, its mask alone": "sparsify{update=false}",
    "SparseGPT": GPT,
    "Wanda, groups refined": "sparsify{metric=wanda,refine=5}",
    "SparseGPT, groups refined": BEST,
}
WITH_OTHERS = {
    "channels permuted, Wanda": "permute-channels{metric=wanda,families=[]},sparsify{metric=wanda}",
    "channels permuted, SparseGPT": f"permute-channels,{GPT}",
    "channels permuted, groups refined": f"permute-channels,{BEST}",
    "SparseGPT, reconstructed": f"{GPT},reconstruct",
    "channels permuted, groups refined, reconstructed": f"permute-channels,{BEST},reconstruct",
}


# References: layer by layer, in plain torch
@dataclass
class Inputs:
    """What a linear layer read: x^T x [K, K] float64 and the number of rows."""

    gram: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        part = (rows.T @ rows).double()
        self.gram = part if self.gram is None else self.gram + part
        self.tokens += len(rows)


def reference_weight(method: str, weight: Tensor, seen: Inputs) -> Tensor:
    """A weight by a method, on what its layer reads."""
    if method == "magnitude":
        return weight * magnitude_mask(weight)
    assert seen.gram is not None
    norms = (seen.gram.diagonal() / seen.tokens).sqrt().float()
    if method in ("Wanda", "RIA"):
        return weight * (wanda_mask if method == "Wanda" else ria_mask)(weight, norms)
    found = sparsegpt_by_columns(weight, seen.gram, damping=0.01)
    return found if method == "SparseGPT" else weight * (found != 0)


@torch.no_grad()
def reference_model(
    method: str, folder: Path, windows: TokenWindows, only: frozenset[str]
) -> PreTrainedModel:
    """The stock model, its linear layers pruned one after the other on what the pruned ones before
    give.  (The papers' own code prunes a block on the inputs of its dense layers; that costs Wanda
    some 6 % of perplexity here.)"""
    model = secateur.open_model(folder)
    layers, captured = model.get_submodule("model.layers"), list[tuple[Tensor, dict[str, Any]]]()
    hook = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: captured.append((args[0], kwargs)), with_kwargs=True
    )
    for batch in windows:
        model(input_ids=batch, use_cache=False, logits_to_keep=1)
    hook.remove()
    states = [x for x, _ in captured]
    for at, block in enumerate(layers):
        linears = {
            n: m for n, m in block.named_modules() if f"model.layers.{at}.{n}.weight" in only
        }
        assert all(type(m) is nn.Linear for m in linears.values())
        for together in _stages(block, linears, states[0], captured[0][1]):
            seen = Inputs()
            if method != "magnitude":
                first = linears[together[0]]
                hook = first.register_forward_pre_hook(
                    lambda module, args, seen=seen: seen.add(args[0])
                )
                for x, (_, kwargs) in zip(states, captured, strict=True):
                    block(x, **kwargs)
                hook.remove()
            for name in together:
                linears[name].weight.copy_(reference_weight(method, linears[name].weight, seen))
        if method != "magnitude":
            states = [
                _hidden(block(x, **kwargs)) for x, (_, kwargs) in zip(states, captured, strict=True)
            ]
    return model


def _stages(
    block: nn.Module, linears: dict[str, nn.Module], x: Tensor, kwargs: dict[str, Any]
) -> list[list[str]]:
    """The linear layers of a block in the order in which they run, those that read one tensor
    together."""
    read: dict[int, list[str]] = {}
    held = list[Tensor]()  # so that no tensor takes the place of another

    def saw(name: str, args: tuple[Tensor, ...]) -> None:
        held.append(args[0])
        read.setdefault(id(args[0]), []).append(name)

    hooks = [
        m.register_forward_pre_hook(lambda m, args, n=n: saw(n, args)) for n, m in linears.items()
    ]
    block(x, **kwargs)
    for one in hooks:
        one.remove()
    return list(read.values())


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


# Measuring
@dataclass(frozen=True)
class Perplexity:
    """Of next tokens; log_stderr: of its logarithm, over the held-out windows; windows: their mean
    losses."""

    perplexity: float
    log_stderr: float
    windows: list[float]


def perplexity_of(losses: list[Tensor]) -> Perplexity:
    mean = torch.cat(losses).double().mean().item()
    return Perplexity(
        math.exp(mean),
        mean_stderr(losses),
        [round(one.double().mean().item(), 5) for one in losses],
    )


def compared(ours: dict[str, Any], reference: dict[str, Any] | None) -> str:
    """The reference's perplexity, and by how much of it ours differs, with the standard error over
    the windows."""
    if reference is None:
        return " | "
    told = (
        f"{reference['perplexity']:.2f} | {ours['perplexity'] / reference['perplexity'] - 1:+.1%}"
    )
    if "windows" not in ours or "windows" not in reference:
        return told
    gaps = torch.tensor(ours["windows"], dtype=torch.float64) - torch.tensor(
        reference["windows"], dtype=torch.float64
    )
    return f"{told} +- {float(gaps.std()) / math.sqrt(len(gaps)):.1%}"


def of_program(program: Program, held: tuple[Sample, ...]) -> Perplexity:
    return perplexity_of([next_token_losses(program, sample) for sample in held])


@torch.no_grad()
def of_model(model: PreTrainedModel, held: Tensor) -> Perplexity:
    return perplexity_of(
        [token_losses(model(input_ids=row[None]).logits[0, :-1], row[1:]) for row in held]
    )


class Report:
    """The rows measured so far, on the disk after each."""

    def __init__(self, out: Path, protocol: dict[str, Any]) -> None:
        self.out, self.file = out, out / "sparsity.json"
        fresh = {"protocol": protocol, "machine": describe_machine(), "rows": {}}
        self.body: dict[str, Any] = (
            json.loads(self.file.read_text()) if self.file.is_file() else fresh
        )
        if self.body["protocol"] != protocol:
            raise SystemExit(f"{self.file} holds another protocol: choose another --out")

    def once(self, what: str, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A cell of a row, measured where it is not there yet."""
        row = self.body["rows"].setdefault(what, {})
        if key not in row:
            started, busy = time.perf_counter(), time.process_time()
            row[key] = measure() | {
                "wall_s": round(time.perf_counter() - started, 1),
                "cpu_s": round(time.process_time() - busy, 1),
            }
            self.out.mkdir(parents=True, exist_ok=True)
            _replace(self.file, json.dumps(self.body, indent=1) + "\n")
            _replace(self.out / "sparsity.md", self.markdown())
            print(what, key, json.dumps(row[key])[:160], flush=True)
        return dict(row[key])

    def markdown(self) -> str:
        """The table.  The gap is that of the logarithm of perplexity to the dense model's,
        SparseGPT's counted as 1."""
        rows = self.body["rows"]
        dense = rows["dense"]["ours"]["perplexity"]
        whole = rows.get("SparseGPT", {}).get("ours", {}).get("perplexity")
        lines = []
        for what, row in rows.items():
            if "ours" not in row:
                continue
            ours = row["ours"]
            gap = (
                math.log(ours["perplexity"] / dense) / math.log(whole / dense)
                if whole
                else math.nan
            )
            beside = compared(ours, row.get("reference"))
            lines.append(
                f"| {what} | `{ours.get('pipeline', '')}` | {ours['perplexity']:.2f} | "
                f"{ours['log_stderr']:.3f} "
                f"| {ours['perplexity'] / dense:.2f} | {gap:.3f} | {beside} | "
                f"{ours.get('error') or ''} "
                f"| {ours['cpu_s']:.0f} |"
            )
        protocol = "\n".join(
            f"- {k}: {v}" for k, v in {**self.body["protocol"], **self.body["machine"]}.items()
        )
        head = (
            "| what | pipeline | perplexity | +- log | x dense | log gap | reference | ours to it "
            "| layer error "
            "| CPU s |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
        )
        cost = self.body.get("cost")
        tail = ["", "## Cost", "", "```", json.dumps(cost, indent=1), "```"] if cost else []
        return "\n".join(["# One-shot 2:4", "", protocol, "", head, *lines, *tail]) + "\n"

    def draw(self) -> None:
        """Perplexity of each row and of its reference."""
        from matplotlib.figure import Figure

        rows = {what: row for what, row in self.body["rows"].items() if "ours" in row}
        figure = Figure(figsize=(9, 1 + 0.4 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.barh(
            list(rows),
            [row["ours"]["perplexity"] for row in rows.values()],
            height=0.6,
            label="secateur",
        )
        beside = {
            what: row["reference"]["perplexity"] for what, row in rows.items() if "reference" in row
        }
        axes.plot(
            list(beside.values()),
            list(beside),
            "k|",
            markersize=16,
            label="reference from the paper",
        )
        axes.set(xscale="log", xlabel=f"perplexity, {self.body['protocol']['held_out']}")
        axes.invert_yaxis()
        axes.legend()
        figure.savefig(self.out / "sparsity.png", dpi=130)


def _replace(file: Path, body: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(body, encoding="utf-8")
    os.replace(part, file)


# Cost
def costs(options: argparse.Namespace, report: Report, windows: TokenWindows) -> None:
    """Wall seconds, CPU seconds and peak memory of each pipeline in a fresh process that reads
    tokens from a file; opening the model is part of the memory and not of the seconds.  And CPU
    seconds of choosing all masks anew."""
    report.body["cost"] = report.body.get("cost", {})
    with TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.safetensors"
        save_file({"input_ids": windows.windows}, tokens)
        for pipeline in options.rows or [GPT, BEST]:
            command = [
                sys.executable,
                "-P",
                __file__,
                "--out",
                str(options.out),
                "--one",
                pipeline,
                str(tokens),
            ]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            report.body["cost"][pipeline] = json.loads(found.stdout.strip().splitlines()[-1])
            print(pipeline, report.body["cost"][pipeline], flush=True)
    report.body["cost"]["all masks anew, one thread"] = refresh_cost()
    options.out.mkdir(parents=True, exist_ok=True)
    _replace(report.file, json.dumps(report.body, indent=1) + "\n")
    if "dense" in report.body["rows"]:
        _replace(report.out / "sparsity.md", report.markdown())


def one_cost(pipeline: str, tokens: Path) -> dict[str, Any]:
    program, windows = (
        secateur.capture(default_cache() / MODEL_FOLDER),
        load_file(tokens)["input_ids"],
    )
    context = Context(data=samples(windows, program))
    before, started, busy = peak_memory_bytes(), time.perf_counter(), time.process_time()
    for one in secateur.Pipeline.parse(pipeline).passes:
        program = one(program, context)
    spent = {
        "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(time.process_time() - busy, 1),
    }
    return {
        **spent,
        "peak_bytes": peak_memory_bytes(),
        "peak_bytes_before": before,
        "tokens": windows.numel(),
    }


def refresh_cost() -> dict[str, Any]:
    """CPU seconds of ranking the weights of all layers by magnitude, the score included."""
    program = secateur.capture(default_cache() / MODEL_FOLDER)
    parameters = dict(program.named_parameters())
    weights = [
        parameters[one.parameter].detach() for one in linear_layers(program)[0] if not one.head
    ]
    masks = [torch.empty(weight.shape, dtype=torch.bool) for weight in weights]
    threads, found = torch.get_num_threads(), list[float]()
    torch.set_num_threads(1)
    for _ in range(4):
        started = time.process_time()
        for weight, mask in zip(weights, masks, strict=True):
            Pattern(2, 4).select_mask(weight.abs(), out=mask)
        found.append(time.process_time() - started)
    torch.set_num_threads(threads)
    return {
        "cpu_s": [round(one, 3) for one in found],
        "weights": len(weights),
        "entries": sum(map(Tensor.numel, weights)),
    }


# The run
def measure(
    program: Program, pipeline: str, context: Context, held: tuple[Sample, ...]
) -> dict[str, Any]:
    for one in secateur.Pipeline.parse(pipeline).passes:
        program = one(program, context)
    figures = [step.figures for step in program.history]
    told = {
        "pipeline": pipeline,
        "error": next((f["error"] for f in figures if "error" in f), None),
    }
    return {**told, "seconds": [f["seconds"] for f in figures], **asdict(of_program(program, held))}


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(what, pipeline) of each row."""
    rows = (
        {row: row for row in options.rows}
        if options.rows
        else ROWS | (WITH_OTHERS if options.all else {})
    )
    yield from ((what, pipeline) for what, pipeline in rows.items() if options.only in what)


def run(options: argparse.Namespace) -> None:
    if options.one:
        print(json.dumps(one_cost(options.one[0], Path(options.one[1]))))
        return
    folder, documents = default_cache() / MODEL_FOLDER, load_text(default_cache())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = options.sequences * options.window
    windows = calibration_windows(
        documents.calibration, tokenizer, tokens=tokens, window=options.window
    )
    stream, _ = token_stream(documents.held_out, tokenizer, tokens=options.held_out)
    rows = stream.view(-1, options.window)
    protocol = {
        "model": folder.name,
        "dtype": "float32",
        "calibration": windows.describe(),
        "held_out": f"{rows.numel()} tokens of other documents, windows of {options.window}, no "
        "beginning token",
    }
    report = Report(options.out, protocol)
    if options.cost:
        costs(options, report, windows)
        return
    dense = secateur.capture(folder)
    context, held = Context(data=samples(windows, dense)), samples(rows, dense)
    only = frozenset(one.parameter for one in linear_layers(dense)[0] if not one.head)
    report.once("dense", "ours", lambda: asdict(of_program(dense, held)))
    for what, pipeline in cells(options):
        report.once(what, "ours", lambda pipeline=pipeline: measure(dense, pipeline, context, held))
        if options.references and what in list(ROWS)[:5]:
            report.once(
                what,
                "reference",
                lambda what=what: asdict(
                    of_model(reference_model(what, folder, windows, only), rows)
                ),
            )
    report.draw()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=128, help="of calibration text")
    parser.add_argument("--window", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--held-out", type=int, default=32_768, help="tokens that are predicted")
    parser.add_argument("--only", default="", help="rows whose description holds this text")
    parser.add_argument("--rows", nargs="*", help="these pipelines instead")
    parser.add_argument(
        "--all", action="store_true", help="rows with permuted channels and reconstruction, too"
    )
    parser.add_argument("--references", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cost", action="store_true", help="time and memory instead of quality")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
