"""The arithmetic of width pruning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.graph import Program, Step
from secateur.graph.errors import EditError
from secateur.passes.width.shares import count_kept, global_counts, select_units, top_units


@pytest.mark.parametrize(
    ("units", "amount", "multiple", "kept"),
    [
        (96, 0.25, 1, 72),
        (96, 0.0, 1, 96),
        (96, 0.25, 64, 64),
        (1536, 0.25, 64, 1152),
        (1536, 0.3, 64, 1088),
        (100, 0.1, 64, 64),
        (100, 0.01, 64, 100),
        (3, 0.33, 1, 2),
        (3, 0.5, 1, 2),
        (2, 0.25, 1, 2),
        (96, 64, 64, 64),
        (100, 100, 64, 100),
        (96, 1, 1, 1),
    ],
)
def test_kept_count(units: int, amount: float | int, multiple: int, kept: int) -> None:
    assert count_kept("g", units, amount, multiple) == kept


@pytest.mark.parametrize(
    ("units", "amount", "multiple", "says"),
    [
        (3, 0.9, 1, "g would be empty: removing 0.9 of its 3 units keeps none"),
        (96, 0.9, 64, "in multiples of 64, keeps none"),
        (96, 97, 1, "has 96 units, fewer than the 97"),
        (96, 50, 32, "not a multiple of 32"),
    ],
)
def test_impossible_counts_are_refused(
    units: int, amount: float | int, multiple: int, says: str
) -> None:
    with pytest.raises(EditError, match=says):
        count_kept("g", units, amount, multiple)


@given(
    st.integers(1, 5000),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1, 8, 32, 64, 128, 256]),
)
def test_a_fraction_is_met_to_half_a_multiple(units: int, ratio: float, multiple: int) -> None:
    try:
        kept = count_kept("g", units, ratio, multiple)
    except EditError:
        assert (1 - ratio) * units < multiple / 2
        return
    assert 1 <= kept <= units
    assert kept % multiple == 0 or kept == units
    assert abs(kept - (1 - ratio) * units) <= multiple / 2 + 1e-6 or kept == units


def test_top_units_are_in_order_and_ties_go_to_the_lower_index() -> None:
    assert top_units(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert top_units(torch.zeros(5), 2).tolist() == [0, 1]


def test_global_ranking_takes_from_the_group_that_matters_less() -> None:
    scores = {"a": torch.tensor([4.0, 4.0, 4.0, 4.0]), "b": torch.tensor([1.0, 1.0, 1.0, 5.0])}
    assert global_counts(scores, 5, 1, "none") == {"a": 4, "b": 1}
    assert global_counts(scores, 8, 1, "none") == {"a": 4, "b": 4}
    assert global_counts(scores, 4, 1, "mean") == {"a": 3, "b": 1}
    assert global_counts(scores, 2, 2, "none") == {"a": 2, "b": 2}


def test_units_of_other_cost_share_one_budget() -> None:
    scores = {"dear": torch.tensor([5.0, 2.0]), "cheap": torch.tensor([4.0, 3.0, 1.0])}
    costs = {"dear": 10, "cheap": 1}
    assert global_counts(scores, 23, 1, "none", costs) == {"dear": 2, "cheap": 3}
    assert global_counts(scores, 22, 1, "none", costs) == {"dear": 2, "cheap": 2}
    assert global_counts(scores, 12, 1, "none", costs) == {"dear": 1, "cheap": 2}
    assert global_counts(scores, 13, {"dear": 1, "cheap": 3}, "none", costs) == {
        "dear": 1,
        "cheap": 3,
    }


@given(
    st.dictionaries(st.text("abc", min_size=1), st.integers(1, 40), min_size=1, max_size=5),
    st.sampled_from([1, 4, 8]),
    st.floats(0.1, 1),
    st.integers(0, 99),
)
def test_global_counts_stay_in_range_and_near_the_budget(
    sizes: dict[str, int], multiple: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    budget = int(share * sum(sizes.values()))
    counts = global_counts(scores, budget, multiple, "mean")
    floors = {name: min(multiple, size) for name, size in sizes.items()}
    assert all(floors[name] <= count <= sizes[name] for name, count in counts.items())
    wanted = max(budget, sum(floors.values()))
    assert abs(sum(counts.values()) - wanted) <= multiple / 2 * len(sizes)
    if multiple == 1:
        assert sum(counts.values()) == wanted


@pytest.mark.parametrize("scores", [torch.zeros(5), torch.full((4, 3), 2.5)])
def test_equal_scores_choose_nothing(llama: Program, scores: Tensor) -> None:
    step = Step("score", {"metric": {"dull": {}}})
    program = llama.replace(scores={"group": scores}, history=(step,))
    with pytest.raises(
        EditError, match=r"score\{metric=dull\} gives all \d+ scores of group the same value"
    ):
        select_units(program, "group", 2)
    assert len(select_units(program, "group", len(scores))) == len(scores)
    ties = torch.tensor([1.0, 1.0, 0.0])
    assert select_units(llama.replace(scores={"group": ties}), "group", 1).tolist() == [0]
    with pytest.raises(EditError, match="has no scores"):
        select_units(llama, "group", 1)
