"""Blocks that a class ignores go along byte for byte where no size changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from runtime_models import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from secateur.graph import capture
from secateur.runtime import open_model, save, verify_folder
from secateur.runtime.open.checkpoint import INDEX, read_checkpoint
from secateur.runtime.save.carried import plan_ignored, write_carried
from secateur.runtime.save.manifest import read_manifest

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
LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BLOCK = {"mtp.fc.weight": torch.arange(64.0).view(8, 8), "mtp.norm.weight": torch.ones(32)}


def with_block(folder: Path, names: dict[str, torch.Tensor]) -> Path:
    """A tiny model whose folder holds tensors that its class is told to ignore."""
    model = tiny("LlamaConfig", **LLAMA)
    model.save_pretrained(folder)
    save_file(load_file(folder / SINGLE) | names, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return folder


def ignoring(*patterns: str, **sizes: int) -> PreTrainedModel:
    """A tiny model whose class ignores these names."""
    model = tiny("LlamaConfig", **{**LLAMA, **sizes})
    model._keys_to_ignore_on_load_unexpected = list(patterns)
    return model


def test_they_are_written_as_they_were(tmp_path: Path) -> None:
    source = with_block(tmp_path / "source", BLOCK)
    model = ignoring(r"^mtp\.")
    plan = plan_ignored(model, model, source)
    assert set(plan.carried) == set(BLOCK)
    result = tmp_path / "result"
    model.save_pretrained(result)
    before = load_file(result / SINGLE)
    write_carried(plan, source, result)
    records = read_checkpoint(result)
    assert set(records) == {*before, *BLOCK}
    assert len({record.file for record in records.values()}) == 2 and (result / INDEX).is_file()
    for name, record in records.items():
        with safe_open(record.file, "pt") as file:
            assert torch.equal(file.get_tensor(name), {**before, **BLOCK}[name])


def test_a_changed_size_leaves_them_out(tmp_path: Path) -> None:
    source = with_block(tmp_path / "source", BLOCK)
    patterns = [r"^mtp\."]
    plan = plan_ignored(ignoring(*patterns, intermediate_size=32), ignoring(*patterns), source)
    assert set(plan.left_out) == set(BLOCK) and "sizes" in plan.reason


def test_numbers_follow_the_layers_that_are_left(tmp_path: Path) -> None:
    source = with_block(tmp_path / "source", {"model.layers.2.eh_proj.weight": torch.ones(4, 8)})
    both = r"layers\.[12]\."
    plan = plan_ignored(ignoring(both, num_hidden_layers=1), ignoring(both), source)
    assert plan.carried == {"model.layers.1.eh_proj.weight": "model.layers.2.eh_proj.weight"}
    old = r"layers\.2\."
    plan = plan_ignored(ignoring(old, num_hidden_layers=1), ignoring(old), source)
    assert plan.left_out and "numbers" in plan.reason


def test_a_saved_model_keeps_and_announces_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = tiny("Glm4MoeConfig", **GLM)
    model.save_pretrained(source)
    block = {"model.layers.46.eh_proj.weight": torch.ones(32, 64)}
    save_file(load_file(source / SINGLE) | block, source / SINGLE, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    save(capture(open_model(source), folder=source), tmp_path / "out")
    assert read_manifest(tmp_path / "out").figures["carried"]["tensors"] == list(block)
    assert set(block) <= set(read_checkpoint(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 1
    assert verify_folder(tmp_path / "out").green
