from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.graph.errors import EditError
from secateur.passes.solvers.knapsack import SizeOption, solve_knapsack

numbers = st.floats(0, 100, allow_nan=False)
sizes = st.lists(st.builds(SizeOption, st.integers(1, 9), numbers, numbers), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(menu=st.lists(sizes, min_size=1, max_size=4), part=st.floats(0, 1))
def test_it_is_the_best_of_all_choices(menu: list[list[SizeOption]], part: float) -> None:
    low, high = (sum(pick(size.cost for size in one) for one in menu) for pick in (min, max))
    budget = low + part * (high - low)
    allowed = [
        c for c in itertools.product(*menu) if sum(s.cost for s in c) <= budget * (1 + 1e-12)
    ]
    best = min(sum(s.damage for s in choice) for choice in allowed)
    found = [one[i] for one, i in zip(menu, solve_knapsack(menu, budget), strict=True)]
    assert sum(s.damage for s in found) == pytest.approx(best)
    assert sum(s.cost for s in found) <= budget * (1 + 1e-9)


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(EditError, match=r"cost 3, the budget is 2\.5"):
        solve_knapsack([[SizeOption(1, 1, 0)], [SizeOption(2, 2, 0), SizeOption(4, 4, 0)]], 2.5)


def test_sixty_groups_of_uneven_costs_take_seconds() -> None:
    menu = [
        [SizeOption(k, k * (1 + g % 3) * 1.37, (16 - k) ** 2 * (1 + g % 7)) for k in range(1, 17)]
        for g in range(60)
    ]
    full = sum(one[-1].cost for one in menu)
    found = solve_knapsack(menu, full / 2)
    assert 0.49 * full < sum(one[i].cost for one, i in zip(menu, found, strict=True)) <= full / 2
