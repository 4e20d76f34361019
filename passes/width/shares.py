"""Unit counts and unit choice: the arithmetic of width pruning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from secateur.graph import CoupledGroup, Program
from secateur.graph.errors import EditError
from secateur.passes.base import PlannedEdit
from secateur.passes.importance.base import Normalization, distinct_members, normalize_scores

HEADS = ("kv_heads", "query_heads")
ALIGNMENT = 8


def check_amount(value: object) -> object:
    """A fraction removed (float, 0 <= x < 1) or a number of units kept (int >= 1), as given.

    Args:
        value: of an option.

    Raises:
        ValueError: neither.
    """
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        if value is None:
            return value
        raise ValueError(
            f"expected a fraction removed (0.25) or a number of units kept (1152), found {value!r}"
        )
    if isinstance(value, int) and value < 1:
        raise ValueError(
            "keeps no unit: a number of units kept must be at least 1 (0.0 removes nothing)"
        )
    if isinstance(value, float) and not 0 <= value < 1:
        raise ValueError(
            "a fraction removed must be at least 0 and below 1; for a number of units kept write a "
            "whole number"
        )
    return value


def count_kept(name: str, units: int, amount: float | int, multiple: int) -> int:
    """How many of ``units`` stay.  A fraction is rounded to the nearest multiple, half up, and
    never above ``units``.

    Args:
        name: of the group, for messages.
        units: of the group.
        amount: fraction removed (float) or number of units kept (int).
        multiple: that fractions are rounded to.

    Returns:
        number of units kept.

    Raises:
        EditError: no unit would stay, or the number is above ``units`` or not a multiple.
    """
    if isinstance(amount, int):
        if amount > units:
            raise EditError(
                f"prune-width: {name} has {units} units, fewer than the {amount} to be kept"
            )
        if amount % multiple and amount != units:
            raise EditError(
                f"prune-width: {amount} units kept of {name} is not a multiple of "
                f"{multiple} (round_to)"
            )
        return amount
    count = min(units, multiple * math.floor((1 - amount) * units / multiple + 0.5))
    if count < 1:
        what = f"removing {amount:g} of its {units} units" + (
            f", in multiples of {multiple}," if multiple > 1 else ""
        )
        raise EditError(f"prune-width: {name} would be empty: {what} keeps none; ask for less")
    return count


def place_of(group: CoupledGroup) -> str:
    """The module that a group stands in.

    Args:
        group: of a layer.
    """
    return group.name.partition("@")[2]


def heads_multiple(groups: Iterable[CoupledGroup], edits: Mapping[str, PlannedEdit]) -> int:
    """The multiple that ``round_to={hidden=heads}`` means.

    Args:
        groups: of the Program.
        edits: planned so far, by name of the group.

    Returns:
        least common multiple of 8 and of the attention heads that stay in each layer (key/value
        heads times the query heads of each).
    """
    heads = dict[str, int]()
    for group in groups:
        if group.family in HEADS and group.block:
            kept = edits[group.name].kept if group.name in edits else group.units
            heads[place_of(group)] = heads.get(place_of(group), 1) * kept
    return math.lcm(ALIGNMENT, *heads.values())


def uneven_counts(edits: Sequence[PlannedEdit], multiples: Sequence[int]) -> dict[str, int]:
    """Counts that a shared ranking may lead to: the average ones, but one group keeps a multiple
    more and another a multiple less; the average ones where no group can.

    Args:
        edits: that share a ranking, each with the average count.
        multiples: of each one's counts; a group keeps one multiple at least.

    Returns:
        units kept by group name.
    """
    counts = {edit.group: edit.kept for edit in edits}
    pairs = list(zip(edits, multiples, strict=True))
    for fewer, less in pairs:
        for more, extra in pairs:
            grows = more.kept + extra <= more.units
            if fewer.group != more.group and fewer.kept - less >= less and grows:
                counts[fewer.group] -= less
                counts[more.group] += extra
                return counts
    return counts


def top_units(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores, ascending; the lower index wins a tie.

    Args:
        scores: [units]; or [units, coordinates], each column a ranking of its own.
        count: of units that stay.

    Returns:
        [count], or [count, coordinates].
    """
    order = torch.sort(scores, dim=0, descending=True, stable=True).indices
    return order[:count].sort(0).values


def select_units(program: Program, group: str, count: int) -> Tensor:
    """The ``count`` units of a group with the highest scores of a Program, as ``top_units`` gives
    them.

    Args:
        program: with scores.
        group: by name.
        count: of units that stay.

    Returns:
        unit indices [count] or [count, coordinates], ascending.

    Raises:
        EditError: the group has no scores, or some units should go and all have the same score.
    """
    if group not in program.scores:
        raise EditError(
            f"{group} has no scores: the metric of score{{...}} cannot see it; choose another"
        )
    scores = program.scores[group]
    if 0 < count < len(scores) and bool((scores == scores.flatten()[0]).all()):
        raise EditError(
            f"{_metric(program)} gives all {scores.numel()} scores of {group} the same value "
            f"({float(scores.flatten()[0]):g}), which says nothing about the {count} of "
            f"{len(scores)} units to keep: "
            "choose another metric, aggregate or normalize"
        )
    return top_units(scores, count)


def _metric(program: Program) -> str:
    """The metric of the scores that a Program has, in words."""
    metric = None
    for step in program.history:
        if step.name == "score":
            metric = step.options.get("metric")
    if metric is None:
        return "the metric"
    if isinstance(metric, Mapping):
        name = next(iter(metric))
    else:
        name = metric
    return f"score{{metric={name}}}"


def unit_values(scores: Tensor) -> Tensor:
    """[units] scores as they are; of [units, coordinates], what a unit brings that goes at every
    coordinate: the sum over the rankings of their best, second best, ...

    Args:
        scores: [units] or [units, coordinates].

    Returns:
        [units].
    """
    if scores.dim() == 1:
        return scores
    return scores.sort(0, descending=True).values.sum(1)


def global_counts(
    scores: Mapping[str, Tensor],
    budget: int,
    multiple: int | Mapping[str, int],
    how: Normalization,
    costs: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Units kept by each group when all compete in one ranking.

    Each group keeps at least ``multiple`` units (or all it has); the rest of the budget goes to the
    highest normalised scores; counts are then rounded to the nearest multiple, so the sum may miss
    the budget by half a multiple a group.

    Args:
        scores: [units] or [units, coordinates] by group name.
        budget: what all that stays may cost together.
        multiple: for all groups, or by group.
        how: scale on which groups compete.
        costs: of one unit, by group; 1 unless given.

    Returns:
        units kept by group name.

    Raises:
        EditError: scores that cannot be brought to the scale asked for.
    """
    names = sorted(scores)
    for name in names:
        _check_scale(name, scores[name], how)
    multiples = []
    for name in names:
        multiples.append(multiple if isinstance(multiple, int) else multiple[name])
    price = [1 if costs is None else costs[name] for name in names]
    ordered = []
    for name in names:
        ordered.append(
            normalize_scores(unit_values(scores[name]), how)
            .sort(descending=True, stable=True)
            .values
        )
    floors = []
    for least, values in zip(multiples, ordered, strict=True):
        floors.append(min(least, len(values)))
    rest = torch.cat([values[floor:] for values, floor in zip(ordered, floors, strict=True)])
    owners = []
    for group, (values, floor) in enumerate(zip(ordered, floors, strict=True)):
        owners.append(torch.full((len(values) - floor,), group))
    owner = torch.cat(owners)
    owner = owner[torch.sort(rest, descending=True, stable=True).indices]
    spent = torch.tensor(price)[owner].cumsum(0) + sum(
        p * floor for p, floor in zip(price, floors, strict=True)
    )
    won = torch.bincount(owner[spent <= budget], minlength=len(names)).tolist()
    counts: dict[str, int] = {}
    for name, values, floor, extra, least in zip(
        names, ordered, floors, won, multiples, strict=True
    ):
        counts[name] = min(
            len(values), max(floor, least * math.floor((floor + extra) / least + 0.5))
        )
    return counts


def _check_scale(name: str, scores: Tensor, how: Normalization) -> None:
    """Raises:
    EditError: dividing scores by their sum or mean would turn their order around, or blow it
        up.
    """
    total = float(scores.double().sum())
    size = float(scores.double().abs().sum())
    if how in ("sum", "mean") and size > 0 and total <= 1e-3 * size:
        raise EditError(
            f"prune-width: some scores of {name} are below zero and all add up to {total:.3g}, so "
            f"that normalize={how} "
            "says nothing: use normalize=none (scores that are standardised already), standard "
            "or max"
        )


def unit_cost(group: CoupledGroup, shapes: Mapping[str, Sequence[int]]) -> int:
    """Parameters that go with one unit of a group.  shapes: by parameter name.

    Args:
        group: whose unit is counted.
        shapes: of the parameters, by name.

    Returns:
        number of parameters.
    """
    sizes = {}
    for m in group.members:
        sizes[m.parameter] = math.prod(shapes[m.parameter])
    return sum(
        sizes[m.parameter] // shapes[m.parameter][m.dim] * m.positions.shape[1]
        for m in distinct_members(group)
    )
