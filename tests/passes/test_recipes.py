"""The recipes that have a name: they parse, say what they are for, and plan on a model of shapes
alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo.models import tiny_model

from secateur.graph import Program, capture
from secateur.graph.errors import PipelineError
from secateur.passes import DataSpec, Pipeline, recipes
from secateur.runtime import plan_config

WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 32,
}


@pytest.fixture(scope="module")
def model() -> Program:
    """Twenty layers of a stock class, without weights."""
    with torch.device("meta"):
        return capture(tiny_model("llama", **WIDE, num_hidden_layers=20))


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_each_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    told, text = recipes.describe_recipe(name), recipes.recipe_text(name)
    assert len(told["about"]) > 40 and "arXiv:" in told["source"]
    assert sum(line.lstrip().startswith("#") for line in text.splitlines()) >= 2
    pipeline = Pipeline.from_recipe(name)
    assert isinstance(pipeline.data, DataSpec) and pipeline.data.file is None
    assert (
        pipeline
        == Pipeline.from_recipe(text)
        == Pipeline.from_recipe(Path(recipes.FOLDER / f"{name}.yaml"))
    )


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_each_plans_a_smaller_or_sparse_stock_model(name: str, model: Program) -> None:
    pipeline = Pipeline.from_recipe(name)
    smaller = pipeline.preview(model)
    sparse = any("sparse" in one.gives for one in pipeline.passes)
    assert sparse or smaller.num_parameters < 0.9 * model.num_parameters
    assert plan_config(smaller) is not None
    assert sparse or pipeline.plan(model)


def test_a_name_comes_before_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one-shot-best").write_text("passes: [score]\n")
    monkeypatch.chdir(tmp_path)
    assert len(Pipeline.from_recipe("one-shot-best").passes) > 1
    assert len(Pipeline.from_recipe(Path("one-shot-best")).passes) == 1


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(PipelineError, match="did you mean 'one-shot-best'"):
        recipes.recipe_text("one-shot-bets")
    with pytest.raises(PipelineError, match="`secateur recipes` lists"):
        Pipeline.from_recipe("one-shot-bets")
