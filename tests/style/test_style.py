"""The limits of density and names that the sources have reached, so that they only get better.

The goals stand beside the limits; ``python -P tests/style/metrics.py`` prints where each folder is.
"""

from __future__ import annotations

import pytest
from style.metrics import FOLDERS, is_bare_word, measure_folders, measure_source

# measure: (limit that holds today, goal)
LIMITS: dict[str, tuple[float, float]] = {
    "bare function names, %": (1.5, 1.5),
    "one-word function names, %": (40.0, 40.0),
    "vague local names, %": (1.8, 0.5),
    "ternaries / 1000 lines": (8.0, 8.0),
    "comprehensions / 1000 lines": (25.0, 25.0),
    "parallel assignments / 1000 lines": (1.5, 1.5),
    "syntax nodes / line": (7.5, 7.0),
    "lines over 100 columns, %": (0.0, 0.0),
    "annotations that hold Any, %": (4.5, 3.0),
}
DOCUMENTED = (90.0, 100.0)
# Folders that have reached every goal; they keep them one by one.
REACHED = ("passes", "runtime", "tools")


def test_the_sources_keep_the_limits() -> None:
    metrics = measure_folders()
    assert metrics.files > 200
    ratios = metrics.ratios()
    above = {m: ratios[m] for m, (limit, _) in LIMITS.items() if round(ratios[m], 1) > limit}
    assert not above
    assert ratios["public functions documented, %"] >= DOCUMENTED[0]


@pytest.mark.parametrize("folder", REACHED)
def test_a_folder_that_reached_the_goals_keeps_them(folder: str) -> None:
    ratios = measure_folders((folder,)).ratios()
    above = {m: ratios[m] for m, (_, goal) in LIMITS.items() if round(ratios[m], 1) > goal}
    assert not above
    assert ratios["public functions documented, %"] == DOCUMENTED[1]


def test_limits_are_not_below_the_goals() -> None:
    assert all(limit >= goal for limit, goal in LIMITS.values())


def test_every_folder_is_measured() -> None:
    assert all(measure_folders((folder,)).lines > 0 for folder in FOLDERS)


@pytest.mark.parametrize("name", ["told", "kept", "computed_from", "_owned_by", "sparse"])
def test_bare_words(name: str) -> None:
    assert is_bare_word(name)


@pytest.mark.parametrize("name", ["read", "coupled_groups", "embed", "select_mask", "_cut_range"])
def test_verbs_and_noun_phrases(name: str) -> None:
    assert not is_bare_word(name)


def test_what_is_counted() -> None:
    source = """
def told(x: Any, y: int) -> int:
    found, one = x, y
    return [a for a in found] if one else 0
"""
    metrics = measure_source(source)
    assert (metrics.functions, metrics.bare_functions, metrics.documented_functions) == (1, 1, 0)
    assert (metrics.assignments, metrics.vague_assignments) == (2, 2)
    assert (metrics.ternaries, metrics.comprehensions, metrics.parallel_assignments) == (1, 1, 1)
    assert (metrics.annotations, metrics.any_annotations) == (3, 1)
