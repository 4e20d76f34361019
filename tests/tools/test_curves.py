"""Curves of training runs as a picture."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from secateur.graph import SecateurError
from secateur.tools.report import Panel, draw_curves

PANELS = [
    Panel("KL", "kl", "nats"),
    Panel("perplexity", "perplexity", "of held-out text", (14.0, "dense")),
]


def run(scale: float) -> list[dict[str, float]]:
    return [
        {"tokens": t, "kl": scale / (1 + t), "perplexity": 20 * scale} for t in range(0, 500, 100)
    ]


def test_seeds_share_a_line_and_measures_lie_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "curves.svg"
    draw_curves(
        {"kl only": [run(1.0), run(1.2)], "ce": [run(2.0)], "short": [run(1.0)[:2], run(1.0)]},
        PANELS,
        file,
    )
    drawn = file.read_text()
    for label in (
        "kl only, mean of 2",
        "ce",
        "short, 2 runs",
        "dense",
        "perplexity",
        "tokens trained on",
    ):
        assert f"<!-- {label} -->" in drawn
    draw_curves({"ce": [run(1.0)]}, PANELS[:1], tmp_path / "one.png", "title")
    width, height = struct.unpack(">II", (tmp_path / "one.png").read_bytes()[16:24])
    assert width > height > 400


def test_a_record_without_a_measure_is_left_out_of_its_panel(tmp_path: Path) -> None:
    part = [{"tokens": 0.0, "perplexity": 3.0}, {"tokens": 1.0, "perplexity": 2.0}]
    draw_curves({"ce": [part]}, PANELS, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().count("<!-- ce -->") == 1


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="no curve"):
        draw_curves({"kl": [[]]}, PANELS, tmp_path / "x.png")
    with pytest.raises(SecateurError, match="a picture ends in"):
        draw_curves({"kl": [run(1.0)]}, PANELS, tmp_path / "x.pdf")
    with pytest.raises(SecateurError, match="cannot be written"):
        draw_curves({"kl": [run(1.0)]}, PANELS, tmp_path / "no" / "x.png")
