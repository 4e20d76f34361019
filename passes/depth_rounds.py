"""Which parts of a model's depth go: round after round, each measured on the model that is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateur.graph import Block, Program, blocks, drop
from secateur.graph.errors import EditError
from secateur.passes.base import Context
from secateur.passes.depth_damage import By, Part, damages, influences, part_parameters
from secateur.passes.journal import Journal

Method = Literal["greedy", "contiguous", "alone", "influence"]
Level = Literal["block", "sub-block"]


@dataclass(frozen=True)
class Choice:
    """How to choose; as the options of PruneDepth say, and the names of the blocks that stay."""

    drop: int
    method: Method
    by: By
    level: Level
    ends: frozenset[str]


def may_go(program: Program, ends: frozenset[str]) -> list[Block]:
    """The blocks that are neither locked nor named."""
    return [block for block in blocks(program) if block.locked is None and block.name not in ends]


class Rounds:
    """Measures and drops until enough is gone.

    Finished rounds are kept, so that a run that was killed goes on after the last of them."""

    def __init__(
        self, choice: Choice, program: Program, context: Context | None = None, told: list[Any] | None = None
    ) -> None:
        self.choice, self.program, self.context = choice, program, context or Context()
        self.reference = program.cut.dense if program.cut else program
        self.journal, self.told = Journal(self.context.resume), told if told is not None else []
        self.start = len(blocks(program))
        sizes = part_parameters(program)
        self.budget = choice.drop * sum(sizes[block.name] for block in blocks(program)) / self.start
        subs = [sizes[sub.name] for block in blocks(program) for sub in block.sub_blocks]
        self.slack = min(subs) / 2
        self.full = program.num_parameters

    def run(self) -> Program:
        while not self.done():
            name = f"round {len(self.told)}"
            kept = self.journal.read(name)
            facts = kept.facts if kept else self._measure()
            if kept is None:
                self.journal.write(name, facts=facts)
            self.told.append(facts)
            self.drop(facts["dropped"])
        return self.program

    def done(self) -> bool:
        """Whether enough is gone."""
        if self.choice.level == "block":
            return self.start - len(blocks(self.program)) >= self.choice.drop
        return not self.candidates()

    def drop(self, names: Sequence[str]) -> None:
        self.program = drop(self.program, names)

    def candidates(self) -> list[Part]:
        """What may go next: at level sub-block, what still fits the budget."""
        free: list[Part] = list(may_go(self.program, self.choice.ends))
        if self.choice.level == "block":
            return free
        sizes, left, found = part_parameters(self.program), self._left(), blocks(self.program)
        last = {sub.name for sub in found[0].sub_blocks} if len(found) == 1 and len(found[0].sub_blocks) == 1 else set()
        subs = [sub for b in found if b.name not in self.choice.ends for sub in b.sub_blocks if sub.locked is None]
        return [sub for sub in subs if 0 < sizes[sub.name] <= left and sub.name not in last]

    def _left(self) -> float:
        """Parameters that may still go at level sub-block."""
        return self.budget - (self.full - self.program.num_parameters) + self.slack

    def _choices(self) -> list[tuple[str, ...]]:
        """What may go in one step: a part, or a run of neighbours; for greedy at level sub-block a whole block, too, as
        attention and MLP of one layer can be missed less than those of two."""
        parts = self.candidates()
        if self.choice.method == "contiguous":
            return list(_runs(self.program, parts, self.choice.drop))
        choices: list[tuple[str, ...]] = [(part.name,) for part in parts]
        found = blocks(self.program)
        if self.choice.method == "greedy" and self.choice.level == "sub-block" and len(found) > 1:
            sizes, free = part_parameters(self.program), {part.name for part in parts}
            whole = [tuple(sub.name for sub in block.sub_blocks) for block in found if len(block.sub_blocks) > 1]
            fitting = [names for names in whole if sum(sizes[name] for name in names) <= self._left()]
            choices += [names for names in fitting if free.issuperset(names)]
        return choices

    def _measure(self) -> dict[str, Any]:
        """What each choice would do (the least goes first), what the model does now, and which parts go."""
        choices = self._choices()
        if self.choice.method == "influence":
            scores, now = list(influences(self.program, self.candidates(), self.context).values()), 0.0
        else:
            now, *scores = self._damages([frozenset(), *map(frozenset, choices)])
        sizes = part_parameters(self.program)
        order = sorted(range(len(choices)), key=lambda at: (scores[at] - now) / self._price(choices[at], sizes))
        if self.choice.method in ("greedy", "contiguous"):
            chosen = list(choices[order[0]])
        else:
            chosen = self._fitting([choices[at][0] for at in order])
        told = {" + ".join(choice): score for choice, score in zip(choices, scores, strict=True)}
        return {"now": now, "scores": told, "dropped": chosen}

    def _price(self, names: Sequence[str], sizes: Mapping[str, int]) -> int:
        """Parameters at level sub-block; else a block is as good as any other."""
        return sum(sizes[name] for name in names) if self.choice.level == "sub-block" else 1

    def _fitting(self, order: Sequence[str]) -> list[str]:
        """The first in order, as many as are to go."""
        if self.choice.level == "block":
            return list(order[: self.choice.drop])
        sizes, left, found = part_parameters(self.program), self.budget + self.slack, list[str]()
        for name in order:
            if sizes[name] <= left:
                found.append(name)
                left -= sizes[name]
        return found

    def _damages(self, cuts: Sequence[frozenset[str]]) -> list[float]:
        what = f"depth, round {len(self.told) + 1}"
        return damages(self.program, self.reference, cuts, self.choice.by, self.context, what)


def _runs(program: Program, free: Sequence[Part], count: int) -> Iterator[tuple[str, ...]]:
    """The names of neighbours, so many at a time, all of which may go.

    Raises: EditError: there is no such run."""
    names, may = [block.name for block in blocks(program)], {part.name for part in free}
    found = [tuple(names[at : at + count]) for at in range(len(names) - count + 1)]
    fitting = [run for run in found if may.issuperset(run) and len({name.rpartition(".")[0] for name in run}) == 1]
    if not fitting:
        raise EditError(f"prune-depth: no {count} neighbouring blocks may all go")
    yield from fitting
