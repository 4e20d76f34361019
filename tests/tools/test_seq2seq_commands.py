"""compress, evaluate and generate on a model with an encoder and a decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from zoo.folders import save_tiny_model

from secateur.tools.cli import run_command

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "t5"
    save_tiny_model(folder, "t5")
    return folder


def test_a_text_is_scored_by_its_second_halves(
    t5_folder: Path, text_file: Path, capsys: Output
) -> None:
    arguments = ["--text", str(text_file), "--window", "16", "--tokens", "160", "--json"]
    assert run_command(["evaluate", str(t5_folder), *arguments]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert text["scored_tokens"] == 80
    assert "the first half of a window read by the encoder" in text["protocol"]


def test_new_tokens_follow_the_prompt(t5_folder: Path, capsys: Output) -> None:
    arguments = ["--prompt", "abc", "--max-new-tokens", "4", "--json"]
    assert run_command(["generate", str(t5_folder), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompt_tokens"] == 3
    assert result["new_tokens"] == len(result["ids"]) >= 1


def test_it_is_pruned_repaired_and_proved(t5_folder: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    data = ["--data", str(text_file), "--tokens", "256", "--window", "32"]
    pipeline = ["-p", "score{metric=wanda},prune-width{mlp=0.5},repair"]
    assert run_command(["compress", str(t5_folder), *pipeline, *data, "-o", str(output)]) == 0
    manifest = json.loads((output / "secateur.json").read_text())
    assert manifest["figures"]["reload"]["difference"] < 1e-4
