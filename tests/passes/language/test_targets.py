"""Choosing weights by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.graph import capture
from secateur.passes.language.targets import (
    check_names,
    describe_unmatched,
    matching_names,
    parameter_aliases,
)

NAMES = [
    f"model.layers.{at}.{part}.weight"
    for at in (0, 1, 10)
    for part in ("mlp.up_proj", "self_attn.q_proj")
]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("mlp", 3),
        ("layers.1", 2),
        ("model.layers.10.mlp.up_proj", 1),
        ("model.layers.10.mlp.up_proj.weight", 1),
        ("*_proj", 6),
        ("self_attn.[qk]_proj", 3),
        ("layers.1?.*", 2),
        (r"re:layers\.(0|1)\.mlp", 2),
        ("up", 0),
        ("layers.1.self", 0),
    ],
)
def test_what_a_pattern_means(pattern: str, count: int) -> None:
    assert len(matching_names([pattern], NAMES)) == count


def test_a_pattern_that_means_nothing_is_told_with_the_nearest_name() -> None:
    (fault,) = describe_unmatched(["mlp", "up_porj"], NAMES, "ignore")
    assert fault == "ignore: 'up_porj' matches no weight; did you mean 'up_proj'?"


def test_a_broken_expression_is_refused() -> None:
    with pytest.raises(ValueError, match="no regular expression"):
        check_names(["re:("])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.tokens(ids))


def test_a_tied_weight_answers_to_all_its_names() -> None:
    program = capture(Tied().eval(), {"ids": torch.zeros(1, 3, dtype=torch.int64)})
    assert parameter_aliases(program) == {"tokens.weight": ["tokens.weight", "head.weight"]}
