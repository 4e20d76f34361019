"""What capture and grouping cost on Llama-3 shapes without weights, and where the CPU seconds go.

python -P benchmarks/capture_scale.py 8b      # or 70b, 405b; one shape a process, so that the peak
is its own
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import secateur
from secateur.graph import analyse

SHAPES = {
    "8b": (4096, 14336, 32, 32),
    "70b": (8192, 28672, 80, 64),
    "405b": (16384, 53248, 126, 128),
}


def main() -> None:
    hidden, inner, layers, heads = SHAPES[sys.argv[1]]
    spent: dict[str, float] = {"imports": time.process_time()}
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )

    def timed(name: str, work: Callable[[], Any]) -> Any:
        before = time.process_time()
        result = work()
        spent[name] = round(time.process_time() - before, 2)
        return result

    def build() -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    laying = sys.modules["secateur.graph.capture.export"]
    inside: dict[str, float] = {}
    for name in ("_export", "_flatten", "extend"):
        setattr(laying, name, _clocked(getattr(laying, name), name, inside))
    model = timed("build on meta", build)
    program = timed("capture", lambda: secateur.capture(model))
    timed("axis analysis", lambda: analyse(program))
    groups = timed("groups", lambda: secateur.coupled_groups(program))
    print(
        json.dumps(
            {
                "shape": sys.argv[1],
                "parameters": program.num_parameters,
                "nodes": len(program.gm.graph.nodes),
                "groups": len(groups),
                "cpu_seconds": {k: round(v, 2) for k, v in spent.items()},
                "inside_capture": {k.strip("_"): round(v, 2) for k, v in inside.items()},
                "capture_and_groups": round(
                    spent["capture"] + spent["axis analysis"] + spent["groups"], 2
                ),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
        )
    )


def _clocked(function: Callable[..., Any], name: str, into: dict[str, float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        before = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            into[name] = into.get(name, 0.0) + time.process_time() - before

    return run


if __name__ == "__main__":
    main()
