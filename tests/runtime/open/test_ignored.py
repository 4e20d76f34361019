"""Blocks that a class ignores on loading: told when opened, not announced by what is written."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import pruned, tiny
from safetensors.torch import load_file, save_file

from secateur.runtime import open_model, verify_folder
from secateur.runtime.open.ignored import (
    ANNOUNCING,
    announced_blocks,
    find_ignored,
    withdraw_announcement,
)
from secateur.runtime.save.manifest import read_manifest
from secateur.runtime.save.stock_checkpoint import save

SINGLE = "model.safetensors"
GLM: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture
def with_block(tmp_path: Path) -> Path:
    """A model whose folder holds one more block than its class builds, and announces it."""
    folder = tmp_path / "source"
    tiny("Glm4MoeConfig", **GLM).save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    block = {
        name.replace("model.layers.1.", "model.layers.46."): value.clone()
        for name, value in tensors.items()
        if name.startswith("model.layers.1.")
    }
    assert block
    block["model.layers.46.eh_proj.weight"] = torch.ones(32, 64)
    save_file(tensors | block, folder / SINGLE, metadata={"format": "pt"})
    file = folder / "config.json"
    values = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(values | {"num_nextn_predict_layers": 1}), "utf-8")
    return folder


@pytest.mark.parametrize("weights", [True, False])
def test_opening_tells_what_results_will_lack(
    with_block: Path, weights: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        open_model(with_block, weights=weights)
    assert "model.layers.46." in caplog.text and "no pass sees them" in caplog.text


def test_a_result_does_not_announce_what_it_lacks(with_block: Path, tmp_path: Path) -> None:
    save(pruned(open_model(with_block), mlp=0.75, folder=with_block), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    announcing = {field: written[field] for field in ANNOUNCING if field in written}
    assert announcing and not any(announcing.values())
    left_out = read_manifest(tmp_path / "out").figures["left_out"]
    stored = load_file(with_block / SINGLE)
    assert left_out["tensors"] == [name for name in stored if ".46." in name]
    assert left_out["set_to_zero"]["num_nextn_predict_layers"] == 1
    assert verify_folder(tmp_path / "out").green


def test_a_stale_buffer_of_a_module_that_is_there_is_no_block() -> None:
    model = tiny("Glm4MoeConfig", meta=True, **GLM)
    model._keys_to_ignore_on_load_unexpected = [r"inv_freq", r"layers\.46"]
    names = ["model.rotary_emb.inv_freq", "model.layers.46.mlp.up_proj.weight"]
    assert find_ignored(model, names) == names[1:]
    withdraw_announcement(model.config)
    assert announced_blocks(model.config) == {}
