"""Configurations that hold an infinite number open in both spellings, and what is written opens
again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runtime_models import pruned, tiny

from secateur.runtime import open_model
from secateur.runtime.open.special_floats import config_values, decode_special_floats
from secateur.runtime.save.stock_checkpoint import save

INFINITY = float("inf")
FALCON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPELLINGS = {"tagged": {"__float__": "Infinity"}, "bare": INFINITY}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_infinite_limit_is_opened_pruned_saved_and_opened_again(
    spelling: str, tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    tiny("FalconH1Config", **FALCON).save_pretrained(folder)
    file = folder / "config.json"
    values: dict[str, Any] = json.loads(file.read_text("utf-8"))
    assert values["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    file.write_text(json.dumps(values | {"time_step_limit": [0.0, SPELLINGS[spelling]]}), "utf-8")
    model = open_model(folder)
    assert list(model.config.time_step_limit) == [0.0, INFINITY]
    save(pruned(model, mlp=0.75), tmp_path / "out", check=False)
    smaller = open_model(tmp_path / "out").config
    assert smaller.intermediate_size == 48
    assert list(smaller.time_step_limit) == [0.0, INFINITY]


def test_tags_are_read_at_any_depth_and_other_objects_are_left_alone() -> None:
    data = {
        "a": [{"b": {"__float__": "-Infinity"}}],
        "c": {"__float__": "three"},
        "d": {"__float__": "NaN", "e": 1},
    }
    assert decode_special_floats(data) == data | {"a": [{"b": -INFINITY}]}
    limit = decode_special_floats({"__float__": "NaN"})
    assert limit != limit


def test_values_of_a_configuration_hold_numbers() -> None:
    config = tiny("FalconH1Config", meta=True, **FALCON).config
    assert config_values(config)["time_step_limit"] == [0.0, INFINITY]
