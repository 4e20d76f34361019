"""Width pruning: the best-scored units of chosen coupled groups are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from secateur.graph import FAMILIES, CoupledGroup, Program, coupled_groups, keep
from secateur.graph.errors import EditError
from secateur.passes.base import JSON, Context, Pass, PassResult, PlannedEdit, log
from secateur.passes.importance.base import Normalization
from secateur.passes.language.options import OptionError, did_you_mean
from secateur.passes.width.fold_heads import fold_heads
from secateur.passes.width.shares import (
    check_amount,
    count_kept,
    global_counts,
    heads_multiple,
    place_of,
    select_units,
    uneven_counts,
    unit_cost,
)


def _check_family(name: str) -> str:
    """The name, if it is a family.

    Raises:
        ValueError: it is none.
    """
    if name not in FAMILIES:
        raise ValueError(f"{name!r} is no family of groups; {did_you_mean(name, FAMILIES)}")
    return name


Family = Annotated[str, AfterValidator(_check_family)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float | int, BeforeValidator(check_amount)]
Multiple = Annotated[int, Field(ge=1)]
Rounding = Multiple | Literal["heads"]
WHOLE = ("kv_heads", "query_heads", "experts")


@dataclass(frozen=True)
class PruneWidth(Pass):
    """Keep the best-scored units of coupled groups.  Numerics: lossy.

    ratio: fraction of units removed from every group of the families, 0 <= ratio < 1.
    families: what ratio applies to.
    mlp, kv_heads, ...: the same for one family: a fraction removed (0.25) or a number of units kept
    (1152).
    groups: the same for single groups by name; needs uniform=false unless all groups of a kind get
        one count.
    round_to: units kept are rounded to the nearest multiple; one number (heads and experts always
        stay whole) or a map by family, for example {mlp=256,hidden=64}; hidden=heads rounds to a
        multiple of the attention heads that stay and of 8, as classes want that check one against
        the other ({hidden=0.0,kv_heads=0.2,round_to={hidden=heads}}).
    skip: indices of residual layers to leave alone, negative from the end; needs uniform=false.
    uniform: one shape for all layers, which stock model classes need; with false, layers may
        differ.
    ranking: family (all groups of a family compete in one ranking), global (all groups of all
        families do; what is asked for is then the parameters that go) or local (each group keeps
        its share); uniform=false only.
    normalize: scale on which groups compete in one ranking: none, sum, mean, max or standard.
    fold_heads: the best heads that go move into the least that stay (Minitron's residual
        information).
    """

    name: ClassVar[str] = "prune-width"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    uses: ClassVar[frozenset[str]] = frozenset({"scores"})
    gives: ClassVar[frozenset[str]] = frozenset({"cut"})
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})
    bars: ClassVar[Mapping[str, str]] = {
        "sparse": "weights are sparse along the inputs that would go: put prune-width "
        "before sparsify"
    }

    ratio: Fraction | None = None
    families: tuple[Family, ...] = ("mlp",)
    mlp: Amount | None = None
    kv_heads: Amount | None = None
    query_heads: Amount | None = None
    head_dim: Amount | None = None
    hidden: Amount | None = None
    experts: Amount | None = None
    vocabulary: Amount | None = None
    channels: Amount | None = None
    latent: Amount | None = None
    heads: Amount | None = None
    groups: dict[str, Amount] = field(default_factory=dict, hash=False)
    round_to: Multiple | dict[Family, Rounding] = field(default=1, hash=False)
    skip: tuple[int, ...] = ()
    uniform: bool = True
    ranking: Literal["family", "global", "local"] = "family"
    normalize: Normalization = "mean"
    fold_heads: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.family_amounts and not self.groups and self.heads is None:
            raise OptionError(
                "prune-width: nothing is asked for: give ratio=0.25, a family (mlp=0.25) or "
                "groups={...}"
            )
        if self.skip and self.uniform:
            message = (
                "prune-width: skip makes layers differ, which no stock class holds: add "
                "uniform=false"
            )
            raise OptionError(message, option="skip")

    @property
    def family_amounts(self) -> dict[str, float | int]:
        """What is asked of each family, by name."""
        if self.ratio is None:
            shared = {}
        else:
            shared = dict.fromkeys(self.families, self.ratio)
        amounts = dict[str, float | int](shared)
        for name in FAMILIES:
            amount = getattr(self, name, None)
            if amount is not None:
                amounts[name] = amount
        return amounts

    def family_multiple(self, family: str, heads: int = 1) -> int:
        """The multiple that unit counts of a family are rounded to.

        Args:
            family: name of a family of groups.
            heads: multiple that ``heads`` stands for.
        """
        if isinstance(self.round_to, int):
            if family in WHOLE:
                return 1
            return self.round_to
        multiple = self.round_to.get(family, 1)
        if multiple == "heads":
            return heads
        return multiple

    def plan(self, program: Program) -> list[PlannedEdit]:
        """The edits, one for each group that is asked for; counts of a shared ranking are the
        average ones.

        Args:
            program: to be pruned.

        Raises:
            EditError: unknown or locked group, no group of a family, no unit left, layers would
                differ, ...
        """
        groups = coupled_groups(program)
        asked = {**self._by_family(groups), **self._by_heads(groups), **self._by_name(groups)}
        by_name = {group.name: group for group in groups}
        planned = dict[str, PlannedEdit]()
        heads = 1
        # Families that are rounded to the heads come last: the heads that stay are known then.
        for name in sorted(asked, key=lambda name: self._follows_heads(by_name[name].family)):
            if self._follows_heads(by_name[name].family):
                heads = heads_multiple(groups, planned)
            planned[name] = self._plan_edit(by_name[name], asked[name], heads)
        edits = [planned[name] for name in asked]
        if self.uniform:
            _check_one_shape(edits, groups)
        check_scored(edits, program)
        return _settle_counts(edits, self.ranking)

    def preview(self, program: Program) -> Program:
        """The Program with the first units of each group, as many as the plan keeps.

        Args:
            program: to be pruned.
        """
        return _keep_first(program, {edit.group: edit.kept for edit in self.plan(program)})

    def preview_uneven(self, program: Program) -> Program:
        """The Program with one group larger and one smaller than the plan's average, where a
        ranking may lead to that.

        Args:
            program: to be pruned.
        """
        edits = self.plan(program)
        counts = {edit.group: edit.kept for edit in edits}
        rankings: dict[str, list[PlannedEdit]] = {}
        for edit in edits:
            if not edit.exact:
                together = "all" if self.ranking == "global" else edit.family
                rankings.setdefault(together, []).append(edit)
        for rivals in rankings.values():
            multiples = [self.family_multiple(edit.family) for edit in rivals]
            counts |= uneven_counts(rivals, multiples)
        return _keep_first(program, counts)

    def call(self, program: Program, context: Context) -> PassResult:
        """Keep the best-scored units.

        Args:
            program: with scores.
            context: for its log.

        Raises:
            EditError: a group has no scores, or the plan cannot be carried out.
        """
        edits = self.plan(program)
        counts = self._choose_counts(edits, program)
        cut: dict[CoupledGroup | str, Sequence[int] | Tensor] = {}
        for edit in edits:
            if counts[edit.group] < edit.units:
                cut[edit.group] = select_units(program, edit.group, counts[edit.group])
        if cut:
            smaller = self._cut_program(program, cut, counts)
        else:
            smaller = program
        figures = {
            **_collect_metrics(program, smaller, edits, counts),
            "locked": self._count_locked(program),
        }
        return PassResult(smaller, modified=bool(cut), figures=figures)

    def _cut_program(
        self,
        program: Program,
        cut: Mapping[CoupledGroup | str, Sequence[int] | Tensor],
        counts: Mapping[str, int],
    ) -> Program:
        """The smaller Program; what repair aims at stays the dense one, whatever moved before the
        cut."""
        smaller = keep(fold_heads(program, counts) if self.fold_heads else program, cut)
        assert smaller.cut is not None
        if program.cut is None:
            dense = program
        else:
            dense = program.cut.dense
        return smaller.replace(cut=replace(smaller.cut, dense=dense))

    def _count_locked(self, program: Program) -> dict[str, int]:
        """Why groups of the families asked for were left alone, and how many."""
        groups = []
        for group in coupled_groups(program):
            if group.family in self.family_amounts:
                groups.append(group)
        return dict(Counter(group.locked for group in groups if group.locked is not None))

    def _by_family(self, groups: list[CoupledGroup]) -> dict[str, float | int]:
        """What is asked of each free group by its family.

        Raises:
            EditError: a family has no group, or none that is free.
        """
        skipped = _skipped_layers(groups, self.skip)
        asked = dict[str, float | int]()
        for family, amount in self.family_amounts.items():
            of_family = [group for group in groups if group.family == family]
            if not of_family:
                present = ", ".join(sorted({group.family for group in groups}))
                raise EditError(
                    f"prune-width: the model has no group of family {family!r}; it has: {present}"
                )
            free = []
            for group in of_family:
                if group.locked is None:
                    free.append(group)
                else:
                    log.info("prune-width leaves %s alone: %s", group.name, group.locked)
            if not free:
                reasons = "; ".join(sorted({str(group.locked) for group in of_family}))
                raise EditError(
                    f"prune-width: every group of family {family!r} is locked: {reasons}"
                )
            asked |= {group.name: amount for group in free if group.block not in skipped}
        return asked

    def _by_heads(self, groups: list[CoupledGroup]) -> dict[str, float | int]:
        """What ``heads`` asks of each free group.

        Raises:
            EditError: no layer has heads that may be pruned.
        """
        if self.heads is None:
            return {}
        shared = set()
        for group in groups:
            if group.family == "kv_heads":
                shared.add(place_of(group))
        skipped = _skipped_layers(groups, self.skip)
        asked = dict[str, float | int]()
        for group in groups:
            alone = group.family == "query_heads" and place_of(group) not in shared
            free = group.locked is None and group.block not in skipped
            if free and (group.family == "kv_heads" or alone):
                asked[group.name] = self.heads
        if not asked:
            raise EditError("prune-width: the model has no attention heads that may be pruned")
        return asked

    def _by_name(self, groups: list[CoupledGroup]) -> dict[str, float | int]:
        """What is asked of each group by name.

        Raises:
            EditError: a group is unknown or locked.
        """
        by_name = {group.name: group for group in groups}
        for name in self.groups:
            if name not in by_name:
                raise EditError(
                    f"prune-width: no group is named {name!r}; {did_you_mean(name, by_name)}"
                )
            if by_name[name].locked is not None:
                raise EditError(f"prune-width: {name} must not be pruned: {by_name[name].locked}")
        return dict(self.groups)

    def _follows_heads(self, family: str) -> bool:
        """Whether the counts of a family are rounded to the heads that stay."""
        return isinstance(self.round_to, dict) and self.round_to.get(family) == "heads"

    def _plan_edit(self, group: CoupledGroup, amount: float | int, heads: int) -> PlannedEdit:
        """The edit of one group.

        Args:
            group: to be pruned.
            amount: fraction removed, or number of units kept.
            heads: see ``heads_multiple``.

        Raises:
            EditError: too few units would stay.
        """
        multiple = self.family_multiple(group.family, heads)
        count = count_kept(group.name, group.units, amount, multiple)
        if self._follows_heads(group.family) and isinstance(amount, float):
            count -= count % multiple
        if count < group.min_units:
            message = f"prune-width: {count} of {group.units} units of {group.name} would stay"
            raise EditError(
                f"{message}, but the model needs at least {group.min_units}; ask for less"
            )
        exact = (
            self.uniform
            or self.ranking == "local"
            or isinstance(amount, int)
            or group.name in self.groups
        )
        asked = amount if isinstance(amount, float) else None
        return PlannedEdit(group.name, group.family, group.units, count, exact, asked)

    def _choose_counts(self, edits: list[PlannedEdit], program: Program) -> dict[str, int]:
        """Units kept by group, after the rankings."""
        counts = {edit.group: edit.kept for edit in edits}
        open_ = []
        for edit in edits:
            if not edit.exact:
                open_.append(edit)
        if self.ranking == "global" and open_:
            shapes = {}
            for name, p in program.named_parameters():
                shapes[name] = p.shape
            costs = {}
            for group in coupled_groups(program):
                costs[group.name] = unit_cost(group, shapes)
            return counts | self._rank_jointly(open_, program.scores, costs)
        for family in {edit.family for edit in open_}:
            counts |= self._rank_jointly(
                [edit for edit in open_ if edit.family == family], program.scores, None
            )
        return counts

    def _rank_jointly(
        self,
        edits: list[PlannedEdit],
        scores: Mapping[str, Tensor],
        costs: Mapping[str, int] | None,
    ) -> dict[str, int]:
        """Units kept where these groups compete in one ranking."""
        budget = sum(edit.kept * (1 if costs is None else costs[edit.group]) for edit in edits)
        multiples = {}
        for edit in edits:
            multiples[edit.group] = self.family_multiple(edit.family)
        return global_counts(
            {e.group: scores[e.group] for e in edits}, budget, multiples, self.normalize, costs
        )


def _skipped_layers(groups: Iterable[CoupledGroup], skip: tuple[int, ...]) -> set[str]:
    """Names of the blocks that ``skip`` numbers.

    Raises:
        EditError: a number is out of range.
    """
    blocks = list(dict.fromkeys(group.block for group in groups if group.block))
    for index in skip:
        if not -len(blocks) <= index < len(blocks):
            raise EditError(
                f"prune-width: skip names layer {index}, but the model has layers "
                f"0..{len(blocks) - 1}"
            )
    return {blocks[index] for index in skip}


def _keep_first(program: Program, counts: Mapping[str, int]) -> Program:
    """The Program with the first units of each group."""
    units = {group.name: group.units for group in coupled_groups(program)}
    edit: dict[CoupledGroup | str, Sequence[int] | Tensor] = {}
    for name, count in counts.items():
        if count < units[name]:
            edit[name] = torch.arange(count)
    return keep(program, edit)


def _settle_counts(edits: list[PlannedEdit], ranking: str) -> list[PlannedEdit]:
    """The edits, those exact that compete with no other: their counts are the plan's."""
    rivals = Counter("" if ranking == "global" else edit.family for edit in edits if not edit.exact)
    settled = []
    for edit in edits:
        alone = rivals["" if ranking == "global" else edit.family] == 1
        settled.append(replace(edit, exact=edit.exact or alone))
    return settled


def check_scored(edits: Iterable[PlannedEdit], program: Program) -> None:
    """Every group that loses units has scores, where the Program has any.

    Args:
        edits: planned.
        program: with scores, or with none yet.

    Raises:
        EditError: a group has none.
    """
    for edit in edits:
        chosen = edit.kept < edit.units or not edit.exact
        if chosen and program.scores and edit.group not in program.scores:
            raise EditError(
                f"{edit.group} has no scores: the metric of score{{...}} cannot see it; "
                "choose another"
            )


def _check_one_shape(edits: list[PlannedEdit], groups: list[CoupledGroup]) -> None:
    """Groups of one family and size must end at one size, or no stock class holds the result."""
    counts = {edit.group: edit.kept for edit in edits}
    families = {edit.family for edit in edits}
    shapes: dict[tuple[str, int], dict[int, CoupledGroup]] = {}
    for group in groups:
        if group.family in families and group.block:
            shapes.setdefault((group.family, group.units), {})[
                counts.get(group.name, group.units)
            ] = group
    for (family, units), amounts in shapes.items():
        if len(amounts) > 1:
            pieces = ", ".join(
                _shape_text(group, count) for count, group in sorted(amounts.items())
            )
            message = (
                f"prune-width: groups of family {family!r} with {units} units would "
                f"differ ({pieces})"
            )
            raise EditError(
                f"{message}: no stock class holds that; add uniform=false to do it anyway"
            )


def _shape_text(group: CoupledGroup, count: int) -> str:
    """Size and lock of a group, for messages."""
    return f"{count} in {group.name}" + (f", locked: {group.locked}" if group.locked else "")


def _collect_metrics(
    before: Program, after: Program, edits: list[PlannedEdit], counts: Mapping[str, int]
) -> JSON:
    """Parameters and units before and after, by family."""
    families = Counter(edit.family for edit in edits)
    units = dict[str, list[int]]()
    units_kept = dict[str, list[int]]()
    for edit in edits:
        units.setdefault(edit.family, []).append(edit.units)
        units_kept.setdefault(edit.family, []).append(counts[edit.group])
    return {
        "parameters_before": before.num_parameters,
        "parameters_after": after.num_parameters,
        "families": {
            family: {
                "groups": count,
                "units": sum(units[family]),
                "kept": sum(units_kept[family]),
                "smallest": min(units_kept[family]),
                "largest": max(units_kept[family]),
            }
            for family, count in families.items()
        },
    }
