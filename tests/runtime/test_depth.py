"""Models that lost layers: the stock class has the rest under consecutive numbers, each layer of
the kind it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.models import NAMED, tiny_config, tiny_model

from secateur.graph import Program, blocks, capture, coupled_groups, drop, keep
from secateur.graph.errors import EditError
from secateur.passes.base import Context
from secateur.passes.depth.fill_dropped import FillDropped
from secateur.runtime import UnsupportedConfigError, load, plan_config, save
from secateur.runtime.stock.to_transformers import to_transformers_with_plan

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def deep(kind: str, layers: int = 3, **fields: Any) -> Program:
    known = tiny_config(kind).to_dict()
    return capture(tiny_model(kind, **{name: layers for name in DEPTHS if name in known} | fields))


def without(program: Program, *layers: int) -> Program:
    return drop(program, [blocks(program)[layer].name for layer in layers])


QUICK = ("llama", "gemma2", "gpt_neox", "opt", "deepseek_v3", "bert", "t5")


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in NAMED],
)
def test_a_dropped_layer_leaves_a_stock_model(kind: str) -> None:
    program = deep(kind)
    smaller = without(program, 1)
    raised = to_transformers_with_plan(smaller)
    assert raised.difference == 0
    names = [name for name, _ in raised.model.named_parameters()]
    numbers = {
        int(found[1])
        for name in names
        if (found := re.search(r"\.(\d+)\.", name)) and "decoder" not in name
    }
    assert numbers <= {0, 1}
    parameters = {id(p) for _, p in smaller.named_parameters()}
    assert parameters <= {id(p) for p in raised.model.parameters()}, "one set of weights"


WINDOWS = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
}
PATTERNS: list[tuple[str, dict[str, Any], int, str, Any]] = [
    (
        "gemma3_text",
        WINDOWS,
        0,
        "layer_types",
        ["full_attention", "sliding_attention", "sliding_attention"],
    ),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, 0, "no_rope_layers", [0, 1, 1]),
    ("qwen3_moe", {"mlp_only_layers": [2]}, 1, "mlp_only_layers", [1]),
    ("deepseek_v3", {"first_k_dense_replace": 2}, 1, "first_k_dense_replace", 1),
    ("deepseek_v3", {"first_k_dense_replace": 1}, 0, "first_k_dense_replace", 0),
]


@pytest.mark.parametrize(("kind", "fields", "layer", "field", "expected"), PATTERNS)
def test_lists_and_numbers_over_layers_follow(
    kind: str, fields: dict[str, Any], layer: int, field: str, expected: Any
) -> None:
    raised = to_transformers_with_plan(without(deep(kind, 4, **fields), layer))
    assert raised.difference == 0
    assert getattr(raised.model.config, field) == expected
    assert raised.model.config.num_hidden_layers == 3


BY_NUMBER = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}


def test_a_pattern_that_the_class_derives_from_the_number_of_a_layer_is_refused() -> None:
    scaled = deep("gpt2", 4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(
        UnsupportedConfigError, match=r"from its number.*attn\.scaling.*whole periods"
    ):
        plan_config(without(scaled, 1))
    assert to_transformers_with_plan(without(scaled, 3)).difference == 0, (
        "the last layer breaks no pattern"
    )


@pytest.mark.slow
def test_a_whole_period_of_a_pattern_can_go() -> None:
    mixed = deep("jamba", 4, **BY_NUMBER)
    assert to_transformers_with_plan(without(mixed, 2, 3)).difference == 0
    with pytest.raises(UnsupportedConfigError):
        plan_config(without(mixed, 1))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gemma3_text", WINDOWS),
        ("gpt_neo", {"num_layers": 4, "attention_types": [[["global", "local"], 2]]}),
    ],
)
def test_a_fresh_process_opens_what_is_left(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    program = without(deep(kind, 4, **fields), 1)
    report = save(program, tmp_path / "smaller")
    assert report.reload["difference"] == 0 and report.num_parameters == program.num_parameters
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert 3 in (config.get("num_layers"), config.get("num_hidden_layers"))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(
            load(tmp_path / "smaller")(input_ids=ids).logits, program(input_ids=ids).logits
        )


def narrow(program: Program, kept: int = 64) -> Program:
    return keep(
        program, {g.name: range(kept) for g in coupled_groups(program) if g.family == "mlp"}
    )


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma2", "opt"])
def test_a_dropped_sub_block_fits_no_class_but_comes_back_with_zeros(kind: str) -> None:
    program = deep(kind)
    middle = blocks(program)[1]
    smaller = drop(
        narrow(program), [blocks(program)[2].name, *(sub.name for sub in middle.sub_blocks[:1])]
    )
    with pytest.raises(UnsupportedConfigError, match=r"dropped from layers.*fill-dropped"):
        plan_config(smaller)
    filled = FillDropped()(smaller, Context())
    assert filled.num_parameters > smaller.num_parameters
    assert filled.cut is not None and filled.cut.dropped == (blocks(program)[2].name,)
    raised = to_transformers_with_plan(filled)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.allclose(
            raised.model(input_ids=ids).logits, smaller(input_ids=ids).logits, atol=1e-5
        )


def test_all_sub_blocks_back_leave_the_dense_model_on_record() -> None:
    program = deep("llama")
    filled = FillDropped()(drop(program, ["model.layers.1.mlp"]), Context())
    assert filled.cut is not None and filled.cut.dense is program and filled.cut.dropped == ()
    assert filled.num_parameters == program.num_parameters
    assert not filled.gm.get_parameter("model.layers.1.mlp.down_proj.weight").any()


def test_zeros_do_not_stand_in_for_what_a_norm_follows() -> None:
    program = deep("bert")
    smaller = drop(program, ["bert.encoder.layer.1.attention"])
    with pytest.raises(EditError, match="drop whole blocks"):
        FillDropped()(smaller, Context())


def test_a_plan_of_layers_needs_no_weights() -> None:
    with torch.device("meta"):
        program = capture(tiny_model("llama", num_hidden_layers=4))
    plan = plan_config(without(program, 0, 2))
    assert plan.changes == {"num_hidden_layers": (4, 2)}
    assert plan.names["model.layers.3.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"
    assert "model.layers.0.mlp.up_proj.weight" not in plan.names
