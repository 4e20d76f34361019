"""Models larger than memory: work on one of 3.1 GB inside a memory limit of 2 GB that the system
enforces.

Run ``python benchmarks/small_memory.py --out FILE --work FOLDER --text TEXT.jsonl`` as root on
Linux.  Each job runs in a control group of its own, which counts the pages of mapped files, too,
and kills what goes beyond.  Measured with version 1 of control groups; in version 2 the group that
this runs in must give its children the memory controller. Needs 10 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from secateur.tools.demo.assets import MODEL_FOLDER, default_cache
from secateur.tools.machine import describe_machine

TOKENS, WINDOW = 2_048, 256
SCORE = """
import secateur, sys, torch
program = secateur.capture(sys.argv[1])
ids = torch.randint(0, 49_000, (4, 256), generator=torch.Generator().manual_seed(0))
pipeline = secateur.Pipeline.parse("score{metric={taylor={by_block=true}}}")
scores = pipeline.run(program, data=ids).scores
assert len(scores)
for score in scores.values():
    assert bool(score.isfinite().all()) and float(score.sum()) > 0
"""
SPARSIFY = "sparsify{metric=wanda,offload=true,keep_removed=false}"


class Limit:
    """A control group that holds its processes to some bytes."""

    def __init__(self, limit: int) -> None:
        own = {
            kinds: path
            for _, kinds, path in (
                line.split(":", 2) for line in _read("/proc/self/cgroup").split("\n")
            )
        }
        old = "memory" in own
        root = Path("/sys/fs/cgroup/memory" if old else "/sys/fs/cgroup") / own[
            "memory" if old else ""
        ].lstrip("/")
        self.folder = root / f"small-memory-{os.getpid()}"
        self.peak = "memory.max_usage_in_bytes" if old else "memory.peak"
        self.folder.mkdir()
        file = self.folder / ("memory.limit_in_bytes" if old else "memory.max")
        if not file.is_file():
            self.close()
            raise SystemExit(
                f"{root} gives its children no memory controller: enable it in "
                "cgroup.subtree_control"
            )
        file.write_text(str(limit))

    def run(self, command: list[str]) -> dict[str, Any]:
        """Exit status, seconds and peak bytes of a command, mapped files included."""
        join, begun = self.folder / "cgroup.procs", time.perf_counter()
        process = subprocess.run(
            command, preexec_fn=lambda: join.write_text(str(os.getpid())), capture_output=True
        )
        found = {"exit": process.returncode, "seconds": round(time.perf_counter() - begun, 1)}
        if process.returncode:
            print(process.stderr.decode()[-2000:], file=sys.stderr)
        return found | {"peak_bytes": int(_read(self.folder / self.peak))}

    def close(self) -> None:
        self.folder.rmdir()


def _read(file: str | Path) -> str:
    return Path(file).read_text().strip()


def big_model(folder: Path) -> int:
    """A Llama of 768 M random float32 weights, once.  Returns: bytes of its weights."""
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 20,
            "vocab_size": 49_152,
        }
        heads = {"num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(default_cache() / MODEL_FOLDER).save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, required=True, help="for the model and what is made of it; stays there"
    )
    parser.add_argument("--text", type=Path, required=True, help="calibration text, .jsonl")
    parser.add_argument("--limit", type=int, default=2_000_000_000)
    options = parser.parse_args()
    model = options.work / "model"
    size = big_model(model)
    sizes = ["--tokens", str(TOKENS), "--window", str(WINDOW), "--data", str(options.text)]
    compress = [
        "compress",
        str(model),
        "-p",
        SPARSIFY,
        "--no-packed",
        *sizes,
        "-o",
        str(options.work / "sparse"),
    ]
    jobs = {
        "gradients of every weight, block by block: score{metric={taylor={by_block=true}}}, 4 "
        "x 256 tokens": [*("-P", "-c", SCORE, str(model))],
        f"opened, {SPARSIFY} on {TOKENS:,} tokens, verified, saved": [
            "-P",
            "-m",
            "secateur",
            *compress,
            "--overwrite",
        ],
    }
    found: dict[str, Any] = {"weights_bytes": size, "limit_bytes": options.limit, "jobs": {}}
    os.environ["TMPDIR"] = str(options.work)  # what is held in files must not lie in memory
    for what, command in jobs.items():
        limit = Limit(options.limit)
        try:
            found["jobs"][what] = limit.run([sys.executable, *command])
        finally:
            limit.close()
        print(what, found["jobs"][what], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({**found, "machine": describe_machine()}, indent=1) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
