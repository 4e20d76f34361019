"""Depth pruning: the residual blocks whose absence damages the model least are dropped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from secateur.graph import Program, blocks, drop
from secateur.graph.errors import EditError
from secateur.passes.base import JSON, Context, Cost, Pass, PassResult, PlannedEdit
from secateur.passes.depth.damage import By
from secateur.passes.depth.rounds import DepthChoice, Level, Method, Rounds, may_go
from secateur.passes.language.options import OptionError

Count = Annotated[int, Field(ge=0)]
Part = Annotated[float, Field(gt=0, lt=1)]
TYPICAL_DEPTH = 32  # for estimates, where a part of the blocks is asked for
FORWARDS: Mapping[Method, float] = {
    "greedy": 16.0,
    "contiguous": 16.0,
    "alone": 16.0,
    "influence": 1.0,
}
SUB_BLOCKS = 4.0  # so many times the forward passes of whole blocks: more to try, in more rounds


@dataclass(frozen=True)
class PruneDepth(Pass):
    """Drop the residual blocks that the model misses least.  Numerics: lossy.

    drop: how many blocks go, or which part of them (0.5, rounded to whole blocks); at
        level=sub-block, as many parameters as so many average blocks hold.
    method: greedy (one after the other; all that are left are measured again after each),
        contiguous (the run of neighbours that is missed least), alone (each measured alone, the
        least go) or influence (one minus the cosine of the stream before and after, in one pass).
    by: what greedy, contiguous and alone measure on the calibration data: kl (to the dense model)
        or perplexity.
    level: block, or sub-block (attention and MLP apart, by damage a parameter; greedy also tries
        both of a layer in one step; no stock class holds the result, see fill-dropped).
    keep_first, keep_last: so many blocks at either end of every stack stay.
    layers: drop these blocks instead, by number, negative from the end; nothing is measured.

    Source:
        Zhong et al. 2024 (BlockPruner), arXiv:2406.10594, section 3 (greedy, perplexity); Sreenivas
        et al. 2024 (Minitron in practice), arXiv:2408.11796, section 2 (contiguous).
    """

    name: ClassVar[str] = "prune-depth"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    gives: ClassVar[frozenset[str]] = frozenset({"cut"})
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})

    drop: Count | Part = 0
    method: Method = "greedy"
    by: By = "kl"
    level: Level = "block"
    keep_first: Count = 0
    keep_last: Count = 0
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.drop) == bool(self.layers):
            raise OptionError(
                "prune-depth: say how many blocks go (drop=4), or which (layers=[20,21])",
                option="drop",
            )
        if self.level == "sub-block" and self.method == "contiguous":
            raise OptionError(
                "prune-depth: contiguous is for whole blocks: choose greedy", option="method"
            )

    @property
    def needs_data(self) -> bool:
        """Whether blocks are measured on calibration data: not where ``layers`` names them."""
        return not self.layers

    @property
    def cost(self) -> Cost:
        """Forward passes of all rounds over the calibration data, for estimates."""
        if self.method == "greedy":
            rounds = self.drop if isinstance(self.drop, int) else self.drop * TYPICAL_DEPTH
        else:
            rounds = 1
        if self.level == "sub-block" and self.method == "greedy":
            finer = SUB_BLOCKS
        else:
            finer = 1.0
        return Cost(0.0 if self.layers else rounds * finer * FORWARDS[self.method])

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run; measuring needs weights, naming the layers does
        not.

        Args:
            program: to be pruned.
        """
        reasons = super().requires(program)
        on_meta = any(p.is_meta for _, p in program.named_parameters())
        if on_meta and not self.layers:
            reasons.append("the weights are on the meta device: open the model with weights")
        return reasons

    def plan(self, program: Program) -> list[PlannedEdit]:
        """One edit: how many blocks stay.

        Args:
            program: to be pruned.

        Raises:
            EditError: too few may go.
        """
        if self.layers:
            count = len(self._resolve_names(program))
        else:
            count = self.count_dropped(program)
        if not self.layers:
            self._check_options(program)
        total = len(blocks(program))
        exact = self.level == "block"
        asked = self.drop if isinstance(self.drop, float) else None
        return [PlannedEdit("layers", "blocks", total, total - count, exact, asked)]

    def count_dropped(self, program: Program) -> int:
        """How many blocks go, one at least where a part is asked for.

        Args:
            program: to be pruned.
        """
        if isinstance(self.drop, int):
            return self.drop
        return max(1, math.floor(self.drop * len(blocks(program)) + 0.5))

    def preview(self, program: Program) -> Program:
        """Without the last blocks that may go.

        Args:
            program: to be pruned.
        """
        return self._drop_from(program, first=False)

    def preview_uneven(self, program: Program) -> Program:
        """Without the first blocks that may go: which go is measured.

        Args:
            program: to be pruned.
        """
        return self._drop_from(program, first=True)

    def _drop_from(self, program: Program, *, first: bool) -> Program:
        """Without the named blocks, or those at one end."""
        if self.layers:
            return drop(program, self._resolve_names(program))
        self._check_options(program)
        rounds = Rounds(self._make_choice(program), program)
        while not rounds.is_finished():
            parts = rounds.list_candidates()
            if first:
                parts = parts[::-1]
            if self.level == "block":
                last = parts[-self.count_dropped(program) :]
            else:
                last = parts[-1:]
            rounds.drop_parts([part.name for part in last])
        return rounds.program

    def call(self, program: Program, context: Context) -> PassResult:
        """Drop the named blocks, or measure and drop round after round.

        Args:
            program: to be pruned.
            context: with calibration data, unless ``layers`` names the blocks.

        Raises:
            EditError: fewer blocks may go than are asked for, or a number names no layer.
        """
        figures: JSON = {"parameters_before": program.num_parameters, "rounds": []}
        if self.layers:
            smaller = drop(program, self._resolve_names(program))
        else:
            self._check_options(program)
            smaller = Rounds(
                self._make_choice(program), program, context, figures["rounds"]
            ).run_rounds()
        assert smaller.cut is not None
        if program.cut:
            before = program.cut.dropped
        else:
            before = ()
        figures["dropped"] = [name for name in smaller.cut.dropped if name not in before]
        return PassResult(
            smaller, modified=True, figures={**figures, "parameters_after": smaller.num_parameters}
        )

    def _make_choice(self, program: Program) -> DepthChoice:
        """The choice of blocks that the options describe."""
        count = self.count_dropped(program)
        return DepthChoice(count, self.method, self.by, self.level, self._end_blocks(program))

    def _end_blocks(self, program: Program) -> frozenset[str]:
        """The names of the blocks at the ends of every stack."""
        blocks_by_end: dict[str, list[str]] = {}
        for block in blocks(program):
            blocks_by_end.setdefault(block.name.rpartition(".")[0], []).append(block.name)
        ends = set[str]()
        for names in blocks_by_end.values():
            ends.update(names[: self.keep_first])
            ends.update(names[len(names) - self.keep_last :])
        return frozenset(ends)

    def _check_options(self, program: Program) -> None:
        """Check that enough blocks may go.

        Raises:
            EditError: fewer may go than are asked for.
        """
        free = may_go(program, self._end_blocks(program))
        total = len(blocks(program))
        count = self.count_dropped(program)
        if count > min(len(free), total - 1):
            locked = []
            for block in blocks(program):
                if block.locked:
                    locked.append(f"{block.name} must stay: {block.locked}")
            raise EditError(
                f"prune-depth: {count} blocks are to go, and {min(len(free), total - 1)} of "
                f"{total} may. " + "; ".join(locked[:3])
            )

    def _resolve_names(self, program: Program) -> list[str]:
        """The names of the blocks that ``layers`` numbers.

        Raises:
            EditError: a number is out of range.
        """
        names = [block.name for block in blocks(program)]
        for index in self.layers:
            if not -len(names) <= index < len(names):
                raise EditError(
                    f"prune-depth: layers names {index}, and the model has 0..{len(names) - 1}"
                )
        return [names[index] for index in self.layers]
