"""What the tests of training run in processes of their own: one distillation of a tiny model.

python worker.py OUT [key=value ...]: writes OUT/weights.safetensors and OUT/figures.json (process 0).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save_file
from zoo.models import tiny_model

from secateur.graph import Program, capture
from secateur.passes import Context, Pipeline, samples
from secateur.passes.distill import Distill
from secateur.runtime import raise_model

LENGTH, BELOW = 24, 128
SMALL: dict[str, Any] = {
    "tokens": 1440,
    "batch_tokens": 96,
    "micro_batch": 2,
    "held_out": 4,
    "evaluations": 3,
    "lr": 1e-3,
}


def pruned(
    kind: str = "llama", pipeline: str = "score{metric=magnitude},prune-width{mlp=0.5}"
) -> tuple[Program, Context]:
    """A tiny model without half of its neurons, and data to train it on."""
    program = capture(tiny_model(kind))
    ids = torch.randint(0, BELOW, (24, LENGTH), generator=torch.Generator().manual_seed(1))
    context = Context(data=samples(ids, program), raise_model=raise_model)
    return Pipeline.parse(pipeline)(program, context), context


def distilled(
    out: Path, options: dict[str, Any], resume: Path | None = None, progress: Callable[..., Any] | None = None
) -> None:
    """One run, its weights and figures left in ``out``."""
    torch.set_num_threads(1)
    small, context = pruned()
    more = {} if progress is None else {"progress": progress}
    context = Context(context.data, raise_model=raise_model, resume=resume, **more)
    result = Distill(**{**SMALL, **options})(small, context)
    if int(os.environ.get("RANK", "0")) == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "figures.json").write_text(json.dumps(result.history[-1].figures))
        save_file({name: p.detach().contiguous() for name, p in result.named_parameters()}, out / "weights.safetensors")


def killed(out: Path, options: dict[str, Any], resume: Path, at: int) -> None:
    """The same, killed by the kernel after ``at`` steps of this call."""

    def until(items: Any, description: str, total: int | None = None) -> Any:
        for count, item in enumerate(items):
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    distilled(out, options, resume, until)


if __name__ == "__main__":
    given = dict(pair.split("=", 1) for pair in sys.argv[2:])
    kept = given.pop("resume", None)
    distilled(Path(sys.argv[1]), {k: json.loads(v) for k, v in given.items()}, Path(kept) if kept else None)
