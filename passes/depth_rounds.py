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
    swaps: int
    ends: frozenset[str]


def may_go(program: Program, ends: frozenset[str]) -> list[Block]:
    """The blocks that are neither locked nor named."""
    return [block for block in blocks(program) if block.locked is None and block.name not in ends]


class Rounds:
    """Measures and drops until enough is gone.

    Finished rounds are kept, so that a run that was killed goes on after the last of them."""

    def __init__(
        self,
        choice: Choice,
        program: Program,
        context: Context | None = None,
        told: list[Any] | None = None,
        swaps: list[Any] | None = None,
    ) -> None:
        self.choice, self.whole, self.program, self.context = choice, program, program, context or Context()
        self.reference = program.cut.dense if program.cut else program
        self.journal = Journal(self.context.resume)
        self.told, self.swaps = (told if told is not None else [], swaps if swaps is not None else [])
        self.barred = frozenset[str]()
        self.start = len(blocks(program))
        self.sizes = part_parameters(program)
        self.budget = choice.drop * sum(self.sizes[block.name] for block in blocks(program)) / self.start
        subs = [self.sizes[sub.name] for block in blocks(program) for sub in block.sub_blocks]
        self.slack = min(subs) / 2
        self.full = program.num_parameters

    def run(self) -> Program:
        self._fill("round", self.told)
        if self.choice.swaps and self.told:
            self._swap()
        return self.program

    def _fill(self, what: str, told: list[Any]) -> None:
        while not self.done():
            name = f"{what} {len(told)}"
            kept = self.journal.read(name)
            facts = kept.facts if kept else self._measure(f"depth, {what} {len(told) + 1}")
            if kept is None:
                self.journal.write(name, facts=facts)
            told.append(facts)
            self.drop(facts["dropped"])

    def _swap(self) -> None:
        """One part at a time comes back, and others go in its place; the better of the two stays."""
        gone = [name for facts in self.told for name in facts["dropped"]]
        now, new = _damage(self.told[-1]), frozenset[str]()
        untried = self._by_relief(gone, now, new)
        while untried and len(self.swaps) < self.choice.swaps:
            back, before, tried = untried.pop(0), self.program, list[Any]()
            rest = [name for name in gone if name != back]
            self.program, self.barred = drop(self.whole, rest), frozenset([back])
            self._fill(f"swap {len(self.swaps)} round", tried)
            self.barred = frozenset()
            found = [name for facts in tried for name in facts["dropped"]]
            damage = _damage(tried[-1]) if tried else now
            better = damage < now and self._as_small_as(before)
            self.swaps.append({"now": now, "back": back, "dropped": found, "damage": damage, "kept": better})
            if better:
                gone, now, new = [*rest, *found], damage, frozenset(found)
                untried = self._by_relief(gone, now, new)
            else:
                self.program = before

    def _by_relief(self, gone: Sequence[str], now: float, new: frozenset[str]) -> list[str]:
        """What is gone and not new, by what its return takes off the damage, the most first."""
        name, old = f"relief {len(self.swaps)}", [part for part in gone if part not in new]
        kept = self.journal.read(name)
        cuts = [frozenset(gone) - {part} for part in old]
        damage = kept.facts["damage"] if kept else self._damages(cuts, f"depth, {name}", self.whole)
        if kept is None:
            self.journal.write(name, facts={"damage": damage})
        relief = {part: (now - left) / self._price([part], self.sizes) for part, left in zip(old, damage, strict=True)}
        return sorted(relief, key=relief.__getitem__, reverse=True)

    def _as_small_as(self, before: Program) -> bool:
        if self.choice.level == "block":
            return len(blocks(self.program)) <= len(blocks(before))
        return self.program.num_parameters <= before.num_parameters + self.slack

    def _price(self, names: Sequence[str], sizes: Mapping[str, int]) -> int:
        """Parameters at level sub-block; else a block is as good as any other."""
        return max(1, sum(sizes[name] for name in names)) if self.choice.level == "sub-block" else 1

    def done(self) -> bool:
        """Whether enough is gone, or nothing more may go."""
        enough = self.choice.level == "block" and self.start - len(blocks(self.program)) >= self.choice.drop
        return enough or not self.candidates()

    def drop(self, names: Sequence[str]) -> None:
        self.program = drop(self.program, names)

    def candidates(self) -> list[Part]:
        """What may go next: at level sub-block, what still fits the budget."""
        free: list[Part] = list(may_go(self.program, self.choice.ends | self.barred))
        if self.choice.level == "block":
            return free
        sizes, left, found = part_parameters(self.program), self._left(), blocks(self.program)
        last = {sub.name for sub in found[0].sub_blocks} if len(found) == 1 and len(found[0].sub_blocks) == 1 else set()
        last |= self.barred
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

    def _measure(self, what: str) -> dict[str, Any]:
        """What each choice would do (the least goes first), what the model does now, and which parts go."""
        choices = self._choices()
        if self.choice.method == "influence":
            scores, now = list(influences(self.program, self.candidates(), self.context).values()), 0.0
        else:
            now, *scores = self._damages([frozenset(), *map(frozenset, choices)], what, self.program)
        sizes = part_parameters(self.program)
        order = sorted(range(len(choices)), key=lambda at: (scores[at] - now) / self._price(choices[at], sizes))
        if self.choice.method in ("greedy", "contiguous"):
            chosen = list(choices[order[0]])
        else:
            chosen = self._fitting([choices[at][0] for at in order])
        told = {" + ".join(choice): score for choice, score in zip(choices, scores, strict=True)}
        return {"now": now, "scores": told, "dropped": chosen}

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

    def _damages(self, cuts: Sequence[frozenset[str]], what: str, program: Program) -> list[float]:
        return damages(program, self.reference, cuts, self.choice.by, self.context, what)


def _damage(facts: Mapping[str, Any]) -> float:
    """Of what a round chose."""
    return float(facts["scores"][" + ".join(facts["dropped"])])


def _runs(program: Program, free: Sequence[Part], count: int) -> Iterator[tuple[str, ...]]:
    """The names of neighbours, so many at a time, all of which may go.

    Raises: EditError: there is no such run."""
    names, may = [block.name for block in blocks(program)], {part.name for part in free}
    found = [tuple(names[at : at + count]) for at in range(len(names) - count + 1)]
    fitting = [run for run in found if may.issuperset(run) and len({name.rpartition(".")[0] for name in run}) == 1]
    if not fitting:
        raise EditError(f"prune-depth: no {count} neighbouring blocks may all go")
    yield from fitting
