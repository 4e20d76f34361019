"""How many units a group keeps, and which: the arithmetic of width pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.graph.errors import EditError
from secateur.passes.importance.base import Normalization, normalize


def check_amount(value: Any) -> Any:
    """A fraction removed (float, 0 <= x < 1) or a number of units kept (int >= 1), as given.

    Raises: ValueError: neither.
    """
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        if value is None:
            return value
        raise ValueError(f"expected a fraction removed (0.25) or a number of units kept (1152), found {value!r}")
    if isinstance(value, int) and value < 1:
        raise ValueError("keeps no unit: a number of units kept must be at least 1 (0.0 removes nothing)")
    if isinstance(value, float) and not 0 <= value < 1:
        raise ValueError(
            "a fraction removed must be at least 0 and below 1; for a number of units kept write a whole number"
        )
    return value


def kept_count(name: str, units: int, amount: float | int, multiple: int) -> int:
    """How many of ``units`` stay.  A fraction is rounded to the nearest multiple, half up, and never above ``units``.

    Args: amount: fraction removed (float) or number of units kept (int).
    Raises: EditError: no unit would stay, or the number is above ``units`` or not a multiple.
    """
    if isinstance(amount, int):
        if amount > units:
            raise EditError(f"prune-width: {name} has {units} units, fewer than the {amount} to be kept")
        if amount % multiple and amount != units:
            raise EditError(f"prune-width: {amount} units kept of {name} is not a multiple of {multiple} (round_to)")
        return amount
    kept = min(units, multiple * math.floor((1 - amount) * units / multiple + 0.5))
    if kept < 1:
        what = f"removing {amount:g} of its {units} units" + (f", in multiples of {multiple}," if multiple > 1 else "")
        raise EditError(f"prune-width: {name} would be empty: {what} keeps none; ask for less")
    return kept


def top_units(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores [units], ascending; the lower index wins a tie."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def global_counts(scores: Mapping[str, Tensor], budget: int, multiple: int, how: Normalization) -> dict[str, int]:
    """Units kept by each group when all compete in one ranking.

    Each group keeps at least ``multiple`` units (or all it has); the rest of the budget goes to the highest normalised
    scores; counts are then rounded to the nearest multiple, so the sum may miss the budget by half a multiple a group.
    """
    names = sorted(scores)
    ordered = [normalize(scores[name], how).sort(descending=True, stable=True).values for name in names]
    floors = [min(multiple, len(values)) for values in ordered]
    rest = torch.cat([values[floor:] for values, floor in zip(ordered, floors, strict=True)])
    owner = torch.cat([torch.full((len(v) - f,), i) for i, (v, f) in enumerate(zip(ordered, floors, strict=True))])
    winners = owner[torch.sort(rest, descending=True, stable=True).indices[: max(0, budget - sum(floors))]]
    won = torch.bincount(winners, minlength=len(names)).tolist()
    return {
        name: min(len(values), max(floor, multiple * math.floor((floor + extra) / multiple + 0.5)))
        for name, values, floor, extra in zip(names, ordered, floors, won, strict=True)
    }
