"""Distillation: training of the pruned model on the dense one's predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from secateur.graph import Program
from secateur.graph.errors import PipelineError
from secateur.passes.base import MISSING, Context, PassResult
from secateur.passes.training.chunked import Weights
from secateur.passes.training.masks.schedule import MaskSchedule
from secateur.passes.training.network import Network
from secateur.passes.training.plan import TrainingPass, autocast_dtype
from secateur.passes.training.run import (
    TrainingGoal,
    TrainingResult,
    copy_program,
    module_of,
    run_fingerprint,
    train_module,
    write_curve,
)
from secateur.passes.training.teachers import (
    LiveTeacher,
    NoTeacher,
    StoredTeacher,
    Teacher,
    open_teacher,
    place_model,
    store_answers,
)
from secateur.passes.training.text import TrainingText

Share = Annotated[float, Field(ge=0)]
JSON = dict[str, Any]
DTYPES = {
    "same": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, eq=False)
class PreparedModel:
    """finish: makes the trained model plain again; gives the trained Program and more figures.
    masks: see train."""

    finish: Callable[[], tuple[Program, JSON]]
    masks: MaskSchedule | None = None


@dataclass(frozen=True)
class Distill(TrainingPass):
    """Knowledge distillation: forward KL to the dense model's next-token distributions.  Numerics:
    lossy.

    Trains the stock model over the Program's own weights (the graph itself where no stock class
    holds the shape) by AdamW with a warm-up and a cosine.  With ``torchrun`` the processes share
    the student by FSDP2.

    kl, ce: weights of the KL to the teacher and of the cross entropy of the text.
    temperature: of both distributions; the KL counts temperature^2 times.
    top_k: only the teacher's k likeliest tokens count one by one, all others as one; 0 for all.
    store: with top_k: a folder where the teacher's word on each sequence is written down once,
        before training.
    states: pairs [teacher, student] of hidden states to bring together by cosine, weighted as much
        as the KL; 0 is the embeddings, -1 the last.  Published: of use only where many layers were
        removed, then [[0,0],[-3,-3]].
    teacher: a model folder; without it the dense model that was pruned.  Where kl is 0 it is only
        measured by.
    teacher_dtype, teacher_device: of the teacher, as a copy of its own; a device as torch names it.
    correct_tokens: first fine-tune the teacher on so many tokens of the text (cross entropy, a
        fifth of lr), for text that is not like what it was trained on; 0 for not.

    Source:
        Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 3 and tables 15-18; teacher
        correction: Sreenivas et al. 2024, arXiv:2408.11796, section 3; the remainder outcome of
        top_k is ours.
    """

    name: ClassVar[str] = "distill"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})
    bars: ClassVar[Mapping[str, str]] = {
        "sparse": "weights are sparse, and training would fill their zeros: use retrain-sparse, or "
        "distill first"
    }

    kl: Share = 1.0
    ce: Share = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    store: str | None = None
    states: tuple[tuple[int, int], ...] = ()
    teacher: str | None = None
    teacher_dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    teacher_device: str | None = None
    correct_tokens: Annotated[int, Field(ge=0)] = 0

    @property
    def files(self) -> tuple[Path, ...]:
        """The training text and the teacher's folder, where they are named."""
        teacher = () if self.teacher is None else (Path(self.teacher).expanduser(),)
        return (*super().files, *teacher)

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run: no teacher, or options that contradict each other.

        Args:
            program: pruned, or with a teacher folder.
        """
        checks = {
            f"{MISSING['cut']}, or name a teacher folder": bool(self.kl)
            and program.cut is None
            and not self.teacher,
            "kl=0 and ce=0 leave nothing to learn: give one of them": self.kl == 0 and self.ce == 0,
            "states are compared beside the KL: give kl": bool(self.states) and self.kl == 0,
            "store keeps top_k rows: give top_k (512 or more)": self.store is not None
            and not self.top_k,
            "store keeps no hidden states: leave states or store": self.store is not None
            and bool(self.states),
        }
        return super().requires(program) + [reason for reason, holds in checks.items() if holds]

    def call(self, program: Program, context: Context) -> PassResult:
        """Train the pruned model on the teacher's predictions.

        Args:
            program: pruned, or with a teacher folder.
            context: with text, seed and the maker of stock models.

        Raises:
            TrainingError: a loss is not finite, or the resume folder belongs to another run.
            PipelineError: an option does not fit the model, or a package is missing.
        """
        text = self.load_text(program, context)
        teacher, widths, correction = self._make_teacher(program, text, context)
        student = copy_program(program).replace(scores={})
        model, stays = self._student_module(student, context)
        goal = TrainingGoal(
            self._loss_weights,
            self.tokens,
            self.lr,
            "student",
            self.states,
            self._hidden_widths(model, widths),
        )
        ready = self._prepare_model(model, student, stays, text, context)
        trained = train_module(model, teacher, text, goal, self, context, stays, ready.masks)
        student, finished = ready.finish()
        _check_student(student, context, stays)
        write_curve(trained, context.output, self.name)
        figures = {
            **trained.metrics(),
            **finished,
            "trained": "graph" if stays else "stock class",
            "text": {
                "sequences": len(text.train),
                "held_out": len(text.held_out),
                "window": text.window,
            },
        }
        if correction is not None:
            figures["teacher_correction"] = correction.metrics()
        return PassResult(student, True, figures)

    def _student_module(self, student: Program, context: Context) -> tuple[nn.Module, bool]:
        """What is trained in the student's place; see ``module_of``."""
        return module_of(student, context)

    def _prepare_model(
        self, model: nn.Module, student: Program, stays: bool, text: TrainingText, context: Context
    ) -> PreparedModel:
        """Make the model, over the student's Parameters, ready to be trained."""
        return PreparedModel(lambda: (student, {}))

    @property
    def _loss_weights(self) -> Weights:
        """Weights of the two losses."""
        return Weights(self.kl, self.ce, self.temperature)

    # The teacher
    def _make_teacher(
        self, program: Program, text: TrainingText, context: Context
    ) -> tuple[Teacher, int | None, TrainingResult | None]:
        """The teacher, the width of its hidden states, and what its correction did."""
        if program.cut is None and self.teacher is None:
            return NoTeacher(), None, None
        model, stays = self._teacher_model(program, context)
        trained = None
        if self.correct_tokens:
            goal = TrainingGoal(Weights(0.0, 1.0), self.correct_tokens, self.lr / 5, "teacher")
            trained = train_module(model, NoTeacher(), text, goal, self, context, stays)
        device = None
        if self.teacher_device:
            device = torch.device(self.teacher_device)
        if stays and (device or DTYPES[self.teacher_dtype]):
            raise PipelineError(
                "distill: no stock class holds the teacher, so its dtype and device cannot "
                "be changed"
            )
        model = place_model(model, DTYPES[self.teacher_dtype], device)
        first = next(model.parameters())
        inputs = {}
        for k, v in text.train[0].inputs.items():
            if hasattr(v, "to"):
                inputs[k] = v.to(first.device)
            else:
                inputs[k] = v
        live = LiveTeacher(
            Network(
                model, inputs, autocast_dtype(self.precision, {p.dtype for p in model.parameters()})
            ),
            states=bool(self.states),
            top_k=self.top_k,
            temperature=self.temperature,
            stays=device is not None or stays,
        )
        return self._store_answers(live, text, context), _hidden_width(model), trained

    def _teacher_model(self, program: Program, context: Context) -> tuple[nn.Module, bool]:
        """The teacher's module, and whether it is a graph module."""
        if self.teacher is None:
            assert program.cut is not None
            dense = program.cut.dense
            return module_of(copy_program(dense) if self.correct_tokens else dense, context)
        return open_teacher(self.teacher), False

    def _store_answers(
        self, live: LiveTeacher, text: TrainingText, context: Context
    ) -> LiveTeacher | StoredTeacher:
        """The live teacher, or one that reads stored rows."""
        if self.store is None:
            return live
        about = run_fingerprint(
            live.network,
            text,
            TrainingGoal(self._loss_weights, 0, 0.0, "teacher"),
            self,
            context.seed,
        )
        answers = {}
        for key in ("weights", "text", "versions"):
            answers[key] = about[key]
        answers |= {
            "top_k": str(self.top_k),
            "temperature": str(self.temperature),
            "dtype": self.teacher_dtype,
        }
        folder = Path(self.store).expanduser()
        return store_answers(live, (*text.train, *text.held_out), folder, answers, context.progress)

    def _hidden_widths(self, model: nn.Module, teacher: int | None) -> tuple[int, int] | None:
        """(Student, teacher) width of the hidden states, where they are compared."""
        mine = _hidden_width(model)
        if self.states and mine is not None and teacher is not None:
            return (mine, teacher)
        return None


def _hidden_width(model: nn.Module) -> int | None:
    """Width of the hidden states, where the configuration says it."""
    config = getattr(model, "config", None)
    width = None
    if config is not None:
        width = getattr(config.get_text_config(), "hidden_size", None)
    if isinstance(width, int):
        return width
    return None


def _check_student(student: Program, context: Context, stays: bool) -> None:
    """Raising compares the outputs of the trained Program with those of the stock class over its
    weights."""
    if not stays and context.raise_model is not None:
        context.raise_model(student)
