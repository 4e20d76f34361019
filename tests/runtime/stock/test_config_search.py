"""Shapes alone lead back to a configuration, for architectures that the code does not know by
name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from runtime_models import GPT2, SMALL, tiny
from torch import fx, nn
from transformers import PreTrainedModel

from secateur.graph.program import Program, Source
from secateur.runtime.open.classes import build_on_meta
from secateur.runtime.stock.config_search import UnsupportedConfigError, plan_config

Shapes = dict[str, tuple[int, ...]]
MHA = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
LATENT = {
    "num_key_value_heads": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
T5 = {"d_model": 64, "d_ff": 96, "d_kv": 8, "num_layers": 2, "num_heads": 8, "vocab_size": 96}
OPT = MHA | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64}


def program_of(model: PreTrainedModel) -> Program:
    """A program without a graph: a plan needs shapes only."""
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    return Program(gm=gm, source=Source(model=model, example_inputs={}, config=model.config))


def shapes_of(model: PreTrainedModel) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


CASES = [
    (
        "LlamaConfig",
        SMALL,
        {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 8,
        },
    ),
    ("LlamaConfig", SMALL, {"num_attention_heads": 4}),
    ("LlamaConfig", SMALL, {"vocab_size": 80, "head_dim": 8}),
    ("Qwen2Config", SMALL, {"hidden_size": 48, "head_dim": 8}),
    (
        "Qwen3Config",
        SMALL | {"head_dim": 16},
        {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    (
        "MixtralConfig",
        SMALL | {"num_local_experts": 4},
        {"num_local_experts": 3, "intermediate_size": 64},
    ),
    ("GPT2Config", GPT2, {"n_inner": 200}),
    ("GPT2Config", GPT2, {"n_embd": 48, "n_inner": 256, "n_positions": 32}),
    ("OPTConfig", OPT, {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 80}),
    ("FalconConfig", MHA | {"multi_query": True}, {"hidden_size": 48, "num_attention_heads": 6}),
    ("Phi3Config", SMALL, {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}),
    (
        "DeepseekV3Config",
        SMALL | LATENT,
        {
            "kv_lora_rank": 16,
            "q_lora_rank": 20,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "moe_intermediate_size": 24,
        },
    ),
    ("BertConfig", MHA, {"intermediate_size": 80}),
    ("T5Config", T5, {"d_model": 48, "num_heads": 6, "d_ff": 64}),
    (
        "ViTConfig",
        MHA | {"image_size": 32, "patch_size": 8},
        {"hidden_size": 48, "intermediate_size": 80},
    ),
]
CLASSES = {
    "T5Config": "T5ForConditionalGeneration",
    "ViTConfig": "ViTForImageClassification",
    "BertConfig": "BertModel",
}


@pytest.mark.parametrize(("config", "fields", "change"), CASES)
def test_finds_a_configuration_from_shapes(
    config: str, fields: dict[str, Any], change: dict[str, Any]
) -> None:
    model = tiny(config, CLASSES.get(config), meta=True, **fields)
    target = shapes_of(tiny(config, CLASSES.get(config), meta=True, **fields | change))
    plan = plan_config(program_of(model), target)
    assert shapes_of(build_on_meta(plan.cls, plan.config)) == target
    assert plan.changes


def test_prefers_the_configuration_that_changes_no_derived_constant() -> None:
    """The shapes of fewer heads and of smaller heads are the same; the scale of attention tells
    them apart."""
    target = shapes_of(tiny("GPT2Config", meta=True, **GPT2 | {"n_embd": 48, "n_inner": 256}))
    plan = plan_config(program_of(tiny("GPT2Config", meta=True, **GPT2)), target)
    assert (
        plan.changes == {"n_inner": (None, 256), "n_embd": (64, 48), "n_head": (8, 6)}
        and not plan.constants
    )


def test_names_constants_that_would_change() -> None:
    fields = SMALL | {"head_dim": 8}
    target = shapes_of(tiny("Gemma2Config", meta=True, **fields | {"hidden_size": 48}))
    plan = plan_config(program_of(tiny("Gemma2Config", meta=True, **fields)), target)
    assert plan.constants["model.embed_tokens.scalar_embed_scale"] == "8 -> 6.9282"


def test_says_what_changes(llama: PreTrainedModel) -> None:
    target = shapes_of(
        tiny("LlamaConfig", meta=True, **SMALL | {"num_attention_heads": 4, "head_dim": 8})
    )
    plan = plan_config(program_of(llama), target)
    assert plan.changes == {"num_attention_heads": (8, 4)}
    assert plan.config.head_dim == 8 and llama.config.num_attention_heads == 8


def test_nothing_to_change(llama: PreTrainedModel) -> None:
    assert plan_config(program_of(llama), shapes_of(llama)).changes == {}


def test_ties_may_come_under_either_name() -> None:
    model = tiny("LlamaConfig", meta=True, **SMALL | {"tie_word_embeddings": True})
    target = shapes_of(model)
    target["lm_head.weight"] = target.pop("model.embed_tokens.weight")
    assert plan_config(program_of(model), target).changes == {}


def test_dropped_layers_are_renumbered_with_their_lists() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    fields = SMALL | {"num_hidden_layers": 4, "layer_types": kinds, "head_dim": 8}
    model = tiny("Gemma3TextConfig", meta=True, **fields)
    target = {name: shape for name, shape in shapes_of(model).items() if ".layers.0." not in name}
    plan = plan_config(program_of(model), target)
    assert plan.changes == {"num_hidden_layers": (4, 3)}
    assert plan.config.layer_types == kinds[1:]
    assert plan.names["model.layers.3.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    assert shapes_of(build_on_meta(plan.cls, plan.config)).keys() <= set(plan.names.values())


def narrow_one_layer(shapes: Shapes) -> None:
    for name, shape in {"gate_proj": (80, 64), "up_proj": (80, 64), "down_proj": (64, 80)}.items():
        shapes[f"model.layers.1.mlp.{name}.weight"] = shape


def fewer_heads(shapes: Shapes) -> None:
    for layer in (0, 1):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (48, 64)
        shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] = (64, 48)


def half_tied_width(shapes: Shapes) -> None:
    shapes["lm_head.weight"] = (96, 48)


def unknown_parameter(shapes: Shapes) -> None:
    shapes["model.extra.weight"] = (3, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            narrow_one_layer,
            r"layers differ in model\.layers\.\*\.mlp\.gate_proj\.weight.*one shape for all layers",
        ),
        (fewer_heads, r"refuses num_attention_heads = 6: .*hidden size \(64\) is not a multiple"),
        (
            half_tied_width,
            r"hidden_size sets dim 1 of lm_head\.weight together with model\.embed_tokens",
        ),
        (unknown_parameter, r"model\.extra\.weight needs \[3, 3\].*no such parameter"),
    ],
)
def test_misfit_says_what_would_fit(
    llama: PreTrainedModel, change: Callable[[Shapes], None], words: str
) -> None:
    shapes = shapes_of(llama)
    change(shapes)
    with pytest.raises(UnsupportedConfigError, match=words):
        plan_config(program_of(llama), shapes)


def test_heads_that_belong_to_the_width() -> None:
    model = tiny("GPT2Config", meta=True, **GPT2)
    shapes = shapes_of(model)
    for layer in (0, 1):
        place = f"transformer.h.{layer}.attn"
        shapes |= {f"{place}.c_attn.weight": (64, 144), f"{place}.c_attn.bias": (144,)}
        shapes |= {f"{place}.c_proj.weight": (48, 64)}
    with pytest.raises(
        UnsupportedConfigError,
        match=r"n_embd sets dim 0 of .*c_attn.*together with .*in the same proportion",
    ):
        plan_config(program_of(model), shapes)


def test_plain_module_has_no_configuration() -> None:
    program = Program(
        gm=fx.GraphModule(nn.Module(), fx.Graph()), source=Source(nn.Linear(2, 2), {"input": None})
    )
    with pytest.raises(UnsupportedConfigError, match="save_weights"):
        plan_config(program)


def test_source_stays_as_it_was(llama: PreTrainedModel) -> None:
    before, weights = llama.config.to_dict(), {n: p.clone() for n, p in llama.named_parameters()}
    target = shapes_of(tiny("LlamaConfig", meta=True, **SMALL | {"intermediate_size": 64}))
    plan_config(program_of(llama), target)
    assert llama.config.to_dict() == before
    assert all(torch.equal(p, weights[n]) for n, p in llama.named_parameters())
