"""One training run: preparation of a module, training, and restoration of all but its weights."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.graph import Program, SecateurError, with_parameters
from secateur.graph.errors import PipelineError
from secateur.passes.base import JSON, Context
from secateur.passes.storage.journal import Journal, hash_tensor
from secateur.passes.training.chunked import Weights
from secateur.passes.training.learner import Learner, Pair
from secateur.passes.training.masks.schedule import RECORDS, MaskSchedule
from secateur.passes.training.memory import full_tensor, gather_sharded_params, isolate_randomness
from secateur.passes.training.network import Network
from secateur.passes.training.plan import LOW, StepPlan, TrainingPass, autocast_dtype, plan_steps
from secateur.passes.training.teachers import Teacher
from secateur.passes.training.text import TrainingText

POINTS = 64  # of a curve that goes into the history; all points go to the output folder
FREE = (
    "save_every",
    "data",
    "store",
)  # options that may change in a run that goes on; the text itself is compared
PROBE = 16  # tokens of the sequence that a network is tried with
CHECKPOINTING = (
    "activation_checkpointing",
    "gradient_checkpointing",
)  # as transformers calls it now, and before


@dataclass(frozen=True)
class TrainingGoal:
    """What a run trains towards.

    weights: of KL and cross entropy.
    pairs, widths: see Learner.
    tokens, lr: of this run.
    part: its name, which is that of its folder under ``context.resume``, too.
    """

    weights: Weights
    tokens: int
    lr: float
    part: str
    pairs: tuple[Pair, ...] = ()
    widths: Pair | None = None


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.
    curve, held_out: see DistillationTrainer.
    seconds: of this call; a run that went on counts from there.
    """

    pace: StepPlan
    curve: list[dict[str, float]]
    held_out: list[dict[str, float]]
    chunked: bool
    sharded: bool
    tokens: int
    tokens_here: int
    seconds: float

    def metrics(self) -> JSON:
        """For the history: the curve thinned out to a few points."""
        every = max(1, -(-len(self.curve) // POINTS))
        return {
            "tokens": self.tokens,
            "steps": self.pace.steps,
            "sequences_a_step": self.pace.sequences,
            "processes": self.pace.world,
            "sharded": self.sharded,
            "tokens_per_s": round(self.tokens_here / self.seconds, 1) if self.seconds else None,
            "loss_from": "hidden states, in chunks" if self.chunked else "logits, in chunks",
            "curve": thin_curve(self.curve, every),
            "held_out": self.held_out,
        }


def thin_curve(curve: Sequence[Mapping[str, float]], every: int) -> list[dict[str, float]]:
    """Means over ``every`` steps each; step, tokens, rate and what is said of masks are those of
    the last.

    Args:
        curve: one record a step.
        every: steps of one point.

    Returns:
        points in order.
    """
    parts = []
    for start in range(0, len(curve), every):
        parts.append(curve[start : start + every])
    last = ("step", "tokens", "lr", *RECORDS)
    points: list[dict[str, float]] = []
    for part in parts:
        points.append(
            {
                key: part[-1][key] if key in last else sum(row[key] for row in part) / len(part)
                for key in part[-1]
            }
        )
    return points


def train_module(
    model: nn.Module,
    teacher: Teacher,
    text: TrainingText,
    goal: TrainingGoal,
    options: TrainingPass,
    context: Context,
    stays: bool,
    masks: MaskSchedule | None = None,
) -> TrainingResult:
    """Train a module's weights in place.

    Args:
        model: a stock model, or a graph module.
        teacher: gives the targets of every batch.
        text: sequences to train on and to measure by.
        goal: weights of the losses, tokens and learning rate.
        options: of the pass.
        context: with seed, progress and resume folder.
        stays: the module cannot leave its device.
        masks: of weights that are under masks in the module, or None.

    Raises:
        TrainingError: a loss is no number, or ``context.resume`` holds steps of another run.
        PipelineError: an option does not fit the module; a package is missing.
    """
    trainer = _trainer_module()
    steps = plan_steps(options, text.window, goal.tokens)
    journal = Journal(None if context.resume is None else context.resume / goal.part)
    if journal.folder is None:
        known = {}
    else:
        known = run_fingerprint(model, text, goal, options, context.seed)
    if known and masks is not None:
        known["masks"] = masks.fingerprint()
    with (
        _prepare_module(model, options) as low,
        tempfile.TemporaryDirectory() as folder,
        isolate_randomness(),
    ):
        torch.manual_seed(context.seed)
        precision = (
            torch.bfloat16
            if low and options.precision == "auto"
            else autocast_dtype(options.precision, set())
        )
        network = Network(model, make_probe(text, model), precision)
        try:
            learner = Learner(network, goal.weights, goal.pairs, goal.widths)
            before = dict(learner.named_parameters())
            device = next(model.parameters()).device
            use_cpu = not torch.accelerator.is_available() or (stays and device.type == "cpu")
            tutor = trainer.DistillationTrainer(
                learner,
                teacher,
                text,
                steps,
                options,
                goal.lr,
                journal,
                known,
                context.seed,
                folder,
                use_cpu,
                masks,
            )
            remaining = steps.steps - tutor.first_step
            ticks = iter(context.progress(range(remaining + 1), goal.part, remaining))
            tutor.add_callback(trainer.ProgressTicks(ticks))
            start = time.perf_counter()
            tutor.run_training()
            seconds = time.perf_counter() - start
            _gather_weights(tutor.model, before)
        finally:
            network.restore()
    return TrainingResult(
        pace=steps,
        curve=tutor.curve,
        held_out=tutor.held_out,
        chunked=network.head is not None,
        sharded=any(hasattr(module, "reshard") for module in tutor.model.modules()),
        tokens=tutor.tokens_seen,
        tokens_here=tutor.tokens_seen_now,
        seconds=seconds,
    )


def copy_program(program: Program) -> Program:
    """The same Program over Parameters of its own, so that training it changes no other.

    Args:
        program: to be copied.
    """
    return with_parameters(
        program, {name: p.detach().clone() for name, p in program.named_parameters()}
    )


def module_of(program: Program, context: Context) -> tuple[nn.Module, bool]:
    """What is trained in a Program's place, over its Parameters: its stock model, or else (True)
    its graph module.

    Args:
        program: to be trained.
        context: may give a stock model.

    Returns:
        (module, whether it is the graph module).
    """
    if context.raise_model is None:
        return program.gm, True
    try:
        return context.raise_model(program), False
    except SecateurError as misfit:
        context.log.warning(
            "no stock class holds this shape, so its graph is trained itself: %s", misfit
        )
        return program.gm, True


def run_fingerprint(
    model: nn.Module, text: TrainingText, goal: TrainingGoal, options: TrainingPass, seed: int
) -> dict[str, str]:
    """What a run depends on, for runs that go on.

    Args:
        model: with its weights at the start.
        text: to train on.
        goal: of the run.
        options: of the pass.
        seed: of the run.

    Returns:
        texts by key.
    """
    every = hashlib.sha256()
    for name, parameter in model.named_parameters():
        every.update(f"{name} {hash_tensor(full_tensor(parameter))} ".encode())
    chosen = {}
    for name, value in options.to_json().items():
        if name not in FREE:
            chosen[f"option {name}"] = json.dumps(value)
    return {
        **chosen,
        "part": repr(goal),
        "weights": every.hexdigest(),
        "text": text.sha256(),
        "seed": str(seed),
        "versions": " ".join(
            f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "accelerate")
        ),
    }


@contextmanager
def _prepare_module(model: nn.Module, options: TrainingPass) -> Iterator[bool]:
    """The module with float32 weights, and checkpointing and compilation as asked for; all undone
    at the end.

    Yields:
        whether weights were of low precision.
    """
    was = {}
    for parameter in model.parameters():
        was[parameter] = (parameter.dtype, parameter.device)
    wide = set()
    for parameter, (dtype, _) in was.items():
        if dtype in LOW:
            wide.add(parameter)
    for parameter in wide:
        parameter.data = parameter.data.float()
    if options.checkpointing:
        _set_checkpointing(model, True)
    if options.compile != "off":
        model.compile(backend=options.compile)
    try:
        yield bool(wide)
    finally:
        model._compiled_call_impl = None
        if options.checkpointing:
            _set_checkpointing(model, False)
        devices = {device for _, device in was.values()}
        if len(devices) == 1:
            model.to(devices.pop())
        for parameter, (dtype, _) in was.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        if not isinstance(model, fx.GraphModule):
            model.eval()


def _set_checkpointing(model: nn.Module, on: bool) -> None:
    """Switch recomputation of activations."""
    name = next((name for name in CHECKPOINTING if hasattr(model, f"{name}_enable")), None)
    if name is None:
        raise PipelineError(
            f"checkpointing=true: {type(model).__name__} is no stock model that can; leave it off"
        )
    if on:
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{name}_disable")()


def _gather_weights(learner: nn.Module, before: Mapping[str, nn.Parameter]) -> None:
    """Weights that were spread over processes, back into the Parameters that they came from."""
    gather_sharded_params(learner)
    after = dict(learner.named_parameters())
    with torch.no_grad():
        for name, parameter in before.items():
            if after[name] is not parameter:
                parameter.copy_(full_tensor(after[name].detach()))


def make_probe(text: TrainingText, model: nn.Module) -> JSON:
    """The beginning of the first sequence, where the model is.

    Args:
        text: at least one sequence.
        model: for its device.

    Returns:
        inputs by name.
    """
    device = next(model.parameters()).device

    def shorten(value: Any) -> Any:
        whole_numbers = (
            isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
        )
        if isinstance(value, Tensor):
            return (value[:, :PROBE] if whole_numbers else value).to(device)
        return value

    return {name: shorten(value) for name, value in text.train[0].inputs.items()}


def _trainer_module() -> Any:
    """The module with the trainer.

    Raises:
        PipelineError: accelerate is not installed.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise PipelineError(
            "training needs the package accelerate: pip install 'secateur[train]'"
        ) from error
    from secateur.passes.training import trainer

    return trainer


def write_curve(trained: TrainingResult, folder: Path | None, name: str) -> None:
    """All points, as JSON, into the folder for by-products, where there is one.

    Args:
        trained: result of a run.
        folder: None: nothing is written.
        name: of the file, without suffix.
    """
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.json.part"
    part.write_text(
        json.dumps({"curve": trained.curve, "held_out": trained.held_out}, indent=1),
        encoding="utf-8",
    )
    part.replace(folder / f"{name}.json")
