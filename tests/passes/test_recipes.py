"""The recipes that have a name: they parse, say what they are for, and plan on a model of shapes
alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)
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
# The shapes of the models that recipes are named after or tried on, without their depth.
SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, int]]] = {
    "LLaMA-2-7B": (LlamaConfig, {"hidden": 4096, "mlp": 11008, "heads": 32, "kv": 32}),
    "Llama-3.1-8B": (LlamaConfig, {"hidden": 4096, "mlp": 14336, "heads": 32, "kv": 8}),
    "SmolLM2-135M": (LlamaConfig, {"hidden": 576, "mlp": 1536, "heads": 9, "kv": 3}),
    "Qwen2.5-0.5B": (Qwen2Config, {"hidden": 896, "mlp": 4864, "heads": 14, "kv": 2}),
    "Gemma3-270M": (Gemma3TextConfig, {"hidden": 640, "mlp": 2048, "heads": 4, "kv": 1}),
}
DEPTHS = {
    "LLaMA-2-7B": 32,
    "Llama-3.1-8B": 32,
    "SmolLM2-135M": 30,
    "Qwen2.5-0.5B": 24,
    "Gemma3-270M": 18,
}
LARGE = {"LLaMA-2-7B", "Llama-3.1-8B"}
# Gemma multiplies its embeddings by the root of the hidden size, which a stock class derives anew:
# a cut of the hidden size cannot be carried over.
SCALED = ("Gemma3-270M", {"llm-pruner-20", "minitron-width"})


def on_shapes(name: str, layers: int) -> Program:
    """A published model's shapes, without weights."""
    kind, sizes = SHAPES[name]
    config = kind(
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["mlp"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv"],
        num_hidden_layers=layers,
        vocab_size=1024,
        tie_word_embeddings=name not in LARGE,
        **({"head_dim": 256} if kind is Gemma3TextConfig else {}),
    )
    with torch.device("meta"):
        return capture(AutoModelForCausalLM.from_config(config))


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


def check_recipes(name: str, program: Program) -> None:
    """Every recipe plans to a stock checkpoint of these shapes, without a doubt."""
    for recipe in recipes.recipe_names():
        plan = plan_config(Pipeline.from_recipe(recipe).preview(program))
        if name == SCALED[0] and recipe in SCALED[1]:
            assert "scalar_embed_scale" in next(iter(plan.constants)), recipe
        else:
            assert not plan.constants, f"{recipe} on {name}"


@pytest.mark.parametrize("name", SHAPES)
def test_each_fits_the_shapes_it_is_for(name: str) -> None:
    program = on_shapes(name, 2)
    check_recipes(name, program)
    pipeline = Pipeline.from_recipe("llm-pruner-20")
    edits = {(edit.family, edit.units, edit.kept) for edit in pipeline.plan(program)}
    heads = {
        "LLaMA-2-7B": ("kv_heads", 32, 26),
        "Llama-3.1-8B": ("kv_heads", 8, 6),
        "SmolLM2-135M": ("kv_heads", 3, 2),
        "Qwen2.5-0.5B": ("kv_heads", 2, 2),
        "Gemma3-270M": ("query_heads", 4, 3),
    }
    assert heads[name] in edits


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_each_fits_at_full_depth(name: str) -> None:
    program = on_shapes(name, DEPTHS[name])
    check_recipes(name, program)
    depth = Pipeline.from_recipe("minitron-depth").plan(program)
    assert depth[0].kept == DEPTHS[name] // 2
