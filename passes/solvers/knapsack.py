"""Exact multiple-choice knapsack: one size for each group, by merging Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.graph.errors import EditError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SizeOption:
    """One size that a group may have.  kept: units.
    cost: of the budget.
    damage: what it does, lower is better.
    """

    kept: int
    cost: float
    damage: float


def solve_knapsack(menu: Sequence[Sequence[SizeOption]], budget: float) -> list[int]:
    """The index of one size for each group: the least sum of damages whose costs sum to at most
    ``budget``.

    Group by group, the sums that can be reached are merged, and those that another one beats in
    cost and damage are let go, so that the answer is exact whatever the costs are.  Ties: the lower
    cost, then the earlier size.

    Args:
        menu: sizes of each group.
        budget: in the unit of the costs.

    Raises:
        EditError: even the cheapest sizes cost more than the budget.

    Source:
        multiple-choice knapsack by dominance, Kellerer, Pferschy & Pisinger 2004, section 11.4.
    """
    cheapest = [min(size.cost for size in sizes) for sizes in menu]
    if sum(cheapest) > budget * (1 + 1e-12):
        raise EditError(
            f"the smallest sizes cost {sum(cheapest):g}, the budget is {budget:g}: remove less"
        )
    costs = np.zeros(1)
    damages = np.zeros(1)
    chosen: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    ahead = np.cumsum([0.0, *cheapest[::-1]])[::-1]
    for group, sizes in enumerate(menu):
        cost = (costs[:, None] + np.array([size.cost for size in sizes])).ravel()
        damage = (damages[:, None] + np.array([size.damage for size in sizes])).ravel()
        front = _pareto_front(cost, damage, budget * (1 + 1e-12) - ahead[group + 1])
        costs = cost[front]
        damages = damage[front]
        chosen.append((front // len(sizes), front % len(sizes)))
    best = int(np.argmin(damages))
    picks = list[int]()
    for before, pick in reversed(chosen):
        picks.append(int(pick[best]))
        best = int(before[best])
    return picks[::-1]


def _pareto_front(cost: Floats, damage: Floats, most: float) -> NDArray[np.int64]:
    """Indices of the pairs within ``most`` that no other beats, by rising cost."""
    order = np.lexsort((np.arange(len(cost)), damage, cost))
    order = order[cost[order] <= most]
    sorted_damage = damage[order]
    lowest = np.minimum.accumulate(np.concatenate([[np.inf], sorted_damage[:-1]]))
    return order[sorted_damage < lowest]
