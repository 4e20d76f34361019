"""Rounds of depth pruning, each measured on the model that the rounds before it left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.graph import Block, Program, blocks, drop
from secateur.graph.errors import EditError
from secateur.passes.base import JSON, Context
from secateur.passes.depth.damage import (
    By,
    Part,
    block_influences,
    measure_damages,
    part_parameters,
)
from secateur.passes.storage.journal import Journal

Method = Literal["greedy", "contiguous", "alone", "influence"]
Level = Literal["block", "sub-block"]


@dataclass(frozen=True)
class DepthChoice:
    """How to choose; as the options of PruneDepth say, and the names of the blocks that stay."""

    drop: int
    method: Method
    by: By
    level: Level
    ends: frozenset[str]


def may_go(program: Program, ends: frozenset[str]) -> list[Block]:
    """The blocks that are neither locked nor named.

    Args:
        program: the model.
        ends: names of blocks that stay.
    """
    free: list[Block] = []
    for block in blocks(program):
        if block.locked is None and block.name not in ends:
            free.append(block)
    return free


class Rounds:
    """Measures and drops until enough is gone.

    Finished rounds are kept, so that a run that was killed goes on after the last of them."""

    def __init__(
        self,
        choice: DepthChoice,
        program: Program,
        context: Context | None = None,
        told: list[JSON] | None = None,
    ) -> None:
        self.choice = choice
        self.program = program
        self.context = context or Context()
        if program.cut:
            self.reference = program.cut.dense
        else:
            self.reference = program
        self.journal = Journal(self.context.resume)
        self.told = told if told is not None else []
        self.start = len(blocks(program))
        sizes = part_parameters(program)
        self.budget = choice.drop * sum(sizes[block.name] for block in blocks(program)) / self.start
        subs = []
        for block in blocks(program):
            for sub in block.sub_blocks:
                subs.append(sizes[sub.name])
        self.slack = min(subs) / 2
        self.full = program.num_parameters

    def run_rounds(self) -> Program:
        """Measure and drop until enough is gone.

        Returns:
            the shallower Program.
        """
        while not self.is_finished():
            name = f"round {len(self.told)}"
            entry = self.journal.read(name)
            if entry is None:
                facts = self._measure_choices()
                self.journal.write(name, facts=facts)
            else:
                facts = entry.facts
            self.told.append(facts)
            self.drop_parts(facts["dropped"])
        return self.program

    def is_finished(self) -> bool:
        """Whether enough is gone."""
        if self.choice.level == "block":
            return self.start - len(blocks(self.program)) >= self.choice.drop
        return not self.list_candidates()

    def drop_parts(self, names: Sequence[str]) -> None:
        """Drop blocks or sub-blocks of the current Program.

        Args:
            names: of blocks or sub-blocks.
        """
        self.program = drop(self.program, names)

    def list_candidates(self) -> list[Part]:
        """What may go next: at level sub-block, what still fits the budget."""
        free: list[Part] = list(may_go(self.program, self.choice.ends))
        if self.choice.level == "block":
            return free
        sizes = part_parameters(self.program)
        budget = self._remaining_budget()
        remaining_blocks = blocks(self.program)
        if len(remaining_blocks) == 1 and len(remaining_blocks[0].sub_blocks) == 1:
            last = {sub.name for sub in remaining_blocks[0].sub_blocks}
        else:
            last = set()
        candidates: list[Part] = []
        for block in remaining_blocks:
            if block.name in self.choice.ends:
                continue
            for sub in block.sub_blocks:
                fits = 0 < sizes[sub.name] <= budget
                if fits and sub.locked is None and sub.name not in last:
                    candidates.append(sub)
        return candidates

    def _remaining_budget(self) -> float:
        """Parameters that may still go at level sub-block."""
        return self.budget - (self.full - self.program.num_parameters) + self.slack

    def _list_choices(self) -> list[tuple[str, ...]]:
        """What may go in one step: a part, or a run of neighbours; for greedy at level sub-block a
        whole block, too, as attention and MLP of one layer can be missed less than those of two."""
        parts = self.list_candidates()
        if self.choice.method == "contiguous":
            return list(_neighbour_runs(self.program, parts, self.choice.drop))
        choices: list[tuple[str, ...]] = []
        for part in parts:
            choices.append((part.name,))
        remaining_blocks = blocks(self.program)
        if (
            self.choice.method == "greedy"
            and self.choice.level == "sub-block"
            and len(remaining_blocks) > 1
        ):
            sizes = part_parameters(self.program)
            free = {part.name for part in parts}
            for block in remaining_blocks:
                names = tuple(sub.name for sub in block.sub_blocks)
                size = sum(sizes[name] for name in names)
                fits = len(names) > 1 and size <= self._remaining_budget()
                if fits and free.issuperset(names):
                    choices.append(names)
        return choices

    def _measure_choices(self) -> JSON:
        """What each choice would do (the least goes first), what the model does now, and which
        parts go."""
        choices = self._list_choices()
        if self.choice.method == "influence":
            scores = list(
                block_influences(self.program, self.list_candidates(), self.context).values()
            )
            now = 0.0
        else:
            now, *scores = self._measure_damages([frozenset(), *map(frozenset, choices)])
        sizes = part_parameters(self.program)
        order = sorted(
            range(len(choices)),
            key=lambda position: (
                (scores[position] - now) / self._choice_price(choices[position], sizes)
            ),
        )
        if self.choice.method in ("greedy", "contiguous"):
            chosen = list(choices[order[0]])
        else:
            chosen = self._select_fitting([choices[position][0] for position in order])
        metrics = {}
        for choice, score in zip(choices, scores, strict=True):
            metrics[" + ".join(choice)] = score
        return {"now": now, "scores": metrics, "dropped": chosen}

    def _choice_price(self, names: Sequence[str], sizes: Mapping[str, int]) -> int:
        """Parameters at level sub-block; else a block is as good as any other."""
        if self.choice.level == "sub-block":
            return sum(sizes[name] for name in names)
        return 1

    def _select_fitting(self, order: Sequence[str]) -> list[str]:
        """The first in order, as many as are to go."""
        if self.choice.level == "block":
            return list(order[: self.choice.drop])
        sizes = part_parameters(self.program)
        budget = self.budget + self.slack
        fitting = list[str]()
        for name in order:
            if sizes[name] <= budget:
                fitting.append(name)
                budget -= sizes[name]
        return fitting

    def _measure_damages(self, cuts: Sequence[frozenset[str]]) -> list[float]:
        """Damage of each cut of the current Program, nats a token."""
        what = f"depth, round {len(self.told) + 1}"
        return measure_damages(
            self.program, self.reference, cuts, self.choice.by, self.context, what
        )


def _neighbour_runs(
    program: Program, free: Sequence[Part], count: int
) -> Iterator[tuple[str, ...]]:
    """The names of neighbours, so many at a time, all of which may go.

    Raises:
        EditError: there is no such run.
    """
    names = [block.name for block in blocks(program)]
    may = {part.name for part in free}
    fitting = []
    for start in range(len(names) - count + 1):
        run = tuple(names[start : start + count])
        if may.issuperset(run) and len({name.rpartition(".")[0] for name in run}) == 1:
            fitting.append(run)
    if not fitting:
        raise EditError(f"prune-depth: no {count} neighbouring blocks may all go")
    yield from fitting
