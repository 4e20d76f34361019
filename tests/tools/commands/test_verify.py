"""``secateur verify``: what it prints, and its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo.sparse import keep_two_of_four

from secateur.tools.cli import run_command

Output = pytest.CaptureFixture[str]


@pytest.fixture
def sparse_folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy whose MLP weights are 2:4."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "sparse"))
    tensors = load_file(folder / "model.safetensors")
    changed = {
        n: keep_two_of_four(t).contiguous() if ".mlp." in n else t for n, t in tensors.items()
    }
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_sound_folder_exits_0(sparse_folder: Path, capsys: Output) -> None:
    assert run_command(["verify", str(sparse_folder), "--quick"]) == 0
    out = capsys.readouterr().out
    assert "6 x" not in out and "model.layers.*.mlp" in out and "50.00%" in out and "2:4" in out
    assert "green; " in out and "GB/s" in out and "reload" not in out


def test_json_holds_every_tensor_and_every_check(sparse_folder: Path, capsys: Output) -> None:
    assert run_command(["verify", str(sparse_folder), "--quick", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    tensors = {one["name"]: one for one in told["tensors"]}
    assert (
        told["green"]
        and told["faults"] == 0
        and "numbers" in {one["check"] for one in told["checks"]}
    )
    one = tensors["model.layers.0.mlp.up_proj.weight"]
    assert (one["pattern"], one["share_of_zeros"], one["over"]["2:4"]) == ("2:4", 0.5, 0)
    assert len(tensors) == len(load_file(sparse_folder / "model.safetensors"))


def test_a_fault_exits_1_and_says_what_to_do(sparse_folder: Path, capsys: Output) -> None:
    tensors = load_file(sparse_folder / "model.safetensors")
    tensors["model.norm.weight"][7] = torch.nan
    save_file(tensors, sparse_folder / "model.safetensors", metadata={"format": "pt"})
    assert run_command(["verify", str(sparse_folder), "--quick", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    (fault,) = [f for one in told["checks"] for f in one["findings"] if f["level"] == "fault"]
    assert (
        "model.norm.weight holds 1 NaN" in fault["says"]
        and "column 7" in fault["says"]
        and fault["mend"]
    )
    assert run_command(["verify", str(sparse_folder), "--quick"]) == 1
    assert "red: 1 fault;" in capsys.readouterr().out


def test_no_folder_exits_2(tmp_path: Path, capsys: Output) -> None:
    assert run_command(["verify", str(tmp_path / "nothing")]) == 2
    assert "is no folder" in capsys.readouterr().err
