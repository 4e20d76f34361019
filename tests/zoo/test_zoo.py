"""Every named architecture: captured, grouped, every unlocked group cut at once, and the oracle agrees."""

from __future__ import annotations

import pytest
from zoo.checks import check_all_at_once, expected_families
from zoo.models import NAMED, PLAIN


@pytest.mark.parametrize("kind", [*NAMED, *PLAIN])
def test_every_unlocked_group_prunes(kind: str) -> None:
    figures = check_all_at_once(kind)
    assert figures.eager == 0, "the graph computes what the module computes, bit for bit"
    assert figures.difference <= 1e-4
    assert figures.moved > 1e-2, "the edit must change the output, or the comparison says nothing"
    assert expected_families(kind) <= figures.families, "a family that should be free is locked or missing"
    assert not figures.conflicts
