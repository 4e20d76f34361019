"""Teachers: a model that runs along, or top-k rows that it stored before."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.passes.base import Progress
from secateur.passes.calibration.data import Sample
from secateur.passes.opening import open_model_folder
from secateur.passes.storage.journal import JSON, Journal
from secateur.passes.training.learner import Batch, TeacherTargets
from secateur.passes.training.network import Network
from secateur.passes.training.rows import TopRows, top_rows
from secateur.passes.training.text import Item, collate_batch


class Teacher(Protocol):
    """A source of targets for batches; ``move_to`` is called once with the student's device."""

    def __call__(self, batch: Batch) -> TeacherTargets: ...

    def move_to(self, device: torch.device) -> None:
        """Follow the student to its device."""
        ...


class NoTeacher:
    """For losses that need none."""

    def __call__(self, batch: Batch) -> TeacherTargets:
        return TeacherTargets(None)

    def move_to(self, device: torch.device) -> None:
        """Nothing to move."""
        return None


class LiveTeacher:
    """A network that runs along, without gradients.

    network: on any device, in any dtype.
    states: whether hidden states are asked for.
    top_k: only the k likeliest tokens count; 0 for all.
    stays: whether it keeps its device.
    """

    def __init__(
        self,
        network: Network,
        *,
        states: bool = False,
        top_k: int = 0,
        temperature: float = 1.0,
        stays: bool = False,
    ) -> None:
        self.network = network.eval()
        self.states = states
        self.top_k = top_k
        self.temperature = temperature
        self.stays = stays

    def move_to(self, device: torch.device) -> None:
        """Move the network, unless it keeps its device."""
        if not self.stays:
            self.network.to(device)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherTargets:
        device = next(self.network.parameters()).device
        inputs = {}
        for k, v in batch["inputs"].items():
            if isinstance(v, Tensor):
                inputs[k] = v.to(device)
            else:
                inputs[k] = v
        output = self.network(inputs, self.states)
        if self.top_k:
            rows = top_rows(output.rows, self.top_k, self.temperature)
        else:
            rows = output.rows
        return TeacherTargets(rows, output.states)


class StoredTeacher:
    """Top-k rows by window, from a journal."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def move_to(self, device: torch.device) -> None:
        """Nothing to move: rows are read on the CPU."""
        return None

    def __call__(self, batch: Batch) -> TeacherTargets:
        answers = []
        for window in batch["window"]:
            answers.append(self._read_rows(int(window)))
        longest = max(len(rows.indices_Tk) for rows in answers)
        parts = [_pad_rows(rows, longest) for rows in answers]
        return TeacherTargets(
            TopRows(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
        )

    def _read_rows(self, window: int) -> TopRows:
        """The stored rows of one window."""
        entry = self.journal.read(_entry_name(window))
        assert entry is not None, (
            f"window {window} was stored and is gone from {self.journal.folder}"
        )
        return TopRows(entry.tensors["indices"], entry.tensors["log_probs"])


def store_answers(
    teacher: LiveTeacher,
    samples: Sequence[Sample],
    folder: Path,
    about: JSON,
    progress: Progress,
) -> StoredTeacher:
    """Store the teacher's top-k rows of each sequence; sequences stored before are skipped.

    Args:
        teacher: with top_k.
        samples: sequences.
        folder: one file a sequence, and ``about``.
        about: what the rows depend on; where the folder holds rows of something else, they are
            replaced.
        progress: reporter.

    Returns:
        a teacher that reads the folder.
    """
    journal = Journal(folder)
    known = journal.read("about")
    if known is None or known.facts != about:
        for name in journal.names():
            journal.remove(name)
        journal.write("about", facts=about)
    device = next(teacher.network.parameters()).device
    done = set(journal.names())
    todo = []
    for window in range(len(samples)):
        if _entry_name(window) not in done:
            todo.append(window)
    for window in progress(todo, "teacher", len(todo)):
        batch = collate_batch([{"window": window, "sample": samples[window]}])
        rows = teacher({**batch, "inputs": _move_inputs(batch["inputs"], device)}).rows
        assert isinstance(rows, TopRows)
        journal.write(
            _entry_name(window), {"indices": rows.indices_Tk, "log_probs": rows.log_probs_Tk}
        )
    return StoredTeacher(journal)


def open_teacher(folder: str | Path) -> Any:
    """The stock model of a folder, in eval mode and its stored dtype, with every check of the
    student's opening.

    Args:
        folder: with config.json and safetensors; no code of it is run.

    Raises:
        PipelineError: it is no model folder, or it is not sound.
    """
    return open_model_folder(folder, "teacher")


def place_model(
    model: nn.Module, dtype: torch.dtype | None, device: torch.device | None
) -> nn.Module:
    """The model in another dtype or on another device, as a copy; itself where neither is asked
    for.

    Args:
        model: stock model.
        dtype: None: as it is.
        device: None: as it is.
    """
    if dtype is None and device is None:
        return model
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def _entry_name(window: int) -> str:
    """The name of a window's journal entry."""
    return f"rows-{window:08d}"


def _move_inputs(inputs: Item, device: torch.device) -> Item:
    """Inputs with their tensors on a device."""
    result: Item = {}
    for name, v in inputs.items():
        result[name] = v.to(device) if isinstance(v, Tensor) else v
    return result


def _pad_rows(rows: TopRows, length: int) -> tuple[Tensor, Tensor]:
    """Rows up to a length; what is added is never counted."""
    pad = (0, 0, 0, length - len(rows.indices_Tk))
    return torch.nn.functional.pad(rows.indices_Tk, pad), torch.nn.functional.pad(
        rows.log_probs_Tk, pad
    )
