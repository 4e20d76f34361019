"""The plug-in of docs/plugins.md is one that works."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.graph import Program
from secateur.passes import Context, Importance, Score, samples
from secateur.passes.language.plugins import load_class

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"


def test_the_example_scores_what_it_says(
    two_layers: Program, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "plug_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        metric = load_class("plug_of_the_page:Loudest", Importance)(power=2.0)
        found = Score(metric)(two_layers, Context(data=samples([ids], two_layers))).scores["mlp#2"]
    finally:
        sys.modules.pop("plug_of_the_page", None)
    with torch.no_grad():
        hidden = two_layers.source.model.hidden(ids)  # type: ignore[operator]
    torch.testing.assert_close(found, hidden.flatten(0, 1).abs().amax(0).square())
