"""A result's config.json opens wherever its source's did: both spellings, nothing that names code,
and every difference told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import (
    AutoConfig,
    BambaConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
)

from secateur.runtime.save.configuration import compare_configurations, finish_configuration

SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


class Model:
    """What is asked of a stock model: its configuration and its two tables."""

    def __init__(self, config: PretrainedConfig, *, tied: bool = True) -> None:
        self.config = config
        self.table = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def finish(
    folder: Path, original: dict[str, Any], config: PretrainedConfig, **options: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the file as it was written in the end, what was told) for a result with this configuration
    of a source with that file."""
    source = folder / "source"
    result = folder / "result"
    for place in (source, result):
        place.mkdir()
    (source / "config.json").write_text(json.dumps(original))
    config.save_pretrained(result)
    model: Any = Model(config, **options)
    report = finish_configuration(result, source, model)
    return json.loads((result / "config.json").read_text()), report.to_json()


def test_the_rotary_base_stands_where_older_readers_look(tmp_path: Path) -> None:
    original = {"model_type": "llama", "rope_theta": 500_000.0, "torch_dtype": "bfloat16", **SMALL}
    config = LlamaConfig.from_dict(original)
    config.hidden_size = 24
    values, told = finish(tmp_path, original, config)
    assert values["rope_parameters"]["rope_theta"] == values["rope_theta"] == 500_000.0
    assert values["rope_scaling"] is None
    assert values["torch_dtype"] == values["dtype"] == "bfloat16"
    assert told == {"changed": {"hidden_size": (32, 24)}}


def test_scaled_rotary_embeddings_keep_both_names_of_their_kind(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 4.0}
    original = {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": scaling, **SMALL}
    values, told = finish(
        tmp_path, original, LlamaConfig.from_dict(json.loads(json.dumps(original)))
    )
    assert values["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 4.0}
    assert values["rope_parameters"]["rope_type"] == "linear"
    assert told == {}


def test_a_source_in_the_new_spelling_gets_the_old_one_too(tmp_path: Path) -> None:
    config = Gemma3TextConfig(**SMALL, head_dim=8)
    original = json.loads(config.to_json_string())
    assert "rope_theta" not in original
    values, _ = finish(tmp_path, original, config)
    rope = values["rope_parameters"]
    assert values["rope_theta"] == rope["full_attention"]["rope_theta"]
    assert values["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]


def test_a_field_that_transformers_renamed_is_carried(tmp_path: Path) -> None:
    original = {"model_type": "gpt_neox", "rotary_emb_base": 12_345, "rotary_pct": 0.5, **SMALL}
    values, told = finish(tmp_path, original, GPTNeoXConfig.from_dict(dict(original)))
    assert (values["rotary_emb_base"], values["rotary_pct"]) == (12_345, 0.5)
    assert told == {}


def test_a_field_that_a_cut_changed_is_not_carried(tmp_path: Path) -> None:
    original = {"model_type": "mistral", "head_dim": None, **SMALL}
    config = MistralConfig.from_dict(dict(original))
    config.head_dim = 4
    values, told = finish(tmp_path, original, config)
    assert values["head_dim"] == 4
    assert told == {"changed": {"head_dim": (None, 4)}}


def test_the_words_of_the_source_name_the_kinds_of_layers(tmp_path: Path) -> None:
    original = {
        "model_type": "granitemoehybrid",
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        **SMALL,
        "layer_types": ["mamba", "attention"],
    }
    config = AutoConfig.for_model(**json.loads(json.dumps(original)))
    assert config.layer_types == ["linear_attention", "full_attention"]
    config.num_hidden_layers = 1
    config.layer_types = ["full_attention"]
    values, _ = finish(tmp_path, original, config)
    assert values["layer_types"] == ["attention"]


def test_code_that_stays_behind_is_not_named(tmp_path: Path) -> None:
    original = {"model_type": "llama", **SMALL, "auto_map": {"AutoConfig": "configuration_x.X"}}
    values, told = finish(
        tmp_path, original, LlamaConfig.from_dict(json.loads(json.dumps(original)))
    )
    assert "auto_map" not in values
    assert told == {"left_out": ["auto_map"]}


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_not_called_tied(tmp_path: Path, tied: bool) -> None:
    original = {"model_type": "llama", **SMALL, "tie_word_embeddings": True}
    values, _ = finish(tmp_path, original, LlamaConfig.from_dict(dict(original)), tied=tied)
    assert values["tie_word_embeddings"] is tied


@pytest.mark.parametrize("bare", [True, False])
def test_infinity_is_spelled_as_in_the_source(tmp_path: Path, bare: bool) -> None:
    limit: list[Any] = [0.0, float("inf") if bare else {"__float__": "Infinity"}]
    original = {
        **SMALL,
        "model_type": "bamba",
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "time_step_limit": limit,
    }
    config = BambaConfig(
        **SMALL, mamba_n_heads=4, mamba_d_head=16, time_step_limit=[0.0, float("inf")]
    )
    values, _ = finish(tmp_path, original, config)
    assert values["time_step_limit"] == limit


def test_what_is_compared() -> None:
    before = {"a": 1, "b": [1, 2], "text_config": {"c": 3, "d": 4}, "rope_theta": 1.0}
    after = {"a": 1, "b": [1], "text_config": {"c": 5}, "more": 0}
    report = compare_configurations(before, after)
    assert report.changed == {"b": ([1, 2], [1]), "text_config.c": (3, 5)}
    assert report.left_out == ["text_config.d"]
