"""Aggregation over members, normalisation, and sums of the entries of a unit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateur.passes.importance.base import (
    AGGREGATIONS,
    NORMALIZATIONS,
    aggregate_members,
    normalize_scores,
    per_unit,
)

SCORES = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 0.5, 2.0])]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", [5, 2.5, 5]),
        ("mean", [2.5, 1.25, 2.5]),
        ("max", [4, 2, 3]),
        ("prod", [2, 1, 6**0.5]),
        ("last", [4, 0.5, 2]),
    ],
)
def test_aggregations(how: Any, expected: list[float]) -> None:
    torch.testing.assert_close(
        aggregate_members(SCORES, how), torch.tensor(expected, dtype=torch.float32)
    )
    assert set(AGGREGATIONS) == {"sum", "mean", "max", "prod", "last"}


def test_a_product_over_many_members_ranks_and_does_not_vanish() -> None:
    scores = [torch.tensor([2e-9, 1e-9, 3e-9]) for _ in range(300)]
    scores[-1] = torch.tensor([2e-9, 1e-9, 0.0])
    assert aggregate_members(scores, "prod").argsort().tolist() == [2, 1, 0]
    large = [torch.tensor([2e9, 1e9]) for _ in range(300)]
    torch.testing.assert_close(aggregate_members(large, "prod"), torch.tensor([2e9, 1e9]))


def test_a_product_of_negative_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="below zero"):
        aggregate_members([torch.tensor([1.0, -1.0]), torch.tensor([1.0, -2.0])], "prod")
    assert aggregate_members([torch.tensor([1.0, -1.0])], "prod").tolist() == [1, -1]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", [1, 2, 3]),
        ("sum", [1 / 6, 1 / 3, 1 / 2]),
        ("mean", [0.5, 1, 1.5]),
        ("max", [1 / 3, 2 / 3, 1]),
        ("standard", [-(1.5**0.5), 0, 1.5**0.5]),
    ],
)
def test_normalizations(how: Any, expected: list[float]) -> None:
    torch.testing.assert_close(
        normalize_scores(SCORES[0], how), torch.tensor(expected, dtype=torch.float32)
    )


@pytest.mark.parametrize("how", list(NORMALIZATIONS))
def test_normalizing_equal_scores_stays_finite(how: Any) -> None:
    assert torch.isfinite(normalize_scores(torch.zeros(4), how)).all()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_unit_sums_its_positions(dim: int) -> None:
    salience = torch.rand(4, 6, 8)
    positions = torch.tensor([[0, 2], [1, 3]])
    member = SimpleNamespace(dim=dim, positions=positions)
    expected = torch.stack([salience.index_select(dim, unit).sum() for unit in positions]).double()
    torch.testing.assert_close(per_unit(salience, member), expected)  # type: ignore[arg-type]


def test_a_bias_is_its_own_sum() -> None:
    member = SimpleNamespace(dim=0, positions=torch.tensor([[1], [0]]))
    assert per_unit(torch.tensor([3.0, 5.0]), member).tolist() == [5, 3]  # type: ignore[arg-type]
