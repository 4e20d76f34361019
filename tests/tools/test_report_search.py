"""The table and the picture of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from secateur.graph import SecateurError
from secateur.tools.report.search import draw_search, pareto_front, search_table

FIGURES: dict[str, Any] = {
    "within": 1200,
    "budget": "parameters",
    "chosen": {"layers": 3, "mlp": 64},
    "candidates": [
        {"shape": {"layers": 4, "mlp": 48}, "cost": 900.0, "kl": 0.5, "stderr": 0.01},
        {
            "shape": {"layers": 3, "mlp": 64},
            "cost": 800.0,
            "kl": 0.6,
            "stderr": 0.01,
            "kl_distilled": 0.2,
        },
        {"shape": {"layers": 2, "mlp": 96}, "cost": 700.0, "kl": 0.9, "stderr": 0.02},
    ],
}


def test_the_front_is_what_no_cheaper_candidate_beats() -> None:
    assert [row["cost"] for row in pareto_front(FIGURES)] == [700.0, 800.0], (
        "the dearest is beaten after distillation"
    )


def test_the_table_says_which_was_chosen() -> None:
    console = Console(width=140, record=True, file=None)
    with console.capture() as captured:
        console.print(search_table(FIGURES))
    lines = [line for line in captured.get().splitlines() if "layers" in line]
    assert "layers 3, mlp 64" in lines[0] and "chosen" in lines[0] and "0.2000" in lines[0]
    assert sum("chosen" in line for line in lines) == 1
    assert "3 of 1,200 shapes" in captured.get()


def test_the_picture_is_written(tmp_path: Path) -> None:
    draw_search(FIGURES, tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SecateurError, match=r"ends in \.png or \.svg"):
        draw_search(FIGURES, tmp_path / "search.pdf")
