"""The distillation trainer: transformers' Trainer with own losses and pickle-free checkpoints.

Trainer does the loop, gradient accumulation, clipping, schedules and, through accelerate, FSDP2.
Its own checkpoints are pickles, so what it would write and read is written and read here, as
safetensors and JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from secateur.graph.errors import SecateurError
from secateur.passes.storage.journal import JSON, Entry, Journal
from secateur.passes.training.learner import Learner, TeacherTargets
from secateur.passes.training.masks.schedule import MaskSchedule
from secateur.passes.training.memory import (
    add_prefix,
    gather_sharded_params,
    optimizer_state,
    put_optimizer_state,
    put_random_state,
    put_weights,
    random_state,
    weights_of,
    with_prefix,
)
from secateur.passes.training.plan import StepPlan, TrainingPass, world_size
from secateur.passes.training.teachers import Teacher
from secateur.passes.training.text import Item, TrainingOrder, TrainingText, collate_batch

STATE = "training"
TRAINER_STATE = "trainer_state.json"
BETAS = (0.9, 0.95)


class TrainingError(SecateurError):
    """Training cannot go on: a loss is no number, or what was kept belongs to another run."""


class DistillationTrainer(Trainer):
    """Trains a Learner on the targets of a Teacher.

    curve: one record a step: step, tokens, loss, kl, ce, states, lr, grad_norm; losses are means
        over the step's tokens, before the step.
    held_out: one record an evaluation: step, tokens, kl, ce, perplexity.
    first_step: the step that was kept from a run before, or 0.
    masks: of weights that are trained under them, or None.

    Raises:
        TrainingError: what was kept is of another run.
    """

    def __init__(
        self,
        learner: Learner,
        teacher: Teacher,
        text: TrainingText,
        pace: StepPlan,
        options: TrainingPass,
        lr: float,
        journal: Journal,
        fingerprint: dict[str, str],
        seed: int,
        folder: str,
        use_cpu: bool,
        masks: MaskSchedule | None = None,
    ) -> None:
        self.masks = masks
        self.teacher = teacher
        self.text = text
        self.pace = pace
        self.journal = journal
        self.fingerprint = fingerprint
        self.curve: list[dict[str, float]] = []
        self.held_out: list[dict[str, float]] = []
        self._parts: list[Tensor] = []
        self.learns_from_teacher = bool(learner.weights.kl)
        self._kept = journal.read(STATE)
        self._before = self.first_step = 0
        if self._kept is not None:
            check_same(self._kept.facts["fingerprint"], fingerprint)
            self.first_step = int(json.loads(self._kept.facts["trainer"])["global_step"])
        super().__init__(
            model=learner,
            args=training_arguments(options, lr, pace, seed, folder, use_cpu, bool(text.held_out)),
            data_collator=collate_batch,
            train_dataset=TrainingOrder(text.train, pace.steps * pace.sequences, seed),
            eval_dataset=list(text.held_out) or None,
            optimizer_cls_and_kwargs=self._mask_optimizer(lr),
        )
        self.model_accepts_loss_kwargs = (
            False  # the loss is the mean of a micro-batch: Trainer divides by their number
        )
        self.remove_callback(PrinterCallback)
        teacher.move_to(self.args.device)

    def create_accelerator_and_postprocess(self) -> None:
        """accelerate shards on accelerators alone and quietly replicates on the CPU: have it shard
        there, too."""
        from accelerate import PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if (
            state.distributed_type == DistributedType.MULTI_CPU
            and self.args.fsdp_plugin_args is not None
        ):
            state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                **self.args.fsdp_plugin_args
            )
            for shared in (state._shared_state, PartialState._shared_state):
                shared["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _mask_optimizer(self, lr: float) -> tuple[type[torch.optim.Optimizer], JSON] | None:
        """The optimizer that masked weights need, or None for Trainer's own AdamW."""
        if self.masks is None:
            return None
        kind, made_with = self.masks.optimizer_class
        return kind, {"lr": lr, "betas": BETAS, **made_with}

    # What is learned
    def compute_loss(
        self,
        model: nn.Module,
        inputs: Item,
        return_outputs: bool = False,
        num_items_in_batch: object = None,
    ) -> Tensor:
        """The loss of a micro-batch against the teacher's predictions; its parts are kept for
        ``log``.

        Args:
            model: the learner, as accelerate wrapped it.
            inputs: a batch, see ``collate_batch``.
            return_outputs: not used.
            num_items_in_batch: not used.

        Returns:
            a scalar with a gradient.
        """
        self._kept = None  # all of it was put where it belongs before the first step
        losses = model(
            inputs, self.teacher(inputs) if self.learns_from_teacher else TeacherTargets(None)
        )
        parts = (losses.total.detach(), losses.kl, losses.ce, losses.states)
        self._parts.append(torch.stack([part.float() for part in parts]))
        return losses.total  # type: ignore[no-any-return]

    def _get_train_sampler(self, train_dataset: object = None) -> SequentialSampler:
        """The order of ``TrainingOrder``, one after the other."""
        return SequentialSampler(range(self.pace.steps * self.pace.sequences))

    @torch.no_grad()
    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """KL and cross entropy on the text held back; every process measures all of it."""
        model = self._inner_learner.eval()
        sums = torch.zeros(2)
        count = 0
        for batch in DataLoader(
            _HeldOutText(self.text), batch_size=self.pace.micro, collate_fn=collate_batch
        ):
            batch = self._prepare_inputs(batch)
            losses = model(batch, self.teacher(batch))
            size = len(batch["window"])
            sums += size * torch.stack([losses.kl, losses.ce]).float().cpu()
            count += size
        gather_sharded_params(model.train())
        self.control.should_evaluate = False
        kl, ce = (sums / count).tolist()
        record = {"kl": kl, "ce": ce, "perplexity": math.exp(min(ce, 700.0))}
        self.held_out.append({"step": self.state.global_step, "tokens": self.tokens_seen, **record})
        result: dict[str, float] = {}
        for name, value in record.items():
            result[f"eval_{name}"] = value
        return result

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on so far, over all processes."""
        return int(self.state.global_step * self.pace.sequences * self.text.window)

    @property
    def tokens_seen_now(self) -> int:
        """Those of this call, which may have gone on with an older run."""
        return self.tokens_seen - self._before

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep the record of a step; Trainer's other messages are not kept.

        Args:
            logs: of Trainer.
            start_time: not used.
        """
        if "loss" not in logs:
            return
        means = self.accelerator.reduce(torch.stack(self._parts).mean(0), "mean")
        self._parts.clear()
        loss, kl, ce, states = means.tolist()
        record = {
            "step": self.state.global_step,
            "tokens": self.tokens_seen,
            "loss": loss,
            "kl": kl,
            "ce": ce,
        }
        record |= {"states": states} if states else {}
        record |= self.masks.record if self.masks else {}
        record |= {"lr": logs["learning_rate"], "grad_norm": float(logs["grad_norm"])}
        if not math.isfinite(loss) or not math.isfinite(record["grad_norm"]):
            raise TrainingError(
                f"step {self.state.global_step}: loss {loss}, gradient {record['grad_norm']}: "
                "lower lr (now "
                f"{self.args.learning_rate:g}), or precision=float32; nothing of this step was kept"
            )
        self.curve.append(record)

    # What outlives a kill
    def run_training(self) -> None:
        """Train, from the last step that was kept.

        Raises:
            TrainingError: a loss is no number.
        """
        if self._kept is None:
            self.train()
        else:
            self._go_on(self._kept.facts)
        if self.text.held_out and self.held_out[-1]["step"] != self.state.global_step:
            self.evaluate()

    def _go_on(self, facts: JSON) -> None:
        """Continue from a kept checkpoint."""
        self.args.eval_on_start = False
        self.curve = facts["curve"]
        self.held_out = facts["held_out"]
        self._before = int(self.curve[-1]["tokens"])
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / TRAINER_STATE).write_text(facts["trainer"], encoding="utf-8")
            self.train(resume_from_checkpoint=folder)

    def _save_checkpoint(self, model: nn.Module, trial: object = None) -> None:
        """Keep weights, optimizer, schedule and generators in the journal."""
        optimizer, groups = optimizer_state(_inner_optimizer(self.optimizer))
        drawn, generators = random_state()
        tensors = {
            **add_prefix("weights", weights_of(self._inner_learner)),
            **add_prefix("optimizer", optimizer),
            **add_prefix("random", drawn),
        }
        facts = {
            "fingerprint": self.fingerprint,
            "trainer": json.dumps(dataclasses.asdict(self.state)),
            "schedule": self._make_schedule.state_dict(),
            "curve": self.curve,
            "held_out": self.held_out,
            "masks": self.masks.facts() if self.masks else None,
            **groups,
            **generators,
        }
        if self.is_world_process_zero():
            self.journal.write(STATE, tensors, facts)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Put the kept weights and masks into the learner."""
        put_weights(self._inner_learner, with_prefix("weights", self._checkpoint_entry.tensors))
        if self.masks:
            self.masks.restore(self._checkpoint_entry.facts["masks"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Put back the kept optimizer and schedule."""
        if checkpoint is not None:
            tensors = with_prefix("optimizer", self._checkpoint_entry.tensors)
            put_optimizer_state(
                _inner_optimizer(self.optimizer), tensors, self._checkpoint_entry.facts
            )
            self._make_schedule.load_state_dict(self._checkpoint_entry.facts["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put back the kept generators."""
        if checkpoint is not None:
            put_random_state(
                with_prefix("random", self._checkpoint_entry.tensors), self._checkpoint_entry.facts
            )

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is no gradient scaler."""
        return None

    @property
    def _inner_learner(self) -> nn.Module:
        """What is trained, as accelerate left it."""
        assert self.model is not None
        return self.model

    @property
    def _make_schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate schedule."""
        assert self.lr_scheduler is not None
        return self.lr_scheduler

    @property
    def _checkpoint_entry(self) -> Entry:
        """The checkpoint of the run before."""
        assert self._kept is not None
        return self._kept


class _HeldOutText(torch.utils.data.Dataset[Item]):
    """The sequences held back, in order; numbered on from the last training sequence."""

    def __init__(self, text: TrainingText) -> None:
        self.samples = text.held_out
        self.first = len(text.train)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, at: int) -> Item:
        return {"window": self.first + at, "sample": self.samples[at]}


class ProgressTicks(TrainerCallback):
    """Moves a reporter on by one at each step.  ticks: an iterator of as many items as steps are
    left."""

    def __init__(self, ticks: Iterator[object]) -> None:
        self.ticks = ticks

    def on_step_end(self, *_: object, **__: object) -> None:
        """Move on by one step."""
        next(self.ticks, None)

    def on_train_end(self, *_: object, **__: object) -> None:
        """End the reporter's iteration."""
        next(self.ticks, None)


def training_arguments(
    options: TrainingPass,
    lr: float,
    pace: StepPlan,
    seed: int,
    folder: str,
    use_cpu: bool,
    measured: bool,
) -> TrainingArguments:
    """What Trainer is told.  Several processes share weights, gradients and moments by FSDP2.

    Args:
        options: of the pass.
        lr: highest learning rate.
        pace: steps of the run.
        seed: of the run.
        folder: for files of Trainer.
        use_cpu: train on the CPU.
        measured: whether text is held back.
    """
    if world_size() > 1:
        sharded: JSON = {"fsdp": True, "fsdp_config": {"version": 2}}
    else:
        sharded = {}
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=pace.micro,
        gradient_accumulation_steps=pace.accumulate,
        optim="adamw_torch_fused",
        learning_rate=lr,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": options.final_lr},
        warmup_steps=pace.warmup,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if measured else "no",
        eval_steps=pace.evaluate,
        eval_on_start=measured,
        save_strategy="steps",
        save_steps=pace.save,
        average_tokens_across_devices=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
        use_cpu=use_cpu,
        **sharded,
    )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # one process, one device: several are several processes, never DataParallel
    return arguments


def check_same(kept: dict[str, str], now: dict[str, str]) -> None:
    """Refuse to go on with what belongs to another run.

    Args:
        kept: fingerprint of the earlier run.
        now: fingerprint of this run.

    Raises:
        TrainingError: names what differs.
    """
    differ = []
    for name in now:
        if kept.get(name) != now[name]:
            differ.append(f"{name} (kept {kept.get(name)}, now {now.get(name)})")
    if differ:
        raise TrainingError(
            f"the steps kept from before belong to another run: {'; '.join(differ)} differ. Remove "
            "the folder to start "
            "afresh, or give back what was changed"
        )


def _inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    wrapped: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return wrapped
