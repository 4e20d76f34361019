"""The command line: what it writes where, and an exit code and a clear message for every bad
request."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.models import tiny_model

import secateur
from secateur.passes import PASSES, Pipeline, recipes
from secateur.tools.cli import run_command
from secateur.tools.commands import compress as compress_command

Output = pytest.CaptureFixture[str]
PRUNE = "score{metric=random},prune-width{mlp=0.25}"
pytestmark = pytest.mark.usefixtures("opened_once")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_inspect(model_folder: Path, tmp_path: Path, capsys: Output) -> None:
    picture = tmp_path / "block.png"
    assert (
        run_command(
            ["inspect", str(model_folder), "--json", "--picture", str(picture), "--block", "-1"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "LlamaForCausalLM"
    assert found["footprint"]["parameters"] > 0
    assert {
        "family": "mlp",
        "groups": 2,
        "units": {"96": 2},
        "locked": {},
        "parameters": 36864,
    } in found["families"]
    assert picture.stat().st_size > 1000
    assert run_command(["inspect", str(model_folder)]) == 0
    assert "coupled groups" in capsys.readouterr().out


def test_inspect_needs_no_weights(model_folder: Path, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    assert run_command(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(tmp_path)


def test_compress_writes_a_checkpoint_that_loads(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output
) -> None:
    target = tmp_path / "smaller"
    arguments = [
        "compress",
        str(model_folder),
        "-p",
        "score,prune-width{mlp=0.25,kv_heads=1,hidden=48}",
    ]
    arguments += [
        "-o",
        str(target),
        "--data",
        str(text_file),
        "--tokens",
        "512",
        "--window",
        "64",
        "--seed",
        "3",
    ]
    assert run_command([*arguments, "--json", "--time-passes", "--print-after", "prune-width"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert "# graph after prune-width" in captured.err
    assert "score: " in captured.err
    assert told["output"] == str(target)
    assert [step["name"] for step in told["history"]] == ["score", "prune-width"]
    assert told["history"][0]["figures"]["tokens"] == 512
    assert told["data"]["windows"] == 8
    assert told["data"]["seed"] == told["history"][0]["figures"]["seed"] == 3
    assert told["after"]["parameters"] < told["before"]["parameters"]
    assert told["check"]["reload"]
    assert [one["name"] for one in told["advice"]] == [
        "much removed without retraining",
        "tensor cores idle",
    ]
    remembered = json.loads((target / "secateur.json").read_text())["figures"]["calibration"]
    assert (
        remembered["sha256"] == told["data"]["sha256"]
        and len(remembered["documents"]) == told["data"]["documents"]
    )
    evaluate = [
        "evaluate",
        str(target),
        str(model_folder),
        "--text",
        str(text_file),
        "--window",
        "64",
        "--dry-run",
    ]
    assert run_command(evaluate) == 0
    warned = " ".join(capsys.readouterr().err.split())
    assert (
        "warning: smaller: 3 of 8 documents were calibrated on" in warned
        and warned.count("calibrated on") == 1
    )
    model = secateur.load(target)
    assert model.num_parameters() == told["after"]["parameters"]
    assert (
        model.config.intermediate_size,
        model.config.hidden_size,
        model.config.num_key_value_heads,
    ) == (72, 48, 1)
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3).shape == (1, 6)


def test_dry_run_tells_what_the_run_does_and_writes_nothing(
    model_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    before = files(tmp_path)
    arguments = ["compress", str(model_folder), "-p", "score,prune-width{mlp=0.25}", "--dry-run"]
    assert run_command([*arguments, "-o", str(tmp_path / "smaller"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["after"]["parameters"] == plan["before"]["parameters"] - 2 * 3 * 64 * 24
    assert plan["job"]["tokens"] == 10240
    assert plan["job"]["peak_bytes"] > plan["before"]["bytes"]
    assert plan["misfit"] is None
    assert files(tmp_path) == before
    assert run_command(arguments) == 0
    assert "what would come out" in capsys.readouterr().out


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving without the fresh process, where another test has it."""
    monkeypatch.setattr(
        compress_command, "save", functools.partial(compress_command.save, check=False)
    )


@pytest.mark.usefixtures("unproved")
def test_a_recipe_names_its_data_beside_itself(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(text_file.read_text())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {file: text.txt, tokens: 256, window: 32}\nseed: 5\npasses: [score]\n")
    target = tmp_path / "scored"
    assert (
        run_command(["compress", str(model_folder), "--recipe", str(recipe), "-o", str(target)])
        == 0
    )
    history = json.loads((target / "secateur.json").read_text())["history"]
    assert history[0]["figures"]["tokens"] == 256
    assert history[0]["figures"]["seed"] == 5


@pytest.mark.usefixtures("unproved")
def test_a_misfit_says_how_to_round(model_folder: Path, tmp_path: Path, capsys: Output) -> None:
    arguments = ["compress", str(model_folder), "-o", str(tmp_path / "out"), "-p"]
    assert run_command([*arguments, "score{metric=random},prune-width{hidden=47}"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "the class takes hidden=48 (round_to={hidden=heads} gives such)" in told
    assert (
        run_command(
            [*arguments, "score{metric=random},prune-width{hidden=0.25,round_to={hidden=4}}"]
        )
        == 0
    )
    assert secateur.load(tmp_path / "out").config.hidden_size == 48


@pytest.mark.usefixtures("unproved")
def test_a_derived_constant_is_doubted_by_the_plan_and_tried_before_any_work(
    tmp_path: Path, capsys: Output
) -> None:
    model, target = tmp_path / "scaled", tmp_path / "out"
    tiny_model("gemma3_text").save_pretrained(model)
    arguments = ["compress", str(model), "-p", "score{metric=random},prune-width{hidden=0.5}"]
    assert run_command([*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["misfit"] is None and "embed_scale" in plan["doubt"]
    assert run_command([*arguments, "-o", str(target)]) == 2
    assert "computes something else" in (said := capsys.readouterr().err) and "embed_scale" in said
    assert [file.name for file in tmp_path.iterdir()] == ["scaled"]


@pytest.mark.usefixtures("unproved")
def test_stop_after(model_folder: Path, tmp_path: Path, capsys: Output) -> None:
    target = tmp_path / "scored"
    arguments = [
        "compress",
        str(model_folder),
        "-p",
        PRUNE,
        "-o",
        str(target),
        "--stop-after",
        "score",
        "--json",
    ]
    assert run_command(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in told["history"]] == ["score"]
    assert told["after"]["parameters"] == told["before"]["parameters"]


def test_passes_are_listed(capsys: Output) -> None:
    assert run_command(["passes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed["passes"]] == [cls.name for cls in PASSES]
    assert {"score", "prune-width", "repair"} <= {entry["name"] for entry in listed["passes"]}
    importances = {entry["name"] for entry in listed["importances"]}
    assert importances >= {"random", "magnitude", "taylor", "activation", "wanda", "flap"}
    ratio = next(o for entry in listed["passes"] for o in entry["options"] if o["name"] == "ratio")
    assert ratio["default"] == ""
    assert "fraction of units removed" in ratio["meaning"]
    assert run_command(["passes"]) == 0
    assert "prune-width" in capsys.readouterr().out


def test_recipes_are_listed_and_printed(capsys: Output) -> None:
    assert run_command(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == recipes.recipe_names() and all(
        one["about"] and one["source"] for one in listed
    )
    assert run_command(["recipes"]) == 0
    assert "one-shot-best" in capsys.readouterr().out
    assert run_command(["recipes", "one-shot-best"]) == 0
    assert Pipeline.from_recipe(capsys.readouterr().out) == Pipeline.from_recipe("one-shot-best")
    assert run_command(["recipes", "one-shot-bets"]) == 2
    assert "did you mean 'one-shot-best'?" in capsys.readouterr().err


@pytest.mark.usefixtures("unproved")
def test_a_recipe_is_found_by_name(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output
) -> None:
    arguments = [
        "compress",
        str(model_folder),
        "--recipe",
        "one-shot-best",
        "--data",
        str(text_file),
    ]
    assert (
        run_command(
            [*arguments, "--tokens", "512", "--window", "64", "-o", str(tmp_path / "out"), "--json"]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in told["history"]] == ["score", "prune-width", "repair"]
    assert (
        run_command(
            ["compress", str(model_folder), "--recipe", "two-shots", "-o", str(tmp_path / "out")]
        )
        == 2
    )
    assert "`secateur recipes` lists those that have a name" in capsys.readouterr().err


def test_the_text_to_train_on(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output
) -> None:
    text = "score{metric=random},prune-width{mlp=0.25},distill,distill{data=own.txt}"
    arguments = ["compress", str(model_folder), "-p", text, "--dry-run", "--json"]
    assert run_command([*arguments, "--train", str(text_file)]) == 3
    told = json.loads(capsys.readouterr().out)
    assert f"distill{{data={text_file}}},distill{{data=own.txt}}" in told["pipeline"].replace(
        '"', ""
    )
    assert "own.txt" in " ".join(told["refused"])
    assert run_command([*arguments, "--train", str(tmp_path / "nothing.txt")]) == 2
    assert "nothing.txt is no file" in capsys.readouterr().err
    assert (
        run_command(
            ["compress", str(model_folder), "-p", PRUNE, "--dry-run", "--train", str(text_file)]
        )
        == 2
    )
    assert "no pass of this pipeline trains" in capsys.readouterr().err


def test_several_processes_are_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (
        run_command(["compress", str(model_folder), "-p", PRUNE, "-o", str(tmp_path / "out")]) == 2
    )
    assert "without torchrun" in capsys.readouterr().err


@pytest.mark.usefixtures("unproved")
def test_a_run_that_failed_goes_on_with_the_same_command(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: Output,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left")

    def command(pipeline: str) -> list[str]:
        arguments = ["compress", str(model_folder), "-p", pipeline, "-o", str(tmp_path / "out")]
        return [*arguments, "--data", str(text_file), "--tokens", "256", "--window", "32"]

    pipeline = "score{metric=wanda},prune-width{mlp=0.25},repair"
    with monkeypatch.context() as broken:
        broken.setattr("secateur.passes.repair.repair.with_parameters", fail)
        assert run_command(command(pipeline)) == 1
    assert "the same command goes on from there" in " ".join(capsys.readouterr().err.split())
    assert run_command(command("score{metric=flap},prune-width{mlp=0.5},repair")) == 2
    says = capsys.readouterr().err
    assert (
        "1 score, metric: wanda then, flap (joint: false) now" in says
        and "2 prune-width, mlp: 0.25 then, 0.5 now" in says
    )
    assert run_command(command(pipeline)) == 0
    assert "going on after pass 2, prune-width" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run_command([*command(pipeline), "-o", str(tmp_path / "whole")]) == 0
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert both[0] == both[1]


def test_help_and_no_arguments(capsys: Output) -> None:
    assert run_command(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("inspect", "compress", "passes", "recipes", "demo"))
    assert run_command([]) == 2
    assert run_command(["prune"]) == 2


def test_as_a_program_the_exit_code_arrives(model_folder: Path) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "secateur", "inspect", str(model_folder / "nothing"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert json.loads(done.stdout)["exit_code"] == 2
