"""The base of passes: requirements, execution, verification of the result, history."""

from __future__ import annotations

import importlib.util
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, final

from torch import nn

from secateur.graph import Program, Step, verify
from secateur.graph.errors import PipelineError
from secateur.passes.calibration.data import Sample
from secateur.passes.language.options import Options

T = TypeVar("T")
JSON = dict[str, Any]
log = logging.getLogger("secateur.passes")


class Progress(Protocol):
    """A reporter of long work: returns the items and reports each as it is taken."""

    def __call__(
        self, items: Iterable[T], description: str, total: int | None = None
    ) -> Iterable[T]: ...


def no_progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Return the items without a report.

    Args:
        items: to be worked on.
        description: not used.
        total: not used.

    Returns:
        the items.
    """
    return items


class Checkpoints(Protocol):
    """Storage of the results of a pipeline's passes, from which an interrupted run continues.

    Positions count from 1.
    """

    def restore(self, program: Program) -> tuple[int, Program]:
        """The number of finished passes, and the Program after them.

        Args:
            program: returned with 0 where no pass was finished.
        """

    def pass_folder(self, position: int, name: str) -> Path:
        """The folder of one pass, for its own files until it is finished.

        Args:
            position: of the pass in the pipeline.
            name: of the pass.
        """

    def store(self, position: int, name: str, program: Program) -> None:
        """Keep the result of one pass and drop the entry of the pass before it.

        Args:
            position: of the pass in the pipeline.
            name: of the pass.
            program: its result.
        """


@dataclass(frozen=True)
class Context:
    """What a pass may use besides the Program.

    data: calibration sequences, or None.
    progress: reporter of long work.
    seed: all randomness of a pass derives from it.
    output: a folder for by-products, or None.
    resume: a folder of this pass's own that outlives a kill, or None; what it wrote there in a run
        that was killed is there again when the same run is started again.
    raise_model: gives the stock model over a Program's own Parameter objects, for passes that
        train; see runtime.
    checkpoints: for a pipeline, where it keeps each finished pass, or None; its passes are given
        None.
    """

    data: tuple[Sample, ...] | None = None
    progress: Progress = no_progress
    seed: int = 0
    output: Path | None = None
    resume: Path | None = None
    raise_model: Callable[[Program], nn.Module] | None = None
    checkpoints: Checkpoints | None = None
    log: logging.Logger = log


@dataclass(frozen=True)
class PassResult:
    """What a pass did: the Program, whether graph or weights changed, and figures for the
    history."""

    program: Program
    modified: bool
    figures: JSON = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """Rough work of a pass, for estimates before it runs.

    flops: in units of one forward pass over the calibration data (forward and backward together are
        3).
    bytes_per_parameter: memory that it needs beside the weights.
    tokens: that it runs instead of the calibration tokens, where it has a number of its own.
    holds: whether all calibration tokens are held at one place of the graph, in how many models.
    solves: whether it sums products of inputs, in how many square matrices (float64) of the widest
        refitted input.
    files: copies of the weights that it writes to the folder of the run while it works: offloaded
        tensors and finished parts.
    holds_files: as ``holds``, in files.
    keeps: copies of the weights that the Program keeps beside them from then on.
    checkpoints: bytes a parameter of the checkpoint that it writes while the one before stands.
    """

    flops: float = 0.0
    bytes_per_parameter: float = 0.0
    tokens: int | None = None
    holds: int = 0
    solves: int = 0
    files: float = 0.0
    holds_files: int = 0
    keeps: float = 0.0
    checkpoints: float = 0.0


@dataclass(frozen=True)
class PlannedEdit:
    """What a pass would do to one group: keep ``kept`` of ``units``.

    exact: False where scores decide the count, and ``kept`` is what groups keep on average.
    asked: fraction that was to be removed, where one was given.
    """

    group: str
    family: str
    units: int
    kept: int
    exact: bool = True
    asked: float | None = None


@dataclass(frozen=True)
class Pass(Options):
    """A transformation of Programs; its dataclass fields are its options.

    numerics: exact (bit-equal), close (floating-point reorder) or lossy (needs a quality number).
    uses: facts about a Program that must hold before ("scores", "cut", "sparse"); gives: that hold
        after; ends: that it ends; bars: that must not hold, each with the reason and what to do
        instead.
    packages: that it imports beyond this package's own dependencies, each with how to install it.
    """

    numerics: ClassVar[Literal["exact", "close", "lossy"]]
    uses: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    ends: ClassVar[frozenset[str]] = frozenset()
    bars: ClassVar[Mapping[str, str]] = {}
    packages: ClassVar[Mapping[str, str]] = {}

    @property
    def needs_data(self) -> bool:
        """Whether calibration data must be given."""
        return False

    @property
    def least_sequences(self) -> int:
        """Calibration sequences that it needs at least."""
        return int(self.needs_data)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files and folders whose content the result depends on, besides the model and the
        calibration data."""
        return ()

    @property
    def cost(self) -> Cost:
        """Rough work, for estimates."""
        return Cost()

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run on this Program; none means it can.

        Args:
            program: to be transformed.
        """
        return self.explain_order(program_facts(program))

    def explain_order(self, known: Set[str]) -> list[str]:
        """Reasons why the pass cannot run where these facts hold.

        Args:
            known: facts about a Program, see ``program_facts``.
        """
        missing = [MISSING[fact] for fact in sorted(self.uses - known)]
        return missing + [self.bars[fact] for fact in sorted(self.bars.keys() & known)]

    def explain_packages(self) -> list[str]:
        """Reasons why the pass cannot run in this environment: packages that it imports are not
        installed."""
        reasons = []
        for package, how in self.packages.items():
            if importlib.util.find_spec(package) is None:
                reasons.append(f"{self.name} needs the package {package}: {how}")
        return reasons

    def plan(self, program: Program) -> list[PlannedEdit]:
        """The edits that the pass would make.  Needs no weights, scores or data.

        Args:
            program: on any device.
        """
        return []

    def preview(self, program: Program) -> Program:
        """A Program of the shapes that the pass would leave; its values mean nothing.  Works on the
        meta device."""
        return program

    def preview_uneven(self, program: Program) -> Program:
        """A Program of other shapes to which scores or measurements may as well lead: layers of
        different sizes, other layers; the one of ``preview`` where the options decide alone.

        Args:
            program: on any device.
        """
        return self.preview(program)

    @abstractmethod
    def call(self, program: Program, context: Context) -> PassResult:
        """Transform the Program; requirements hold.

        Args:
            program: to be transformed; it stays as it is.
            context: data, seed and folders.
        """

    @final
    def __call__(self, program: Program, context: Context | None = None) -> Program:
        """Run the pass: requirements, work, verification of the result, history.

        Raises:
            PipelineError: a requirement does not hold.
            VerificationError: the result is not a sound Program.
        """
        context = context or Context()
        reasons = [*self.requires(program), *self.explain_packages()]
        if self.needs_data and context.data is None:
            reasons.append("needs calibration data, and none was given")
        if reasons:
            raise PipelineError(f"{self.name} cannot run: {'; '.join(reasons)}")
        start = time.perf_counter()
        result = self.call(program, context)
        if result.modified:
            verify(result.program)
        return self.record(result, context.seed, time.perf_counter() - start)

    def record(self, result: PassResult, seed: int, seconds: float) -> Program:
        """The resulting Program with this pass in its history.

        Args:
            result: of ``call``.
            seed: of the run.
            seconds: that the pass took.
        """
        figures = {**result.figures, "seed": seed, "seconds": round(seconds, 3)}
        step = Step(self.name, self.to_json(), figures)
        return result.program.replace(history=(*result.program.history, step))


MISSING = {
    "scores": "the units have no scores: put score{metric=...} before it",
    "cut": "nothing was pruned since the model was opened: put prune-width{...} before it",
    "sparse": "no weight is sparse: put sparsify{...} before it",
}


def program_facts(program: Program) -> frozenset[str]:
    """The facts that hold for a Program.

    Args:
        program: to be looked at.

    Returns:
        some of scores, cut and sparse.
    """
    tests: dict[str, Callable[[Program], bool]] = {
        "scores": lambda p: bool(p.scores),
        "cut": lambda p: p.cut is not None,
        "sparse": lambda p: bool(p.sparse),
    }
    return frozenset(name for name, holds in tests.items() if holds(program))
