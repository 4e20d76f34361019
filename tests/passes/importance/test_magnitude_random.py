"""Scores that need no data, in closed form."""

from __future__ import annotations

import pytest
import torch

from secateur.graph import Program
from secateur.passes import Context, Score
from secateur.passes.importance import Magnitude, Random


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_sums_the_entries_of_all_members(two_layers: Program, p: int) -> None:
    model = two_layers.source.model
    expected = (
        model.up.weight.abs().pow(p).sum(1)
        + model.up.bias.abs().pow(p)
        + model.down.weight.abs().pow(p).sum(0)
    ).detach()
    name = "mlp#2"  # between up and down
    torch.testing.assert_close(Score(Magnitude(p=p))(two_layers).scores[name], expected)
    largest = Score(Magnitude(p=p), aggregate="max")(two_layers).scores[name]
    assert bool((largest < expected).all())


def test_random_depends_on_seed_and_group_alone(llama: Program) -> None:
    first, again, other = (Score(Random())(llama, Context(seed=seed)).scores for seed in (1, 1, 2))
    a, b = "mlp@model.layers.0.mlp", "mlp@model.layers.1.mlp"
    assert first[a].equal(again[a])
    assert not first[a].equal(other[a])
    assert not first[a].equal(first[b])
    assert first[a].shape == (96,)
