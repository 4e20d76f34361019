"""Saved models open in a fresh process with plain transformers, and a wrong one never appears."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import SMALL, pruned, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from secateur.graph import capture
from secateur.graph.errors import ArtifactError
from secateur.graph.program import Program, Step
from secateur.runtime.save import stock_checkpoint as huggingface
from secateur.runtime.save.stock_checkpoint import load, save, save_weights
from secateur.runtime.stock.config_search import UnsupportedConfigError
from secateur.runtime.stock.to_transformers import to_transformers_with_plan
from secateur.runtime.verify import proof, reload

PARTS = {"mlp": 0.75, "kv_heads": 0.5, "hidden": 0.75}


@pytest.fixture(scope="module")
def program() -> Program:
    return pruned(tiny("LlamaConfig", **SMALL), **PARTS).replace(
        history=(Step("prune-width", {"ratio": 0.25}),)
    )


def proved(program: Program, folder: Path, place: Path) -> dict[str, object]:
    """What the fresh process runs, run here."""
    (place / "probe").mkdir(exist_ok=True)
    huggingface.expect_in_folder(program, to_transformers_with_plan(program)).write_for_process(
        place / "probe"
    )
    return reload.prove_reload(folder, place / "probe")


def test_saved_model_opens_in_a_fresh_process(program: Program, tmp_path: Path) -> None:
    report = save(program, tmp_path / "out")
    assert report.difference <= 1e-4 and report.reload["difference"] <= 1e-4
    assert (
        report.reload["loader"] == "AutoModelForCausalLM" and len(report.reload["generated"]) == 8
    )
    assert report.num_parameters == program.num_parameters and report.changes["hidden_size"] == (
        64,
        48,
    )
    manifest = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert manifest["history"] == [
        {"name": "prune-width", "options": {"ratio": 0.25}, "figures": {}}
    ]
    assert os.listdir(tmp_path) == ["out"]
    model = load(tmp_path / "out")
    ids = torch.arange(12).reshape(2, 6)
    assert (model(input_ids=ids).logits - program(input_ids=ids).logits).abs().max() <= 1e-4
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 9)


def test_experts_and_ties_survive(tmp_path: Path) -> None:
    model = tiny("MixtralConfig", **SMALL | {"num_local_experts": 4, "tie_word_embeddings": True})
    program = pruned(model, experts=0.75, mlp=0.75)
    save(program, tmp_path / "out", check=False)
    assert proved(program, tmp_path / "out", tmp_path)["faults"] == []
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert load(tmp_path / "out").config.num_local_experts == 3


def test_bfloat16(tmp_path: Path) -> None:
    program = pruned(tiny("LlamaConfig", **SMALL).to(torch.bfloat16), mlp=0.75)
    save(program, tmp_path / "out", check=False)
    found = proved(program, tmp_path / "out", tmp_path)
    assert found["faults"] == [] and load(tmp_path / "out").dtype == torch.bfloat16


def test_encoder_and_decoder(tmp_path: Path) -> None:
    fields = {
        "d_model": 64,
        "d_ff": 96,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 8,
        "vocab_size": 96,
    }
    program = pruned(
        tiny("T5Config", "T5ForConditionalGeneration", **fields), mlp=0.75, kv_heads=0.5
    )
    save(program, tmp_path / "out", check=False)
    found = proved(program, tmp_path / "out", tmp_path)
    assert found["faults"] == [] and found["loader"] == "AutoModelForSeq2SeqLM"


def test_inert_files_are_copied_and_others_are_not(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    inert = [
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "chat_template.jinja",
        "tokenizer.model",
    ]
    for name in [*inert, "modeling.py", "pytorch_model.bin", "tokenizer.pkl", "secrets.txt"]:
        (source / name).write_text("{}")
    save(
        program.replace(source=dataclasses.replace(program.source, folder=source)),
        tmp_path / "out",
        check=False,
    )
    made = {"config.json", "generation_config.json", "model.safetensors", "secateur.json"}
    assert set(os.listdir(tmp_path / "out")) == made | set(inert)
    monkeypatch.setattr(
        program.source.model, "name_or_path", str(source)
    )  # what from_pretrained sets
    save(program, tmp_path / "again", check=False)
    assert set(os.listdir(tmp_path / "again")) == made | set(inert)


def test_invalid_published_generation_file_is_kept(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = program.source.model.generation_config
    monkeypatch.setattr(
        settings, "temperature", 0.6
    )  # without do_sample: transformers refuses to save it
    save(program, tmp_path / "out", check=False)
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6
    )


# A wrong model never appears
def flip_weight(folder: Path) -> None:
    change(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(3, 7.0))


def lose_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def add_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update(surplus=torch.ones(2)))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lie_about_rotation(folder: Path) -> None:
    change_config(folder, rope_parameters={"rope_theta": 17.0, "rope_type": "default"})


def change_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_fault_seen_by_the_fresh_process_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = huggingface._write_model

    def write_and_plant(model: PreTrainedModel, folder: Path) -> None:
        write(model, folder)
        lie_about_rotation(folder)

    monkeypatch.setattr(huggingface, "_write_model", write_and_plant)
    with pytest.raises(ArtifactError, match=r"logits differs from .* allowed 0\.0001"):
        save(program, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_fresh_process_that_fails_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: size mismatch")
    monkeypatch.setattr(proof.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ArtifactError, match=r"could not open the model.*size mismatch"):
        save(program, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (flip_weight, "1 parameters differ from those saved: ['model.norm.weight']"),
        (lose_tensor, "missing keys: ['model.layers.1.mlp.up_proj.weight']"),
        (add_tensor, "unexpected keys: ['surplus']"),
    ],
)
def test_proof_sees_a_planted_fault(
    program: Program, tmp_path: Path, plant: Callable[[Path], None], words: str
) -> None:
    """A lost tensor is re-initialised by transformers without an error."""
    huggingface._write_model(to_transformers_with_plan(program).model, tmp_path / "out")
    assert proved(program, tmp_path / "out", tmp_path)["faults"] == []
    plant(tmp_path / "out")
    assert words in proved(program, tmp_path / "out", tmp_path)["faults"]


def test_disk_full_while_saving(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: PreTrainedModel, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface, "_write_model", full)
    with pytest.raises(ArtifactError, match="disk is full"):
        save(program, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_misfit_is_said_before_anything_is_written(llama: PreTrainedModel, tmp_path: Path) -> None:
    program = pruned(llama, kv_heads=0.75)  # 6 heads do not divide the width
    with pytest.raises(UnsupportedConfigError, match="refuses num_attention_heads = 6"):
        save(program, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_place_is_looked_at_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    monkeypatch.setattr(
        huggingface, "to_transformers_with_plan", lambda _: pytest.fail("worked first")
    )
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not a finished result"):
        save(program, tmp_path)


def test_meta_program_has_nothing_to_save(tmp_path: Path) -> None:
    program = capture(tiny("LlamaConfig", meta=True, **SMALL))
    for write in (save, save_weights):
        with pytest.raises(ArtifactError, match="has no weights"):
            write(program, tmp_path / "out")  # type: ignore[operator]


def test_plain_module(tmp_path: Path) -> None:
    program = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), torch.ones(2, 4))
    with pytest.raises(UnsupportedConfigError, match="save_weights"):
        save(program, tmp_path / "out")
    save_weights(program, tmp_path / "out")
    assert load_file(tmp_path / "out" / "weights.safetensors")["0.weight"].shape == (8, 4)
    assert json.loads((tmp_path / "out" / "shapes.json").read_text())["2.bias"] == {
        "shape": [4],
        "dtype": "torch.float32",
    }


# Loading
def test_load_refuses_what_changed(program: Program, tmp_path: Path) -> None:
    save(program, tmp_path / "out", check=False)
    data = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"content of model\.safetensors has changed"):
        load(tmp_path / "out")
    assert load(tmp_path / "out", verify=False).config.hidden_size == 48


def test_load_refuses_a_folder_without_manifest(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="not a finished secateur artifact"):
        load(tmp_path)


def test_reload_imports_nothing_of_this_package() -> None:
    code = f"import runpy, sys; runpy.run_path({huggingface.reload.__file__!r}, run_name='probe'); "
    code += "sys.exit(any(name.split('.')[0] == 'secateur' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


# The real model
@pytest.mark.real
def test_real_model_keeps_two_of_three_heads_and_three_quarters(
    real_model: Path, tmp_path: Path
) -> None:
    """One group of heads, a quarter of the MLP and a tenth of the width at once."""
    from secateur.runtime import open_model

    program = pruned(open_model(real_model), real_model, kv_heads=2 / 3, mlp=0.75, hidden=516 / 576)
    report = save(program, tmp_path / "out")
    assert report.changes == {
        "hidden_size": (576, 516),
        "intermediate_size": (1536, 1152),
        "num_attention_heads": (9, 6),
        "num_key_value_heads": (3, 2),
    }
    assert report.difference <= 1e-4 and report.reload["difference"] <= 1e-4
    assert len(report.reload["generated"]) == 8
    assert to_transformers_with_plan(program).difference == report.difference
