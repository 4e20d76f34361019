"""What the tests of training run in a process of its own: distillations of a tiny model, some of
them killed.

python worker.py OUT [pass=NAME] [kind=gpt2] [resume=DIR] [kills=3,1] [random=5] [stop_at=7]
[option=JSON ...]

Writes OUT/weights.safetensors and OUT/figures.json (process 0).
pass: distill, of a model without half of its neurons; or retrain-sparse, of a 2:4 model.
kills: before, the run is started and killed after so many of its steps, one run a number.
random: before, the run is started and killed at so many random moments.
stop_at: it ends after so many steps.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save_file
from zoo.models import tiny_model

from secateur.graph import Cut, Pattern, Program, Sparse, capture, with_parameters
from secateur.passes import Context, Pipeline, samples
from secateur.passes.base import Pass
from secateur.passes.lowering.layers import linear_layers
from secateur.passes.training.distill import Distill
from secateur.passes.training.retrain_sparse import RetrainSparse
from secateur.runtime import to_transformers

LENGTH, BELOW = 24, 128
SMALL: dict[str, Any] = {
    "tokens": 1440,
    "batch_tokens": 96,
    "micro_batch": 2,
    "held_out": 4,
    "evaluations": 3,
    "lr": 1e-3,
    "save_every": 2,
}


def pruned(kind: str = "llama") -> tuple[Program, Context]:
    """A tiny model without half of its neurons, and data to train it on."""
    program = capture(tiny_model(kind))
    ids = torch.randint(0, BELOW, (24, LENGTH), generator=torch.Generator().manual_seed(1))
    context = Context(data=samples(ids, program), raise_model=to_transformers)
    return Pipeline.parse("score{metric=magnitude},prune-width{mlp=0.5}")(program, context), context


def sparse(kind: str = "llama", *, dtype: torch.dtype = torch.float32) -> tuple[Program, Context]:
    """A tiny model, every projection 2:4 by magnitude, what was removed kept; and data to train it
    on."""
    program = capture(tiny_model(kind).to(dtype))
    ids = torch.randint(0, BELOW, (24, LENGTH), generator=torch.Generator().manual_seed(1))
    parameters, pattern = dict(program.named_parameters()), Pattern(2, 4)
    values, entries = dict[str, torch.Tensor](), dict[str, Sparse]()
    for layer in linear_layers(program)[0]:
        if not layer.head:
            weight = parameters[layer.parameter].detach()
            mask = pattern.select_mask(weight.float().abs())
            values[layer.parameter] = weight.masked_fill(~mask, 0)
            entries[layer.parameter] = Sparse(pattern, removed=weight.masked_fill(mask, 0))
    pruned = with_parameters(program, values).replace(
        sparse=MappingProxyType(entries), cut=Cut(program, {})
    )
    return pruned, Context(data=samples(ids, program), raise_model=to_transformers)


def trained(out: Path, one: Pass, small: Program, context: Context) -> None:
    """One run, its weights and figures left in ``out``."""
    result = one(small, context)
    if int(os.environ.get("RANK", "0")) == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "figures.json").write_text(json.dumps(result.history[-1].figures))
        save_file(
            {name: p.detach().contiguous() for name, p in result.named_parameters()},
            out / "weights.safetensors",
        )


def killed_after(steps: int, run: Callable[..., None]) -> int:
    """Run in a child that its own hand kills after so many steps; returns the signal that ended
    it."""

    def until(items: Any, description: str, total: int | None = None) -> Any:
        for count, item in enumerate(items):
            if count == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    return _in_child(lambda: run(until), None)


def killed_within(seconds: float, run: Callable[..., None]) -> int:
    """Run in a child that is killed after a time, whatever it does then; 0 if it ended before."""
    return _in_child(lambda: run(None), seconds)


def _in_child(work: Callable[[], None], seconds: float | None) -> int:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] & 127


MAKERS: dict[str, tuple[Callable[[str], tuple[Program, Context]], type[Pass]]] = {
    "distill": (pruned, Distill),
    "retrain-sparse": (sparse, RetrainSparse),
}


def main(out: Path, given: dict[str, str]) -> None:
    given_pass, kind, kept = (
        given.pop("pass", "distill"),
        given.pop("kind", "llama"),
        given.pop("resume", None),
    )
    kills, moments = json.loads(f"[{given.pop('kills', '')}]"), int(given.pop("random", "0"))
    stop = int(given.pop("stop_at", "-1"))
    options = {key: json.loads(value) for key, value in given.items()}

    torch.set_num_threads(1)  # no other thread, so that a child can be forked
    made, kind_of_pass = MAKERS[given_pass]
    small, context = made(kind)
    context = replace(context, resume=Path(kept) if kept else None)

    def run(progress: Callable[..., Any] | None) -> None:
        context_of_run = context if progress is None else replace(context, progress=progress)
        trained(out, kind_of_pass(**{**SMALL, **options}), small, context_of_run)

    for steps in kills:
        assert killed_after(steps, run) == signal.SIGKILL
    draw = random.Random(0)
    for _ in range(moments):
        killed_within(draw.uniform(0.5, 6.0), run)
    run(stopping(stop) if stop >= 0 else None)


def stopping(steps: int) -> Callable[..., Any]:
    """A reporter that ends the process after so many steps."""

    def until(items: Any, description: str, total: int | None = None) -> Any:
        for count, item in enumerate(items):
            if count == steps:
                raise SystemExit(0)
            yield item

    return until


if __name__ == "__main__":
    main(Path(sys.argv[1]), dict(pair.split("=", 1) for pair in sys.argv[2:]))
