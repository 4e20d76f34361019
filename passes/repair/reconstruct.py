"""Reconstruction: each sub-block of a pruned model is fitted to the dense one's outputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.graph import Cut, Program, capture, with_parameters
from secateur.graph.errors import PipelineError
from secateur.passes.base import MISSING, Context, Cost, Pass, PassResult
from secateur.passes.calibration.data import CalibrationError
from secateur.passes.calibration.lockstep import offload_tensor
from secateur.passes.lowering.layers import Layer, on_meta
from secateur.passes.repair.reconstruct_fit import fit_layers, stream_error, train_part
from secateur.passes.repair.reconstruct_part import FittedPart, Task
from secateur.passes.repair.reconstruct_run import Target, Walk
from secateur.passes.storage.journal import Entry, Journal
from secateur.passes.training.teachers import open_teacher


@dataclass(frozen=True)
class Reconstruct(Pass):
    """Fit the surviving weights of each sub-block to the dense model's stream.  Numerics: lossy.

    Attention and MLP are taken one after the other, on the inputs that the sub-blocks before them,
    already rebuilt, produce.  First every layer is fitted by least squares over the entries that
    its mask leaves, then all of the sub-block together by Adam.  The masks stay; where no weight is
    sparse, all entries of the matrices may change.  One calibration sequence in five is held back:
    a sub-block whose error there does not fall stays as it is.  Errors are those of the stream
    after the sub-block, relative to the stream, token by token.

    target: stream (the dense model's stream: earlier errors are corrected too), own (what the dense
        sub-block adds to its own stream, added to the stream as it is now) or dense (as own, on the
        dense model's inputs).
    solver: lsq, adam, or both, one after the other.
    epochs, lr: of Adam; the learning rate is relative to the root mean square of each weight.
    vectors: let biases and the scales of norms change, too.
    autocast: run the training in bfloat16 where PyTorch deems it safe.
    teacher: folder of the dense model, for a model that was pruned in an earlier run; without it,
        the model that this run pruned.  Widths and depth must be those of the dense model.
    offload: hold activations and new weights in memory-mapped files; see ``repair``.

    Source:
        Frantar & Alistarh 2022 (OBC), arXiv:2208.11580 for the layer-wise form; Li et al. 2021
        (BRECQ), arXiv:2102.05426, section 3 for blocks; the aim at the stream is that of
        ``repair``.
    """

    name: ClassVar[str] = "reconstruct"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})

    target: Target = "stream"
    solver: Literal["lsq", "adam", "both"] = "both"
    epochs: Annotated[int, Field(ge=1)] = 4
    lr: Annotated[float, Field(gt=0)] = 0.01
    vectors: bool = True
    autocast: bool = False
    teacher: str | None = None
    offload: bool = False

    @property
    def needs_data(self) -> bool:
        """Always: sub-blocks are fitted on calibration sequences."""
        return True

    @property
    def files(self) -> tuple[Path, ...]:
        """The teacher's folder, where one is named."""
        if self.teacher is None:
            return ()
        return (Path(self.teacher).expanduser(),)

    @property
    def least_sequences(self) -> int:
        """Some are held back to check."""
        return 2

    @property
    def cost(self) -> Cost:
        """Forward passes of both models and the steps of Adam."""
        if self.solver == "lsq":
            adam = 0.0
        else:
            adam = 1.5 * self.epochs
        if self.offload:
            return Cost(4.0 + adam, 8.0, files=2.0, holds_files=3)
        return Cost(4.0 + adam, 8.0, holds=3, files=1.0)

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run: no dense model, no weights, or a target without
        meaning.

        Args:
            program: pruned.
        """
        reasons = super().requires(program)
        if program.cut is None and self.teacher is None:
            reasons.append(f"{MISSING['cut']}, or name a teacher folder")
        if on_meta(program):
            reasons.append("the weights are on the meta device: open the model with weights")
        pruned = program.cut is not None and bool(program.cut.kept or program.cut.dropped)
        if self.target == "dense" and pruned:
            reasons.append(
                "units or blocks were pruned, so that no sub-block can take the dense model's "
                "values: target=stream or own can"
            )
        return reasons

    def call(self, program: Program, context: Context) -> PassResult:
        """Fit each sub-block in turn.

        Args:
            program: pruned.
            context: with calibration data.

        Raises:
            CalibrationError: fewer than two calibration sequences.
            PipelineError: the teacher's weights have other shapes.
        """
        data = context.data or ()
        if len(data) < 2:
            raise CalibrationError(
                "reconstruct needs two calibration sequences or more: one is held back to check it"
            )
        journal = Journal(context.resume)
        if self.teacher is not None:
            program = program.replace(cut=Cut(_open_dense(program, self.teacher), {}))
        with ExitStack() as stack:
            folder = None
            if self.offload:
                folder = Path(stack.enter_context(TemporaryDirectory(dir=journal.ensure_folder)))
            walk = Walk(program, data, self.vectors, folder)
            for name, reason in walk.refused.items():
                context.log.info("reconstruct leaves %s alone: %s", name, reason)
            values = dict[str, Tensor]()
            figures = dict[str, Any]()
            for part in context.progress(walk.parts, "reconstruct", len(walk.parts)):
                fitted, task = walk.reach_part(part, self.target)
                entry = journal.read(part.name)
                if entry is None:
                    entry = self._fit_part(fitted, task, walk.free_layers(part), context)
                    journal.write(part.name, entry.tensors, entry.facts)
                for name, value in entry.tensors.items():
                    fitted.masters[name] = value.to(fitted.masters[name])
                walk.finish_part(part, fitted)
                if entry.tensors:
                    for name, value in fitted.parameter_values().items():
                        values[name] = offload_tensor(value, folder)
                figures[part.name] = entry.facts
        if values:
            rebuilt = with_parameters(program, values).replace(scores={})
        else:
            rebuilt = program
        summary = {
            "tokens": sum(s.tokens for s in data),
            "sequences": len(data),
            "left_alone": walk.refused,
        }
        return PassResult(rebuilt, bool(values), {**summary, "parts": figures})

    def _fit_part(
        self, fitted: FittedPart, task: Task, layers: Sequence[Layer], context: Context
    ) -> Entry:
        """What changes in a part, and by how much its error falls; nothing where it does not."""
        back = sorted(task.back)
        before = {}
        for name, master in fitted.masters.items():
            before[name] = master.clone()
        errors = [stream_error(fitted, task, back)]
        if self.solver != "adam":
            fit_layers(fitted, task, layers)
            errors.append(stream_error(fitted, task, back))
            if not errors[-1] < errors[0]:
                fitted.masters = dict(before)
                errors[-1] = errors[0]
        if self.solver != "lsq":
            train_part(
                fitted,
                task,
                self.epochs,
                self.lr,
                context.seed,
                partial(_autocast_context, task, self.autocast),
            )
            errors.append(stream_error(fitted, task, back))
        root_errors = [round(math.sqrt(error), 6) for error in errors]
        better = min(errors[1:]) < errors[0]
        return Entry(fitted.parameter_values() if better else {}, {"error": root_errors})


def _open_dense(program: Program, teacher: str) -> Program:
    """The model of a folder, which must have the shapes of a Program.

    Raises:
        PipelineError: it has others.
    """
    dense = capture(open_teacher(teacher))
    mine = {name: tuple(p.shape) for name, p in program.named_parameters()}
    theirs = {name: tuple(p.shape) for name, p in dense.named_parameters()}
    odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if odd:
        shapes = " and ".join(
            str(list(shapes_of[odd[0]])) if odd[0] in shapes_of else "missing"
            for shapes_of in (mine, theirs)
        )
        raise PipelineError(
            f"reconstruct: {len(odd)} weights of teacher={teacher} have other shapes ({odd[0]}: "
            f"{shapes}), and which "
            "units went is no longer known: reconstruct in the run that prunes"
        )
    return dense


def _autocast_context(task: Task, wanted: bool) -> contextlib.AbstractContextManager[object]:
    """The context of a forward pass: bfloat16 autocast, or nothing."""
    if not wanted:
        return contextlib.nullcontext()
    return torch.autocast(task.wanted[0].device.type, torch.bfloat16)
