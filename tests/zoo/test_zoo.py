"""Every named architecture: captured, grouped, every unlocked group cut at once, and the oracle
agrees."""

from __future__ import annotations

import pytest
from zoo.checks import check_all_at_once, compare, expected_families, other_inputs, random_edit
from zoo.models import NAMED, PLAIN, tiny_model

import secateur.graph as graph


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "phi3"])
def test_attention_written_out_is_understood_as_well(kind: str) -> None:
    """The eager form: two products with a softmax between, grouped heads by expand."""
    program = graph.capture(tiny_model(kind, "eager"))
    free = [g for g in graph.coupled_groups(program) if not g.locked]
    difference, _ = compare(program, random_edit(free), other_inputs(program))
    assert difference <= 1e-4
    assert expected_families(kind) <= {g.family for g in free}


@pytest.mark.parametrize("kind", [*NAMED, *PLAIN])
def test_every_unlocked_group_prunes(kind: str) -> None:
    figures = check_all_at_once(kind)
    assert figures.eager == 0, "the graph computes what the module computes, bit for bit"
    assert figures.difference <= 1e-4
    assert figures.moved > 1e-2, "the edit must change the output, or the comparison says nothing"
    assert expected_families(kind) <= figures.families, (
        "a family that should be free is locked or missing"
    )
    assert not figures.conflicts
