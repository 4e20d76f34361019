"""The options that every training pass has, and what follows from them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from secateur.graph import Program
from secateur.graph.errors import PipelineError
from secateur.passes.base import Context, Cost, Pass
from secateur.passes.training.text import TrainingText, read_windows, split_held_out

Precision = Literal["auto", "float32", "bfloat16"]
LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TrainingPass(Pass):
    """A pass that trains: AdamW (0.9, 0.95), linear warm-up, then a cosine down to a part of the
    rate.

    tokens: to train on; text that holds fewer is seen more than once.
    lr: highest learning rate.
    batch_tokens: tokens of an optimizer step, over all processes.
    micro_batch: sequences that a process takes at once, at most.
    window: tokens of a sequence where data names a file; calibration sequences keep their own
        length.
    data: a file to train on instead of the calibration data: .txt, .jsonl (field text), or
        .safetensors (input_ids).
    held_out: sequences held back from training to measure KL and perplexity by, at most one in
        five.
    evaluations: how often to measure.
    warmup: part of the steps in which the learning rate rises.
    final_lr: part of lr that the cosine ends at.
    weight_decay, clip: of AdamW; largest norm of a step's gradient.
    precision: of matrix products, the teacher's too: float32, bfloat16, or auto (bfloat16 where
        weights are of low precision; those are held as float32 while they are trained).
    checkpointing: recompute activations in the backward pass, which saves memory.
    compile: backend of torch.compile for the student: off, inductor or aot_eager.
    save_every: steps from one checkpoint to the next, in a run that can be resumed.
    """

    tokens: Annotated[int, Field(ge=1)] = 1_000_000
    lr: Annotated[float, Field(gt=0)] = 3e-4
    batch_tokens: Annotated[int, Field(ge=1)] = 4096
    micro_batch: Annotated[int, Field(ge=1)] = 4
    window: Annotated[int, Field(ge=2)] = 512
    data: str | None = None
    held_out: Annotated[int, Field(ge=0)] = 16
    evaluations: Annotated[int, Field(ge=1)] = 8
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    precision: Precision = "auto"
    checkpointing: bool = False
    compile: Literal["off", "inductor", "aot_eager"] = "off"
    save_every: Annotated[int, Field(ge=1)] = 50

    packages: ClassVar[Mapping[str, str]] = {"accelerate": "pip install 'secateur[train]'"}

    @property
    def needs_data(self) -> bool:
        """Whether calibration sequences are the training text: where no file is named."""
        return self.data is None

    @property
    def files(self) -> tuple[Path, ...]:
        """The training text, where a file is named."""
        if self.data is None:
            return ()
        return (Path(self.data).expanduser(),)

    @property
    def cost(self) -> Cost:
        """Weights, gradients and two moments in float32; the teacher's pass is the fourth."""
        return Cost(4.0, 16.0, tokens=self.tokens, checkpoints=12.0)

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run; training needs weights."""
        reasons = super().requires(program)
        if any(p.is_meta for _, p in program.named_parameters()):
            reasons.append("the weights are on the meta device: open the model with weights")
        return reasons

    def check_text(self, program: Program, seed: int) -> None:
        """Read as much of the training text as one window takes, where a file is named: what is
        wrong with it is known before any work.

        Args:
            program: names the main input and the tokenizer.
            seed: of the order of documents.

        Raises:
            TextError: the file cannot be read, or holds not one window.
        """
        if self.data is not None:
            file = Path(self.data).expanduser()
            read_windows(file, program, tokens=self.window, window=self.window, seed=seed)

    def load_text(self, program: Program, context: Context) -> TrainingText:
        """The windows to train on and those held back.

        Args:
            program: names the main input and the tokenizer.
            context: with calibration data and seed.

        Raises:
            TextError: there is none, or the file cannot be read.
        """
        if self.data is None:
            return split_held_out(context.data or (), self.held_out)
        wanted = self.tokens + self.held_out * self.window
        file = Path(self.data).expanduser()
        return split_held_out(
            read_windows(file, program, tokens=wanted, window=self.window, seed=context.seed),
            self.held_out,
        )


@dataclass(frozen=True)
class StepPlan:
    """Steps of a run.

    steps: optimizer steps.
    micro: sequences a process takes at once.
    accumulate: such takes a step.
    warmup: steps in which the rate rises.
    evaluate, save: steps from one to the next.   world: processes.
    """

    steps: int
    micro: int
    accumulate: int
    warmup: int
    evaluate: int
    save: int
    world: int = 1

    @property
    def sequences(self) -> int:
        """Sequences of one step, over all processes."""
        return self.micro * self.accumulate * self.world


def plan_steps(options: TrainingPass, window: int, tokens: int) -> StepPlan:
    """The steps that ``tokens`` take, in batches of as near ``batch_tokens`` as whole micro-batches
    come.

    With several processes the batch is shared out among them.

    Args:
        options: of the pass.
        window: tokens of a sequence.
        tokens: to train on.

    Raises:
        PipelineError: the processes do not divide the batch.
    """
    world = world_size()
    sequences = max(1, round(options.batch_tokens / window))
    if sequences % world:
        raise PipelineError(
            f"{options.name}: {sequences} sequences of {window} tokens a step do not divide among "
            f"{world} processes: "
            f"choose batch_tokens as a multiple of {world * window}"
        )
    each = sequences // world
    micro = next(m for m in range(min(options.micro_batch, each), 0, -1) if each % m == 0)
    steps = math.ceil(tokens / (sequences * window))
    return StepPlan(
        steps=steps,
        micro=micro,
        accumulate=each // micro,
        warmup=math.ceil(options.warmup * steps),
        evaluate=math.ceil(steps / options.evaluations),
        save=options.save_every,
        world=world,
    )


def world_size() -> int:
    """Processes of this run: those that torchrun started, or one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def autocast_dtype(precision: Precision, dtypes: set[torch.dtype]) -> torch.dtype | None:
    """The dtype of matrix products, None for the weights' own; weights of low precision are trained
    as float32.

    Args:
        precision: option of the pass.
        dtypes: of the parameters.
    """
    table = {
        "float32": None,
        "bfloat16": torch.bfloat16,
        "auto": torch.bfloat16 if dtypes & set(LOW) else None,
    }
    return table[precision]
