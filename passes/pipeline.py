"""Pipelines: passes in a row, written as text or as a recipe file (YAML); itself a pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, InstanceOf
from torch import nn

from secateur.graph import Program
from secateur.graph.errors import PipelineError
from secateur.passes import recipes
from secateur.passes.base import (
    Checkpoints,
    Context,
    Cost,
    Pass,
    PassResult,
    PlannedEdit,
    Progress,
    log,
    no_progress,
    program_facts,
)
from secateur.passes.calibration.data import Batch, samples
from secateur.passes.language.grammar import format_specs, locate_message, parse_specs
from secateur.passes.language.options import OptionError, did_you_mean, spec_to_json
from secateur.passes.language.recipe import DataSpec, dump_recipe, load_recipe
from secateur.passes.registry import PASSES

AnyPass = Annotated[InstanceOf[Pass], BeforeValidator(PASSES.build)]


@dataclass(frozen=True)
class Hooks:
    """What a person may ask of a run.

    print_after: names of passes after which the graph goes to ``write``.
    time_passes: write the seconds of each pass.
    stop_after: name of the pass after which the run ends.
    """

    print_after: frozenset[str] = frozenset()
    time_passes: bool = False
    stop_after: str | None = None
    write: Callable[[str], None] = log.info


@dataclass(frozen=True)
class Pipeline(Pass):
    """Passes in a row, checked as a whole before the first runs.

    passes: what runs, in order.
    data: where a recipe wants its calibration data read from; used by the command line.
    seed: what all randomness derives from, unless the caller gives another.
    """

    name: ClassVar[str] = "pipeline"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"

    passes: tuple[AnyPass, ...] = ()
    data: InstanceOf[DataSpec] | None = None
    seed: int = 0
    hooks: InstanceOf[Hooks] = field(default=Hooks(), compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """A pipeline from its text, for example ``score{metric=taylor},prune-width{mlp=0.25}``.

        Args:
            text: see ``language.grammar``.

        Raises:
            PipelineError: does not parse, unknown pass or option, wrong type, out of range; with
                the position.
        """
        try:
            return cls(passes=tuple(PASSES.build(spec) for spec in parse_specs(text)))
        except OptionError as error:
            raise PipelineError(locate_message(str(error), text, error.at)) from None

    @classmethod
    def from_recipe(cls, recipe: str | Path) -> Pipeline:
        """A pipeline from a recipe: the name of one of this package's, a YAML file's path, or the
        YAML text itself.

        Raises:
            PipelineError: no such recipe or file, not YAML, unknown keys, or what ``parse`` raises.
        """
        if isinstance(recipe, str) and recipe in recipes.recipe_names():
            recipe = recipes.recipe_text(recipe)
        read = load_recipe(recipe)
        passes = []
        for place, entry in enumerate(read.passes):
            try:
                passes.append(PASSES.build(entry))
            except OptionError as error:
                raise PipelineError(f"recipe, passes[{place}]: {error}") from None
        return cls(passes=tuple(passes), data=read.data, seed=read.seed)

    def to_text(self) -> str:
        """The text that parses to the same passes."""
        return format_specs(p.to_spec() for p in self.passes)

    def to_recipe(self) -> str:
        """The YAML that reads to the same pipeline."""
        return dump_recipe([spec_to_json(p.to_spec()) for p in self.passes], self.data, self.seed)

    @property
    def needs_data(self) -> bool:
        """Whether any of the passes needs calibration data."""
        return any(p.needs_data for p in self.passes)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all passes, in order."""
        return tuple(file for p in self.passes for file in p.files)

    @property
    def cost(self) -> Cost:
        """The sum of the forward passes, and the largest memory that one pass needs."""
        costs = [p.cost for p in self.passes]
        return Cost(
            sum(c.flops for c in costs),
            max((c.bytes_per_parameter for c in costs), default=0),
            holds=max((c.holds for c in costs), default=0),
            solves=max((c.solves for c in costs), default=0),
            files=max((c.files for c in costs), default=0),
            holds_files=max((c.holds_files for c in costs), default=0),
            keeps=sum(c.keeps for c in costs),
            checkpoints=max((c.checkpoints for c in costs), default=0),
        )

    @property
    def least_sequences(self) -> int:
        """Calibration sequences that the neediest pass wants."""
        return max((p.least_sequences for p in self.passes), default=0)

    def explain_packages(self) -> list[str]:
        """Reasons of all passes, each once."""
        reasons = [reason for step in self.passes for reason in step.explain_packages()]
        return list(dict.fromkeys(reasons))

    def explain_sequences(self, count: int) -> list[str]:
        """Reasons why so many calibration sequences are too few.

        Args:
            count: of sequences.
        """
        reasons = []
        for step in self.passes:
            if count < step.least_sequences:
                reasons.append(
                    f"{step.name} needs {step.least_sequences} calibration sequences or more "
                    f"(some are held back to check), and there "
                    f"{'is' if count == 1 else 'are'} {count}"
                )
        return reasons

    def requires(self, program: Program) -> list[str]:
        """Reasons why the passes cannot run in this order, known before any work.

        Args:
            program: that the first pass takes.
        """
        known = program_facts(program)
        reasons = []
        for step in self.passes:
            reasons += [f"{step.name}: {reason}" for reason in step.explain_order(known)]
            known = (known - step.ends) | step.gives
        asked = {*self.hooks.print_after, *filter(None, [self.hooks.stop_after])}
        names = {p.name for p in self.passes}
        reasons += [
            f"no pass {n!r} runs here; {did_you_mean(n, names)}" for n in sorted(asked - names)
        ]
        return reasons

    def plan(self, program: Program) -> list[PlannedEdit]:
        """The edits of all passes, each planned on the preview of those before it.

        Args:
            program: that the first pass takes.
        """
        edits = []
        for step in self.passes:
            edits += step.plan(program)
            program = step.preview(program)
        return edits

    def preview(self, program: Program) -> Program:
        """A Program of the shapes that all passes leave.

        Args:
            program: that the first pass takes.
        """
        for step in self.passes:
            program = step.preview(program)
        return program

    def preview_uneven(self, program: Program) -> Program:
        """A Program of other shapes that the passes may as well leave, see ``Pass``.

        Args:
            program: that the first pass takes.
        """
        for step in self.passes:
            program = step.preview_uneven(program)
        return program

    def run(
        self,
        program: Program,
        data: Iterable[Batch] | None = None,
        progress: Progress | None = None,
        *,
        seed: int | None = None,
        output: Path | None = None,
        raise_model: Callable[[Program], nn.Module] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> Program:
        """Apply the passes.

        Args:
            program: what the first pass takes.
            data: calibration batches, ``input_ids`` [batch, seq] int64 or maps of model inputs; see
                passes.data.
            progress: reporter of long work.
            seed: instead of the pipeline's own.
            output: folder for by-products.
            raise_model: see Context; given by ``secateur.compress``.
            checkpoints: see Context; given by ``secateur.compress``.

        Returns:
            the new Program; the given one stays usable.

        Raises:
            PipelineError: data or scores are missing, before any work.  What a pass raises carries
                a note that names the pass and those already run.
        """
        if reasons := self.explain_packages():
            raise PipelineError("; ".join(reasons))
        if data is None and self.needs_data:
            needy = next(p.name for p in self.passes if p.needs_data)
            raise PipelineError(
                f"{needy} needs calibration data: give data=, batches of input_ids [batch, seq]"
            )
        sequences = None
        if data is not None and self.needs_data:
            sequences = samples(data, program)
            if reasons := self.explain_sequences(len(sequences)):
                raise PipelineError("; ".join(reasons))
        return self(
            program,
            Context(
                data=sequences,
                progress=progress or no_progress,
                seed=self.seed if seed is None else seed,
                output=output,
                raise_model=raise_model,
                checkpoints=checkpoints,
            ),
        )

    def call(self, program: Program, context: Context) -> PassResult:
        """Run the passes, from the first that no checkpoint holds.

        Args:
            program: that the first pass takes.
            context: of the run; each pass gets a folder of its own.

        Raises:
            SecateurError: what a pass raises, with a note that names the pass and those already
                run.
        """
        checkpoints = context.checkpoints
        done = 0
        if checkpoints:
            done, program = checkpoints.restore(program)
        for position, step in enumerate(self.passes_to_run, 1):
            if position <= done:
                continue
            start = time.perf_counter()
            try:
                program = step(program, _for_pass(context, position, step))
                if checkpoints:
                    checkpoints.store(position, step.name, program)
            except Exception as error:
                ran = ", ".join(p.name for p in self.passes[: position - 1]) or "none"
                error.add_note(
                    f"in pass {step.name} ({position} of {len(self.passes)}); already run: {ran}"
                )
                raise
            self._report_pass(step, program, time.perf_counter() - start)
        return PassResult(program, modified=False)

    @property
    def passes_to_run(self) -> tuple[Pass, ...]:
        """The passes up to the first that ``stop_after`` names."""
        names = [step.name for step in self.passes]
        if self.hooks.stop_after in names:
            return self.passes[: names.index(self.hooks.stop_after) + 1]
        return self.passes

    def record(self, result: PassResult, seed: int, seconds: float) -> Program:
        """The passes wrote the history themselves."""
        return result.program

    def _report_pass(self, one: Pass, program: Program, seconds: float) -> None:
        """Log the time of a pass, and write what the hooks ask for."""
        log.info("%s: %.2f s", one.name, seconds)
        if self.hooks.time_passes:
            self.hooks.write(f"{one.name}: {seconds:.2f} s")
        if one.name in self.hooks.print_after:
            self.hooks.write(f"# graph after {one.name}\n{program.gm.graph}")


def _for_pass(context: Context, position: int, one: Pass) -> Context:
    """The context of one pass: the folder of its own instead of the pipeline's checkpoints."""
    if context.checkpoints is None:
        return context
    return replace(
        context, resume=context.checkpoints.pass_folder(position, one.name), checkpoints=None
    )
