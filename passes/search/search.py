"""Architecture search over uniform shapes within a budget: candidates are repaired and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from secateur.graph import Program, blocks, drop, keep
from secateur.graph.errors import EditError, PipelineError, SecateurError
from secateur.passes.base import JSON, Context, Cost, Pass, PassResult, PlannedEdit
from secateur.passes.calibration.data import CalibrationError, Sample
from secateur.passes.calibration.kl import kl_to, predict_reference
from secateur.passes.depth.prune_depth import PruneDepth
from secateur.passes.language.options import OptionError
from secateur.passes.repair.repair import Repair, held_back_sequences
from secateur.passes.search.latency import LatencyTable
from secateur.passes.search.space import (
    LAYERS,
    Budget,
    Candidate,
    Shape,
    ShapeCosts,
    groups_to_search,
    shapes_within,
)
from secateur.passes.storage.journal import Journal
from secateur.passes.training.distill import Distill
from secateur.passes.width.prune_width import check_scored
from secateur.passes.width.shares import select_units

Bound = Literal["low", "high", "multiple"]
Choice = tuple[Annotated[int, Field(ge=1)], ...] | dict[Bound, Annotated[int, Field(ge=1)]]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
FAMILIES = ("hidden", "mlp", "kv_heads", "query_heads", "head_dim", "experts")


@dataclass(frozen=True)
class Search(Pass):
    """Choose the model's shape within a budget.  Numerics: lossy.

    Every shape of the grid is counted; of those within the budget the dearest are pruned by the
    scores that are there, repaired, and compared by their KL to the dense model on sequences held
    back (one in five); the best one stays.

    layers, hidden, mlp, kv_heads, query_heads, head_dim, experts: numbers to choose among
    ([768,1024]), or a range
        ({low=512,high=1536,multiple=128}; low is half of what is there by default, high is that);
        left out: as it is.
    expansion: instead of mlp: its units as multiples of hidden ([2.5,3,3.5,4]).
    at_most: the budget: a number, or a part of the model where it is 1 or less.
    at_least: shapes below it are passed over; by default 0.95 of at_most.
    budget: what is counted: parameters, bytes, or latency (measured seconds of the matrices, one
        token).
    top: so many shapes are compared.
    patience: stop after so many that were no better than the best before; 0 for never.
    depth: how the layers that go are chosen: influence, alone or greedy, see prune-depth.
    repair: refit each candidate before it is compared.
    tokens: distil the best ones on so many tokens of the data and compare them again; 0 for not.
    finalists: how many are distilled.

    Source:
        Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.3 and table 9; the KL after
        repair is ours.
    """

    name: ClassVar[str] = "search"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    uses: ClassVar[frozenset[str]] = frozenset({"scores"})
    gives: ClassVar[frozenset[str]] = frozenset({"cut"})
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})
    bars: ClassVar[Mapping[str, str]] = {
        "sparse": "weights are sparse along the inputs that would go: put search before sparsify"
    }

    layers: Choice = field(default=(), hash=False)
    hidden: Choice = field(default=(), hash=False)
    mlp: Choice = field(default=(), hash=False)
    kv_heads: Choice = field(default=(), hash=False)
    query_heads: Choice = field(default=(), hash=False)
    head_dim: Choice = field(default=(), hash=False)
    experts: Choice = field(default=(), hash=False)
    expansion: tuple[Positive, ...] = ()
    at_most: Positive = 0.75
    at_least: Positive | None = None
    budget: Budget = "parameters"
    top: Annotated[int, Field(ge=1)] = 8
    patience: Count = 0
    depth: Literal["influence", "alone", "greedy"] = "influence"
    repair: bool = True
    tokens: Count = 0
    finalists: Annotated[int, Field(ge=1)] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expansion and (self.mlp or not self.hidden):
            raise OptionError(
                "search: expansion stands for mlp, and multiplies hidden: give hidden, not mlp"
            )
        if not any(getattr(self, name) for name in (LAYERS, *FAMILIES)):
            raise OptionError(
                "search: nothing to choose: give layers=[...], mlp=[...], hidden={...} or others"
            )

    @property
    def needs_data(self) -> bool:
        """Always: shapes are compared on calibration sequences."""
        return True

    @property
    def least_sequences(self) -> int:
        """Some are held back to check."""
        return 3

    @property
    def cost(self) -> Cost:
        """Forward passes of the shapes that are compared."""
        return Cost((3.0 if self.repair else 0.2) * self.top, 1.0)

    @property
    def varied_families(self) -> list[str]:
        """What differs between the shapes."""
        families: list[str] = []
        for name in (LAYERS, *FAMILIES):
            if getattr(self, name) or (name == "mlp" and self.expansion):
                families.append(name)
        return families

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run; comparing shapes needs weights.

        Args:
            program: with scores.
        """
        reasons = super().requires(program)
        if any(p.is_meta for _, p in program.named_parameters()):
            reasons.append("the weights are on the meta device: open the model with weights")
        return reasons

    def list_candidates(
        self, program: Program, table: LatencyTable | None = None
    ) -> list[Candidate]:
        """All shapes within the budget, the dearest first.

        Args:
            program: the model.
            table: measured seconds; None: a new one.

        Returns:
            candidates by falling cost.

        Raises:
            EditError: a family cannot be searched, or no shape fits.
        """
        costs = ShapeCosts(program, self.varied_families, table or LatencyTable())
        choices = {}
        for name in self.varied_families:
            if getattr(self, name):
                choices[name] = self._list_sizes(name, costs.full[name])
        full_budget = float(
            costs.cost({name: [costs.full[name]] for name in self.varied_families}, self.budget)[0]
        )
        if self.at_most <= 1:
            most = self.at_most * full_budget
        else:
            most = self.at_most
        if self.at_least is None:
            least = 0.95 * most
        else:
            least = self.at_least * (full_budget if self.at_least <= 1 else 1)
        shapes = list(
            shapes_within(
                choices, lambda s: costs.cost(s, self.budget), most, least, self.expansion
            )
        )
        shapes = [
            shape
            for shape in shapes
            if all(shape.shape[name] <= costs.full[name] for name in self.varied_families)
        ]
        if not shapes:
            raise EditError(
                f"search: no shape costs between {least:,.6g} and {most:,.6g} {self.budget} (the "
                f"model: {full_budget:,.6g}): "
                "give more choices, or another budget"
            )
        return shapes

    def plan(self, program: Program) -> list[PlannedEdit]:
        """What the dearest shape would do.

        Args:
            program: to be pruned.
        """
        shape = self.list_candidates(program)[0].shape
        edits = []
        for name in self.varied_families:
            if name != LAYERS:
                for group in groups_to_search(program, name):
                    edits.append(
                        PlannedEdit(group.name, name, group.units, shape[name], exact=False)
                    )
        check_scored(edits, program)
        if LAYERS in shape:
            edits.append(
                PlannedEdit(LAYERS, "blocks", len(blocks(program)), shape[LAYERS], exact=False)
            )
        return edits

    def preview(self, program: Program) -> Program:
        """The dearest shape within the budget, with the first units and blocks of each kind.

        Args:
            program: to be pruned.
        """
        shape = self.list_candidates(program)[0].shape
        names = []
        for block in blocks(program):
            if block.locked is None:
                names.append(block.name)
        edit = {}
        for f in self.varied_families:
            if f != LAYERS:
                for g in groups_to_search(program, f):
                    edit[g.name] = torch.arange(shape[f])
        return _cut_program(
            program,
            edit,
            names[::-1][: len(blocks(program)) - shape.get(LAYERS, len(blocks(program)))],
        )

    def call(self, program: Program, context: Context) -> PassResult:
        """Compare the dearest shapes and keep the best one.

        Args:
            program: with scores.
            context: with calibration data.

        Raises:
            CalibrationError: fewer than three calibration sequences.
            EditError: no shape fits the budget.
            PipelineError: no stock class holds any of the shapes compared.
        """
        data = context.data or ()
        if len(data) < 3:
            raise CalibrationError(
                "search needs three calibration sequences or more: some are held back to compare"
            )
        run = _Run(self, program, context, data)
        shapes = self.list_candidates(program)
        rows = list(run.compare_candidates(shapes))
        best = min(rows, key=lambda row: row["kl"])
        if self.tokens:
            best = run.distil_best(rows)
        figures = {
            "within": len(shapes),
            "budget": self.budget,
            "whole": program.num_parameters,
            "candidates": rows,
        }
        return PassResult(run.finish_candidate(best), True, {**figures, "chosen": best["shape"]})

    def _list_sizes(self, name: str, full: int) -> list[int]:
        """The numbers to choose among, ascending.

        Raises:
            EditError: the range holds no multiple.
        """
        choice = getattr(self, name)
        if not isinstance(choice, dict):
            return sorted(set(choice))
        multiple = choice.get("multiple", 1)
        low = choice.get("low", max(1, full // 2))
        high = choice.get("high", full)
        sizes = []
        for count in range(low, high + 1):
            if count % multiple == 0:
                sizes.append(count)
        if not sizes:
            raise EditError(
                f"search: no multiple of {multiple} lies between {low} and {high} ({name})"
            )
        return sizes


class _Run:
    """Compares candidates; finished ones are kept, so that a run that was killed goes on after the
    last of them."""

    def __init__(
        self, options: Search, program: Program, context: Context, data: Sequence[Sample]
    ) -> None:
        self.options = options
        self.program = program
        self.context = context
        back = held_back_sequences(len(data))
        self.judges = [sample for index, sample in enumerate(data) if index in back]
        self.seen = tuple(sample for index, sample in enumerate(data) if index not in back)
        if program.cut:
            self.dense = program.cut.dense
        else:
            self.dense = program
        self.journal = Journal(context.resume)
        self.expected = predict_reference(self.dense, self.judges)
        if LAYERS in options.varied_families:
            self.gone = self._drop_order()
        else:
            self.gone = []

    def compare_candidates(self, found: Sequence[Candidate]) -> Iterator[JSON]:
        """A row for each candidate: shape, cost, parameters, KL."""
        best = float("inf")
        since = 0
        chosen = found[: self.options.top]
        refused = 0
        for index, shape in enumerate(self.context.progress(chosen, "shapes", len(chosen))):
            entry = self.journal.read(f"candidate {index}")
            if entry is None:
                row = self._candidate_row(shape)
                self.journal.write(f"candidate {index}", facts=row)
            else:
                row = entry.facts
            if "refused" in row:
                refused += 1
                self.context.log.info("search passes over %s: %s", row["shape"], row["refused"])
                continue
            yield row
            if row["kl"] < best:
                best = row["kl"]
                since = 0
            else:
                since += 1
            if self.options.patience and since >= self.options.patience:
                return
        if refused == len(chosen):
            raise PipelineError(
                "search: no stock class holds any of the shapes compared: choose other numbers"
            )

    def distil_best(self, told: list[JSON]) -> JSON:
        """The best row after a short distillation of the first few."""
        first = sorted(told, key=lambda row: row["kl"])[: self.options.finalists]
        for row in first:
            row["kl_distilled"] = kl_to(self.expected, self.finish_candidate(row), self.judges).mean
        return min(first, key=lambda row: row["kl_distilled"])

    def finish_candidate(self, row: Mapping[str, Any]) -> Program:
        """The Program of a row: pruned, repaired and, where that was asked for, distilled."""
        repaired = self._repair_program(self._prune_to_shape(row["shape"]))
        if not self.options.tokens:
            return repaired
        name = "distill " + "-".join(str(count) for count in row["shape"].values())
        folder = None
        if self.context.resume:
            folder = self.context.resume / name
        return Distill(tokens=self.options.tokens)(
            repaired, replace(self.context, data=self.seen, resume=folder)
        )

    def _candidate_row(self, one: Candidate) -> JSON:
        """Shape, cost and KL of one candidate, or why no stock class holds it."""
        pruned = self._prune_to_shape(one.shape)
        try:
            if self.context.raise_model is not None:
                self.context.raise_model(pruned)
        except SecateurError as error:
            return {"shape": dict(one.shape), "cost": one.cost, "refused": str(error)}
        repaired = self._repair_program(pruned)
        divergence = kl_to(self.expected, repaired, self.judges)
        row = {
            "kl": divergence.mean,
            "stderr": divergence.stderr,
            "parameters": repaired.num_parameters,
        }
        return {"shape": dict(one.shape), "cost": one.cost, **row}

    def _repair_program(self, pruned: Program) -> Program:
        """The pruned Program, repaired if asked for."""
        if not self.options.repair or pruned.cut is None:
            return pruned
        return Repair()(pruned, replace(self.context, data=self.seen, resume=None)).replace(
            history=self.program.history
        )

    def _prune_to_shape(self, shape: Shape) -> Program:
        """The Program pruned to a shape by its scores."""
        edit: dict[str, torch.Tensor] = {}
        for family in self.options.varied_families:
            for group in groups_to_search(self.program, family) if family != LAYERS else ():
                edit[group.name] = select_units(self.program, group.name, shape[family])
        count = len(blocks(self.program))
        return _cut_program(self.program, edit, self.gone[: count - shape.get(LAYERS, count)])

    def _drop_order(self) -> list[str]:
        """The blocks in the order in which they go."""
        options = self.options
        most = len(blocks(self.program)) - min(
            options._list_sizes(LAYERS, len(blocks(self.program)))
        )
        if most <= 0:
            return []
        folder = None
        if self.context.resume:
            folder = self.context.resume / "depth"
        asked = PruneDepth(drop=most, method=options.depth)
        shallow = asked(self.program, replace(self.context, data=self.seen, resume=folder))
        names: list[str] = []
        for round_metrics in shallow.history[-1].figures["rounds"]:
            names += round_metrics["dropped"]
        return names


def _cut_program(
    program: Program, edit: Mapping[str, torch.Tensor], gone: Sequence[str]
) -> Program:
    """The Program with these units and without these blocks."""
    narrow = keep(program, dict(edit.items()))
    if gone:
        return drop(narrow, gone)
    return narrow
