"""``secateur evaluate``: one table for several models, JSON, refusals before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo.tasks import write_tasks

from secateur.tools.cli import run_command

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def other_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with somewhat other weights."""
    folder = tmp_path_factory.mktemp("models") / "pruned"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    maker = torch.Generator().manual_seed(0)
    noisy = {name: w + 0.02 * torch.randn(w.shape, generator=maker) for name, w in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def told(capsys: Output) -> Any:
    return json.loads(capsys.readouterr().out)


def test_two_models_a_text_and_tasks(
    model_folder: Path, other_folder: Path, text_file: Path, tmp_path: Path, capsys: Output
) -> None:
    pytest.importorskip("lm_eval")
    task_folder = tmp_path / "tasks"
    task_folder.mkdir()
    write_tasks(task_folder)
    picture = tmp_path / "found.svg"
    command = [
        "evaluate",
        str(other_folder),
        "--reference",
        str(model_folder),
        "--text",
        str(text_file),
    ]
    options = [
        "--window",
        "64",
        "--tasks",
        str(task_folder),
        "--limit",
        "4",
        "--picture",
        str(picture),
    ]
    assert run_command([*command, *options, "--json", "--device", "cpu"]) == 0
    found = told(capsys)
    assert list(found["models"]) == ["tiny", "pruned"] and found["text"]["reference"] == "tiny"
    scores = found["text"]["models"]["pruned"]
    assert scores["kl"]["mean"] > 0 and scores["ratio"]["low"] <= scores["ratio"]["value"]
    assert scores["dtype"] == "float32" and found["text"]["models"]["tiny"]["kl"] is None
    assert "windows of 64 (no overlap), no beginning token" in found["text"]["protocol"]
    assert found["text"]["scored_tokens"] == 8 * 200 - _blind(8 * 201, 64)
    (score,) = found["tasks"]["pruned"]
    assert score["items"] == 4 and score["difference"] is not None
    assert b"</svg>" in picture.read_bytes()
    assert (
        run_command([*command, "--window", "64", "--bos", "1", "--stride", "32", "--tokens", "300"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "worst 20 %" in shown and "against tiny" in shown
    assert "(stride 32), beginning token 1 before" in " ".join(shown.split())


def _blind(length: int, window: int) -> int:
    """Targets that stand first in a window, those that are end tokens left out."""
    return sum(1 for start in range(0, length, window) if start % 201 != 200)


def test_a_dry_run_opens_no_weights(model_folder: Path, text_file: Path, capsys: Output) -> None:
    assert (
        run_command(
            [
                "evaluate",
                str(model_folder),
                "--text",
                str(text_file),
                "--window",
                "100",
                "--dry-run",
                "--json",
            ]
        )
        == 0
    )
    found = told(capsys)
    assert found["windows"] == 17 and found["parameters"]["tiny"] > 0 and found["tasks"] == []
    assert run_command(["evaluate", str(model_folder), "--text", str(text_file), "--dry-run"]) == 0
    assert "windows of 1024" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to measure"),
        (["--text", "TEXT", "--dtype", "int8"], "is unknown"),
        (["--text", "TEXT", "--bos", "x"], "expected auto"),
        (["--text", "TEXT", "--stride", "2000"], "need a window"),
        (["--text", "TEXT", "--picture", "a.gif"], "--picture"),
        (["--text", "missing.txt"], "cannot read"),
        (["--text", "TEXT", "--tokens", "999999"], "the text holds"),
        (["--tasks", "missing.yaml"], "cannot be read"),
        (["--text", "TEXT", "--reference", "missing"], "missing"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(
    model_folder: Path, text_file: Path, arguments: list[str], message: str, capsys: Output
) -> None:
    given = [str(text_file) if word == "TEXT" else word for word in arguments]
    assert run_command(["evaluate", str(model_folder), *given]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_models_of_other_tokens_are_not_compared(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    file = other / "tokenizer.json"
    tokens = json.loads(file.read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokens))
    assert run_command(["evaluate", str(model_folder), str(other), "--text", str(text_file)]) == 2
    assert "other tokens" in capsys.readouterr().err
