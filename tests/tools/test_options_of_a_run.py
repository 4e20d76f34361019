"""What a person may bring to a run: a class of theirs, and room for biases."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from secateur.passes import IMPORTANCES
from secateur.tools.cli import run_command

Output = pytest.CaptureFixture[str]
MINE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.passes import Importance


@dataclass(frozen=True)
class Ramp(Importance):
    """The number of the unit."""

    name: ClassVar[str] = "ramp"
    needs: ClassVar[str] = "nothing"

    def members(self, program, groups, context):
        return {group.name: [torch.arange(group.units)] for group in groups}
'''


def test_a_plug_in_is_named_on_the_command_line(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    (tmp_path / "plug_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = [
        "compress",
        str(model_folder),
        "-p",
        "score{metric=ramp},prune-width{mlp=0.5}",
        "--dry-run",
        "--json",
    ]
    assert run_command(command) == 2 and "'ramp' is not the name" in capsys.readouterr().err
    try:
        assert run_command(["--plugin", "plug_mine:Ramp", *command]) == 0
        assert json.loads(capsys.readouterr().out)["after"]["parameters"] > 0
    finally:
        IMPORTANCES.classes.pop("ramp", None)
        sys.modules.pop("plug_mine", None)
    assert run_command(["--plugin", "plug_none:Ramp", "passes"]) == 2
    assert "no module named" in capsys.readouterr().err


def test_biases_are_added_filled_and_saved(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output
) -> None:
    pipeline = "score{metric=wanda},prune-width{mlp=0.5},compensate"
    output = tmp_path / "out"
    data = ["--data", str(text_file), "--tokens", "320", "--window", "32"]
    assert (
        run_command(
            [
                "compress",
                str(model_folder),
                "-p",
                pipeline,
                "-o",
                str(output),
                "--add-biases",
                *data,
                "--json",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["history"][-1]["figures"]["compensated"] > 0
    assert json.loads((output / "config.json").read_text())["mlp_bias"] is True
    weights = load_file(output / "model.safetensors")
    assert (
        weights["model.layers.0.mlp.down_proj.bias"].any()
        or weights["model.layers.1.mlp.down_proj.bias"].any()
    )


def test_help_tells_of_plug_ins_and_of_every_command(capsys: Output) -> None:
    assert run_command(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--plugin" in shown and "evaluate" in shown and "compress" in shown
