"""Make a model shallower: drop the residual blocks that it misses least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from secateur.graph import Block, Program, blocks, drop
from secateur.graph.errors import EditError
from secateur.passes.base import Context, Cost, Pass, PassResult, PlannedEdit
from secateur.passes.depth_damage import By, Part, damages, influences, part_parameters
from secateur.passes.journal import Journal
from secateur.passes.options import OptionError

Method = Literal["greedy", "contiguous", "alone", "influence"]
Count = Annotated[int, Field(ge=0)]
FORWARDS: Mapping[Method, float] = {"greedy": 16.0, "contiguous": 16.0, "alone": 16.0, "influence": 1.0}


@dataclass(frozen=True)
class PruneDepth(Pass):
    """Drop the residual blocks that the model misses least.  Numerics: lossy.

    drop: how many blocks go; at level=sub-block, as many parameters as so many average blocks hold.
    method: greedy (one after the other; all that are left are measured again after each), contiguous (the run of
        neighbours that is missed least), alone (each measured alone, the least go) or influence (one minus the cosine
        of the stream before and after, in one pass).
    by: what greedy, contiguous and alone measure on the calibration data: kl (to the dense model) or perplexity.
    level: block, or sub-block (attention and MLP apart, by damage a parameter; no stock class holds the result, see
        fill-dropped).
    keep_first, keep_last: so many blocks at either end of every stack stay.
    layers: drop these blocks instead, by number, negative from the end; nothing is measured.
    Source: Zhong et al. 2024 (BlockPruner), arXiv:2406.10594, section 3 (greedy, perplexity); Sreenivas et al. 2024
        (Minitron in practice), arXiv:2408.11796, section 2 (contiguous).
    """

    name: ClassVar[str] = "prune-depth"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    gives: ClassVar[frozenset[str]] = frozenset({"cut"})
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})

    drop: Count = 0
    method: Method = "greedy"
    by: By = "kl"
    level: Literal["block", "sub-block"] = "block"
    keep_first: Count = 0
    keep_last: Count = 0
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.drop) == bool(self.layers):
            raise OptionError("prune-depth: say how many blocks go (drop=4), or which (layers=[20,21])", option="drop")
        if self.level == "sub-block" and self.method == "contiguous":
            raise OptionError("prune-depth: contiguous is for whole blocks: choose greedy", option="method")

    @property
    def needs_data(self) -> bool:
        return not self.layers

    @property
    def cost(self) -> Cost:
        rounds = self.drop if self.method == "greedy" else 1
        return Cost(0.0 if self.layers else rounds * FORWARDS[self.method])

    def requires(self, program: Program) -> list[str]:
        on_meta = any(p.is_meta for _, p in program.named_parameters()) and not self.layers
        return super().requires(program) + ["the weights are on the meta device: open the model with weights"] * on_meta

    def plan(self, program: Program) -> list[PlannedEdit]:
        """One edit: how many blocks stay.  Raises: EditError: too few may go."""
        count = len(self._named(program)) if self.layers else self.drop
        if not self.layers:
            self._check(program)
        total = len(blocks(program))
        return [PlannedEdit("layers", "blocks", total, total - count, exact=self.level == "block")]

    def preview(self, program: Program) -> Program:
        """Without the last blocks that may go."""
        if self.layers:
            return drop(program, self._named(program))
        self._check(program)
        rounds = _Rounds(self, program)
        while not rounds.done():
            parts = rounds.candidates()
            rounds.drop([part.name for part in (parts[-self.drop :] if self.level == "block" else parts[-1:])])
        return rounds.program

    def call(self, program: Program, context: Context) -> PassResult:
        figures: dict[str, Any] = {"parameters_before": program.num_parameters, "rounds": []}
        if self.layers:
            smaller = drop(program, self._named(program))
        else:
            self._check(program)
            smaller = _Rounds(self, program, context, figures["rounds"]).run()
        assert smaller.cut is not None
        before = program.cut.dropped if program.cut else ()
        figures["dropped"] = [name for name in smaller.cut.dropped if name not in before]
        return PassResult(smaller, modified=True, figures={**figures, "parameters_after": smaller.num_parameters})

    def may_go(self, program: Program, ends: frozenset[str]) -> list[Block]:
        """The blocks that are neither locked nor at the ends."""
        return [block for block in blocks(program) if block.locked is None and block.name not in ends]

    def ends_of(self, program: Program) -> frozenset[str]:
        """The names of the blocks at the ends of every stack."""
        found: dict[str, list[str]] = {}
        for block in blocks(program):
            found.setdefault(block.name.rpartition(".")[0], []).append(block.name)
        first = {name for names in found.values() for name in names[: self.keep_first]}
        return frozenset(first.union(*(names[len(names) - self.keep_last :] for names in found.values())))

    def _check(self, program: Program) -> None:
        free, total = self.may_go(program, self.ends_of(program)), len(blocks(program))
        if self.drop > min(len(free), total - 1):
            locked = [f"{block.name} must stay: {block.locked}" for block in blocks(program) if block.locked]
            raise EditError(
                f"prune-depth: {self.drop} blocks are to go, and {min(len(free), total - 1)} of {total} may. "
                + "; ".join(locked[:3])
            )

    def _named(self, program: Program) -> list[str]:
        names = [block.name for block in blocks(program)]
        for index in self.layers:
            if not -len(names) <= index < len(names):
                raise EditError(f"prune-depth: layers names {index}, and the model has 0..{len(names) - 1}")
        return [names[index] for index in self.layers]


class _Rounds:
    """Measures and drops until enough is gone.

    Finished rounds are kept, so that a run that was killed goes on after the last of them."""

    def __init__(
        self, options: PruneDepth, program: Program, context: Context | None = None, told: list[Any] | None = None
    ) -> None:
        self.options, self.program, self.context = options, program, context or Context()
        self.reference = program.cut.dense if program.cut else program
        self.journal, self.told = Journal(self.context.resume), told if told is not None else []
        self.ends = options.ends_of(program)
        self.start = len(blocks(program))
        sizes = part_parameters(program)
        self.budget = options.drop * sum(sizes[block.name] for block in blocks(program)) / self.start
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
        if self.options.level == "block":
            return self.start - len(blocks(self.program)) >= self.options.drop
        return not self.candidates()

    def drop(self, names: Sequence[str]) -> None:
        self.program = drop(self.program, names)

    def candidates(self) -> list[Part]:
        """What may go next: at level sub-block, what still fits the budget."""
        free: list[Part] = list(self.options.may_go(self.program, self.ends))
        if self.options.level == "block":
            return free
        left = self.budget - (self.full - self.program.num_parameters) + self.slack
        sizes = part_parameters(self.program)
        found = blocks(self.program)
        last = {sub.name for sub in found[0].sub_blocks} if len(found) == 1 and len(found[0].sub_blocks) == 1 else set()
        subs = [sub for b in found if b.name not in self.ends for sub in b.sub_blocks if sub.locked is None]
        return [sub for sub in subs if 0 < sizes[sub.name] <= left and sub.name not in last]

    def _measure(self) -> dict[str, Any]:
        """What each choice would do (the least goes first), what the model does now, and which parts go."""
        parts = self.candidates()
        if self.options.method == "contiguous":
            choices = list(_runs(self.program, parts, self.options.drop))
        else:
            choices = [(part.name,) for part in parts]
        if self.options.method == "influence":
            scores, now = list(influences(self.program, parts, self.context).values()), 0.0
        else:
            now, *scores = self._damages([frozenset(), *map(frozenset, choices)])
        sizes = part_parameters(self.program)
        price = [sum(sizes[name] for name in choice) if self.options.level == "sub-block" else 1 for choice in choices]
        order = sorted(range(len(choices)), key=lambda at: (scores[at] - now) / price[at])
        if self.options.method in ("greedy", "contiguous"):
            chosen = list(choices[order[0]])
        else:
            chosen = self._fitting([choices[at][0] for at in order])
        told = {" + ".join(choice): score for choice, score in zip(choices, scores, strict=True)}
        return {"now": now, "scores": told, "dropped": chosen}

    def _fitting(self, order: Sequence[str]) -> list[str]:
        """The first in order, as many as are to go."""
        if self.options.level == "block":
            return list(order[: self.options.drop])
        sizes, left, found = part_parameters(self.program), self.budget + self.slack, list[str]()
        for name in order:
            if sizes[name] <= left:
                found.append(name)
                left -= sizes[name]
        return found

    def _damages(self, cuts: Sequence[frozenset[str]]) -> list[float]:
        what = f"depth, round {len(self.told) + 1}"
        return damages(self.program, self.reference, cuts, self.options.by, self.context, what)


def _runs(program: Program, free: Sequence[Part], count: int) -> Iterator[tuple[str, ...]]:
    """The names of neighbours, so many at a time, all of which may go.

    Raises: EditError: there is no such run."""
    names, may = [block.name for block in blocks(program)], {part.name for part in free}
    found = [tuple(names[at : at + count]) for at in range(len(names) - count + 1)]
    fitting = [run for run in found if may.issuperset(run) and len({name.rpartition(".")[0] for name in run}) == 1]
    if not fitting:
        raise EditError(f"prune-depth: no {count} neighbouring blocks may all go")
    yield from fitting
