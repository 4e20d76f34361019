"""Allocation of one shared budget over coupled groups, each pruned to a size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from secateur.graph import CoupledGroup, Program, coupled_groups, keep
from secateur.graph.errors import EditError
from secateur.passes.base import JSON, Context, Cost, Pass, PassResult, PlannedEdit
from secateur.passes.calibration.data import Sample
from secateur.passes.language.options import OptionError
from secateur.passes.solvers.knapsack import SizeOption, solve_knapsack
from secateur.passes.storage.journal import Journal
from secateur.passes.width.costs import CostKind, cost_of, sizes_of
from secateur.passes.width.evolve import evolve_mixture
from secateur.passes.width.prune_width import WHOLE, Family, Fraction, Multiple, check_scored
from secateur.passes.width.shares import select_units, unit_values
from secateur.passes.width.supernet import Judge, Supernet

Damage = Literal["scores", "error", "kl"]
Count = Annotated[int, Field(ge=0)]
Levels = Annotated[int, Field(ge=2)]


@dataclass(frozen=True)
class Allocate(Pass):
    """Prune coupled groups to a shared budget, each to its own size.  Numerics: lossy.

    The sizes are chosen exactly: the least sum of damages within the budget; then, if asked, by
    evolution on the KL of the whole model.  Layers come out different, which no stock class holds.
    ratio: part of the groups' budget that is removed.
    families: of the groups that share the budget.
    budget: what is counted: parameters, bytes, flops (a token) or latency (measured seconds of the
        groups' matrices, one token).
    damage: of a group at a size: scores (sum of the scores of what goes, as they stand: choose a
        metric whose scores compare across groups), error (of what its consumers give after a refit,
        relative to its energy) or kl (nats, to the dense model, when that group alone is smaller
        and refitted).
    levels: sizes to choose among, for each group.
    least: part of its units that a group keeps at least.
    round_to: unit counts are multiples of it (heads and experts stay whole).
    tokens: calibration tokens on which a KL is measured.
    generations, children: of the evolution; 0 generations: none.

    Source:
        Frantar & Alistarh 2022 (exact choice under a budget), arXiv:2203.04466, section 4; Li et
        al. 2025 (Týr), arXiv:2503.09657, section 3 (supernet of sizes, KL).
    """

    name: ClassVar[str] = "allocate"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    uses: ClassVar[frozenset[str]] = frozenset({"scores"})
    gives: ClassVar[frozenset[str]] = frozenset({"cut"})
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})
    bars: ClassVar[Mapping[str, str]] = {
        "sparse": "weights are sparse along the inputs that would go: put allocate before sparsify"
    }

    ratio: Fraction = 0.25
    families: tuple[Family, ...] = ("mlp",)
    budget: CostKind = "parameters"
    damage: Damage = "kl"
    levels: Levels = 8
    least: Fraction = 0.1
    round_to: Multiple = 1
    tokens: Annotated[int, Field(ge=2)] = 2048
    generations: Count = 0
    children: Annotated[int, Field(ge=1)] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.families:
            raise OptionError(
                "allocate: give the families of groups that share the budget (families=mlp)"
            )

    @property
    def needs_levels(self) -> bool:
        """Whether levels must be made and run."""
        return self.damage != "scores" or self.generations > 0

    @property
    def needs_data(self) -> bool:
        """Whether levels are made and measured on calibration data."""
        return self.needs_levels

    @property
    def cost(self) -> Cost:
        """Forward passes and memory of the levels, none where scores alone decide."""
        if self.needs_levels:
            return Cost(3.0, 2.0)
        return Cost(0.0, 0.0)

    def plan(self, program: Program) -> list[PlannedEdit]:
        """One edit for each group, with the size that it would have if all lost the same part.

        Args:
            program: to be pruned.

        Raises:
            EditError: no group of a family, or every one is locked.
        """
        edits: list[PlannedEdit] = []
        for g in self.free_groups(program):
            edits.append(PlannedEdit(g.name, g.family, g.units, self._average_size(g), exact=False))
        check_scored(edits, program)
        return edits

    def preview(self, program: Program) -> Program:
        """A Program in which every group has the average size.

        Args:
            program: to be pruned.
        """
        return keep(program, {edit.group: torch.arange(edit.kept) for edit in self.plan(program)})

    def preview_uneven(self, program: Program) -> Program:
        """A Program in which one group is a level larger and one a level smaller.

        Args:
            program: to be pruned.
        """
        groups = self.free_groups(program)
        counts = {group.name: self._average_size(group) for group in groups}
        for fewer in groups:
            smaller = [n for n in self._level_sizes(fewer) if n < counts[fewer.name]]
            for more in groups:
                larger = [n for n in self._level_sizes(more) if n > counts[more.name]]
                if fewer.name != more.name and smaller and larger:
                    counts[fewer.name] = smaller[0]
                    counts[more.name] = larger[-1]
                    return keep(program, {n: torch.arange(c) for n, c in counts.items()})
        return self.preview(program)

    def call(self, program: Program, context: Context) -> PassResult:
        """Choose the sizes within the budget and cut.

        Args:
            program: with scores.
            context: with calibration data, where levels are measured.

        Raises:
            EditError: no group may be pruned, or the smallest sizes cost more than the budget.
        """
        groups = self.free_groups(program)
        journal = Journal(context.resume)
        sizes = {group.name: self._level_sizes(group) for group in groups}
        for name, group_sizes in sizes.items():
            select_units(program, name, group_sizes[-1])  # raises before any work
        costs = {}
        for g in groups:
            costs[g.name] = [
                cost_of(self.budget, program, g)(units_kept) for units_kept in sizes[g.name]
            ]
        costs = _measure_once(journal, "costs", costs)
        limit = (1 - self.ratio) * sum(cost[0] for cost in costs.values())
        supernet = None
        if self.needs_levels:
            supernet = Supernet(program, groups, sizes)
        judge = None
        if supernet is not None:
            supernet.make_levels(context, journal)
            judge = Judge(supernet, _first_sequences(context, self.tokens), context)
        damages = self._measure_damages(program, sizes, supernet, judge, context, journal)
        menu = {}
        for name in sizes:
            menu[name] = [
                SizeOption(*row)
                for row in zip(sizes[name], costs[name], damages[name], strict=True)
            ]
        mixture = dict(zip(menu, solve_knapsack(list(menu.values()), limit), strict=True))
        figures: JSON = {"limit": limit, "damages": damages}
        if judge is not None and self.generations:
            fresh = Judge(judge.supernet, judge.samples, context, judge.dense)
            options = {"generations": self.generations, "children": self.children}
            mixture, figures["evolution"] = evolve_mixture(
                mixture, menu, limit, fresh, context, journal, **options
            )
        counts = {}
        cut = {}
        for name, index in mixture.items():
            units_kept = menu[name][index].kept
            counts[name] = units_kept
            if units_kept < sizes[name][0]:
                cut[name] = select_units(program, name, units_kept)
        if cut:
            smaller = keep(program, cut)
        else:
            smaller = program
        figures |= {
            "kept": counts,
            "cost": sum(menu[name][index].cost for name, index in mixture.items()),
        }
        return PassResult(smaller, bool(cut), figures)

    def free_groups(self, program: Program) -> list[CoupledGroup]:
        """The groups that share the budget.

        Args:
            program: to be pruned.

        Returns:
            groups in the order of the families and of the graph.

        Raises:
            EditError: a family has none that may be pruned.
        """
        groups: list[CoupledGroup] = []
        for family in self.families:
            free = []
            for g in coupled_groups(program):
                if g.family == family and g.locked is None:
                    free.append(g)
            if not free:
                raise EditError(
                    f"allocate: the model has no group of family {family!r} that may be pruned"
                )
            across = next((g.name for g in free if not g.block), None)
            if across is not None:
                raise EditError(
                    f"allocate: {across} runs through the whole network: prune it with prune-width"
                )
            groups += free
        return groups

    def _level_sizes(self, group: CoupledGroup) -> list[int]:
        """The sizes to choose among for a group, descending."""
        if group.family in WHOLE:
            multiple = 1
        else:
            multiple = self.round_to
        least = max(group.min_units, 1, round(self.least * group.units))
        return list(sizes_of(group.units, self.levels, multiple, least))

    def _average_size(self, group: CoupledGroup) -> int:
        """The size nearest to the part that all groups would keep."""
        return min(
            self._level_sizes(group), key=lambda size: abs(size - (1 - self.ratio) * group.units)
        )

    def _measure_damages(
        self,
        program: Program,
        sizes: dict[str, list[int]],
        supernet: Supernet | None,
        judge: Judge | None,
        context: Context,
        journal: Journal,
    ) -> dict[str, list[float]]:
        """By group, the damage of each size."""
        if self.damage == "scores":
            dropped: dict[str, list[float]] = {}
            for name, counts in sizes.items():
                dropped[name] = [_dropped_score(program.scores[name], count) for count in counts]
            return dropped
        assert supernet is not None and judge is not None
        if self.damage == "error":
            damages: dict[str, list[float]] = {}
            for name in sizes:
                damages[name] = [level.error for level in supernet.levels[name]]
            return damages
        measured = {}
        for name in context.progress(list(supernet.consumers), "damage", len(supernet.consumers)):
            entry = journal.read(f"damage {name}")
            if entry is None:
                judge.advance_to(name)
                values = [0.0]
                for index in range(1, len(sizes[name])):
                    values.append(judge.measure_kl({name: index}).mean)
                journal.write(f"damage {name}", facts={"values": values})
            else:
                values = entry.facts["values"]
            measured[name] = values
        return {name: measured[name] for name in sizes}


def _dropped_score(scores: torch.Tensor, kept: int) -> float:
    """Sum of the scores of the units that would go."""
    return float(unit_values(scores).double().sort(descending=True).values[kept:].sum())


def _first_sequences(context: Context, tokens: int) -> list[Sample]:
    """The first sequences that hold so many tokens together, or all."""
    sequences = []
    count = 0
    for sample in context.data or ():
        if count >= tokens:
            break
        sequences.append(sample)
        count += sample.tokens
    return sequences


def _measure_once(
    journal: Journal, name: str, value: dict[str, list[float]]
) -> dict[str, list[float]]:
    """The first measurement of an interrupted run: a time that is measured again differs."""
    entry = journal.read(name)
    if entry is None:
        journal.write(name, facts={"value": value})
    return value if entry is None else entry.facts["value"]
