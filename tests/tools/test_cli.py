"""The command line: what it writes where, and an exit code and a clear message for every bad request."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import secateur
from secateur.graph import Program, SecateurError
from secateur.graph.errors import ArtifactError
from secateur.passes import PASSES, Pipeline, recipes
from secateur.tools import compress_command, opening
from secateur.tools.cli import run
from secateur.tools.report.console import Voice

Output = pytest.CaptureFixture[str]
PRUNE = "score{metric=random},prune-width{mlp=0.25}"


@pytest.fixture(autouse=True)
def opened_once(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    """The good model is opened and captured once; Programs do not change."""
    real = opening.open_program

    def open_program(model: str, voice: Voice, *, weights: bool) -> Program:
        if model != str(model_folder):
            return real(model, voice, weights=weights)
        if weights not in OPENED:
            OPENED[weights] = real(model, voice, weights=weights)
        return OPENED[weights]

    monkeypatch.setattr(opening, "open_program", open_program)


OPENED: dict[bool, Program] = {}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_inspect(model_folder: Path, tmp_path: Path, capsys: Output) -> None:
    picture = tmp_path / "block.png"
    assert run(["inspect", str(model_folder), "--json", "--picture", str(picture), "--block", "-1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "LlamaForCausalLM"
    assert found["footprint"]["parameters"] > 0
    assert {"family": "mlp", "groups": 2, "units": {"96": 2}, "locked": {}, "parameters": 36864} in found["families"]
    assert picture.stat().st_size > 1000
    assert run(["inspect", str(model_folder)]) == 0
    assert "coupled groups" in capsys.readouterr().out


def test_inspect_needs_no_weights(model_folder: Path, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    assert run(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(tmp_path)


def test_compress_writes_a_checkpoint_that_loads(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output
) -> None:
    target = tmp_path / "smaller"
    arguments = ["compress", str(model_folder), "-p", "score,prune-width{mlp=0.25,kv_heads=1,hidden=48}"]
    arguments += ["-o", str(target), "--data", str(text_file), "--tokens", "512", "--window", "64", "--seed", "3"]
    assert run([*arguments, "--json", "--time-passes", "--print-after", "prune-width"]) == 0
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
    assert remembered["sha256"] == told["data"]["sha256"] and len(remembered["documents"]) == told["data"]["documents"]
    evaluate = ["evaluate", str(target), str(model_folder), "--text", str(text_file), "--window", "64", "--dry-run"]
    assert run(evaluate) == 0
    warned = " ".join(capsys.readouterr().err.split())
    assert "warning: smaller: 3 of 8 documents were calibrated on" in warned and warned.count("calibrated on") == 1
    model = secateur.load(target)
    assert model.num_parameters() == told["after"]["parameters"]
    assert (model.config.intermediate_size, model.config.hidden_size, model.config.num_key_value_heads) == (72, 48, 1)
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3).shape == (1, 6)


def test_dry_run_tells_what_the_run_does_and_writes_nothing(model_folder: Path, tmp_path: Path, capsys: Output) -> None:
    before = files(tmp_path)
    arguments = ["compress", str(model_folder), "-p", "score,prune-width{mlp=0.25}", "--dry-run"]
    assert run([*arguments, "-o", str(tmp_path / "smaller"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["after"]["parameters"] == plan["before"]["parameters"] - 2 * 3 * 64 * 24
    assert plan["job"]["tokens"] == 10240
    assert plan["job"]["peak_bytes"] > plan["before"]["bytes"]
    assert plan["misfit"] is None
    assert files(tmp_path) == before
    assert run(arguments) == 0
    assert "what would come out" in capsys.readouterr().out


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving without the fresh process, where another test has it."""
    monkeypatch.setattr(compress_command, "save", functools.partial(compress_command.save, check=False))


@pytest.mark.usefixtures("unproved")
def test_a_recipe_names_its_data_beside_itself(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text_file.read_text())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {file: text.txt, tokens: 256, window: 32}\nseed: 5\npasses: [score]\n")
    target = tmp_path / "scored"
    assert run(["compress", str(model_folder), "--recipe", str(recipe), "-o", str(target)]) == 0
    history = json.loads((target / "secateur.json").read_text())["history"]
    assert history[0]["figures"]["tokens"] == 256
    assert history[0]["figures"]["seed"] == 5


@pytest.mark.usefixtures("unproved")
def test_a_misfit_says_how_to_round(model_folder: Path, tmp_path: Path, capsys: Output) -> None:
    arguments = ["compress", str(model_folder), "-o", str(tmp_path / "out"), "-p"]
    assert run([*arguments, "score{metric=random},prune-width{hidden=47}"]) == 2
    assert "round_to={hidden=8} rounds" in capsys.readouterr().err
    assert run([*arguments, "score{metric=random},prune-width{hidden=0.25,round_to={hidden=4}}"]) == 0
    assert secateur.load(tmp_path / "out").config.hidden_size == 48


@pytest.mark.usefixtures("unproved")
def test_stop_after(model_folder: Path, tmp_path: Path, capsys: Output) -> None:
    target = tmp_path / "scored"
    arguments = ["compress", str(model_folder), "-p", PRUNE, "-o", str(target), "--stop-after", "score", "--json"]
    assert run(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in told["history"]] == ["score"]
    assert told["after"]["parameters"] == told["before"]["parameters"]


def test_passes_are_listed(capsys: Output) -> None:
    assert run(["passes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed["passes"]] == [cls.name for cls in PASSES]
    assert {"score", "prune-width", "repair"} <= {entry["name"] for entry in listed["passes"]}
    importances = {entry["name"] for entry in listed["importances"]}
    assert importances >= {"random", "magnitude", "taylor", "activation", "wanda", "flap"}
    ratio = next(o for entry in listed["passes"] for o in entry["options"] if o["name"] == "ratio")
    assert ratio["default"] == ""
    assert "fraction of units removed" in ratio["meaning"]
    assert run(["passes"]) == 0
    assert "prune-width" in capsys.readouterr().out


def test_recipes_are_listed_and_printed(capsys: Output) -> None:
    assert run(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == recipes.names() and all(one["about"] and one["source"] for one in listed)
    assert run(["recipes"]) == 0
    assert "one-shot-best" in capsys.readouterr().out
    assert run(["recipes", "one-shot-best"]) == 0
    assert Pipeline.from_recipe(capsys.readouterr().out) == Pipeline.from_recipe("one-shot-best")
    assert run(["recipes", "one-shot-bets"]) == 2
    assert "did you mean 'one-shot-best'?" in capsys.readouterr().err


@pytest.mark.usefixtures("unproved")
def test_a_recipe_is_found_by_name(model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output) -> None:
    arguments = ["compress", str(model_folder), "--recipe", "one-shot-best", "--data", str(text_file)]
    assert run([*arguments, "--tokens", "512", "--window", "64", "-o", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in told["history"]] == ["score", "prune-width", "repair"]
    assert run(["compress", str(model_folder), "--recipe", "two-shots", "-o", str(tmp_path / "out")]) == 2
    assert "`secateur recipes` lists those that have a name" in capsys.readouterr().err


def test_the_text_to_train_on(model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output) -> None:
    text = "score{metric=random},prune-width{mlp=0.25},distill,distill{data=own.txt}"
    arguments = ["compress", str(model_folder), "-p", text, "--dry-run", "--json"]
    assert run([*arguments, "--train", str(text_file)]) == 0
    told = json.loads(capsys.readouterr().out)["pipeline"]
    assert f"distill{{data={text_file}}},distill{{data=own.txt}}" in told.replace('"', "")
    assert run([*arguments, "--train", str(tmp_path / "nothing.txt")]) == 2
    assert "nothing.txt is no file" in capsys.readouterr().err
    assert run(["compress", str(model_folder), "-p", PRUNE, "--dry-run", "--train", str(text_file)]) == 2
    assert "no pass of this pipeline trains" in capsys.readouterr().err


def test_several_processes_are_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["compress", str(model_folder), "-p", PRUNE, "-o", str(tmp_path / "out")]) == 2
    assert "without torchrun" in capsys.readouterr().err


@pytest.mark.usefixtures("unproved")
def test_a_run_that_failed_goes_on_with_the_same_command(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left")

    def command(pipeline: str) -> list[str]:
        arguments = ["compress", str(model_folder), "-p", pipeline, "-o", str(tmp_path / "out")]
        return [*arguments, "--data", str(text_file), "--tokens", "256", "--window", "32"]

    pipeline = "score{metric=wanda},prune-width{mlp=0.25},repair"
    with monkeypatch.context() as broken:
        broken.setattr("secateur.passes.repair.with_parameters", fail)
        assert run(command(pipeline)) == 1
    assert "the same command goes on from there" in " ".join(capsys.readouterr().err.split())
    assert run(command("score{metric=flap},prune-width{mlp=0.5},repair")) == 2
    says = capsys.readouterr().err
    assert "1 score, metric: wanda then, flap now" in says and "2 prune-width, mlp: 0.25 then, 0.5 now" in says
    assert run(command(pipeline)) == 0
    assert "going on after pass 2, prune-width" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run([*command(pipeline), "-o", str(tmp_path / "whole")]) == 0
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert both[0] == both[1]


BAD_PIPELINES = [
    ("", "empty"),
    ("prune{mlp=0.5}", "did you mean 'prune-width'?"),
    ("score{metric=tailor}", "did you mean 'taylor'? (at character 7)"),
    ("prune-width{ratio=1.5}", "less than 1"),
    ("prune-width{ratio=-0.1}", "greater than or equal to 0"),
    ("prune-width{mlp=0}", "keeps no unit"),
    ("prune-width{ration=0.5}", "did you mean 'ratio'?"),
    ("prune-width{mlp=0.5", "expected ',' or '}'"),
    ("prune-width{mlp=0.5}", "put score{metric=...} before it"),
    ("score{metric=random},prune-width{mlp=0.999}", "would be empty"),
    ("score{metric=random},prune-width{experts=0.5}", "no group of family 'experts'"),
    ("score{metric=random},prune-width{families=[heads],ratio=0.5}", "'heads' is no family of groups"),
    ("score{metric=random},prune-width{groups={mlp@nowhere=0.5}}", "no group is named 'mlp@nowhere'"),
    ("score{metric=random},prune-width{vocabulary=0.5}", "is locked"),
    ("score{metric=random},prune-width{mlp=0.5,skip=[0],uniform=false}", "cannot hold this model"),
]


@pytest.mark.parametrize(("text", "says"), BAD_PIPELINES)
def test_bad_pipelines_exit_2(model_folder: Path, tmp_path: Path, capsys: Output, text: str, says: str) -> None:
    assert run(["compress", str(model_folder), "-p", text, "-o", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["-p", PRUNE], "-o DIR"),
        (["-o", "out"], "say what to do, once"),
        (["-p", PRUNE, "--recipe", "x.yaml", "-o", "out"], "say what to do, once"),
        (["--recipe", "x.yaml", "-o", "out"], "x.yaml: cannot be read"),
        (["-p", "score", "-o", "out"], "--data FILE"),
        (["-p", "score", "-o", "out", "--data", "nothing.txt"], "nothing.txt is no file"),
        (["-p", "score", "-o", "out", "--tokens", "8", "--window", "16"], "longer than --tokens"),
        (["-p", PRUNE, "-o", "out", "--stop-after", "scor"], "did you mean 'score'?"),
        (["-p", PRUNE, "-o", "out", "--tokens", "many"], "--tokens"),
        (["-p", PRUNE, "-o", "out", "--unknown"], "--unknown"),
    ],
)
def test_bad_requests_exit_2(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, extra: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["compress", str(model_folder), *extra]) == 2
    assert says in capsys.readouterr().err
    assert files(tmp_path) == []


def broken_folder(kind: str, model_folder: Path, folder: Path) -> Path:
    """A copy of the model with one fault."""
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights, config = folder / "model.safetensors", folder / "config.json"
    lie = config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 97')
    faults: dict[str, Callable[[], object]] = {
        "truncated": lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        "lies": lambda: config.write_text(lie),
        "pickle": lambda: weights.rename(folder / "pytorch_model.bin"),
        "json": lambda: config.write_text("{"),
        "none": lambda: None,
    }
    faults[kind]()
    return folder


@pytest.mark.parametrize(
    ("kind", "says"),
    [("truncated", "model.safetensors"), ("lies", "97"), ("pickle", "pickle"), ("json", "config.json")],
)
def test_damaged_models_exit_2(model_folder: Path, tmp_path: Path, capsys: Output, kind: str, says: str) -> None:
    folder = tmp_path / kind
    folder.mkdir()
    broken_folder(kind, model_folder, folder)
    assert run(["compress", str(folder), "-p", PRUNE, "-o", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "compress"])
def test_no_such_model_exits_2(tmp_path: Path, capsys: Output, command: str) -> None:
    extra = ["-p", PRUNE, "-o", str(tmp_path / "out")] if command == "compress" else []
    assert run([command, str(tmp_path / "nothing" / "here"), *extra]) == 2
    assert "no folder" in capsys.readouterr().err
    assert run([command, str(tmp_path), *extra]) == 2
    assert "config.json" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_exits_2_before_any_work(
    model_folder: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "open_program", lambda *a, **k: pytest.fail("the model was opened"))
    file = tmp_path / "file"
    file.write_text("mine")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for target, says in ((file, "is a file"), (full, "not a secateur artifact")):
        assert run(["compress", str(model_folder), "-p", PRUNE, "-o", str(target)]) == 2
        assert says in capsys.readouterr().err
    assert (full / "notes.txt").read_text() == file.read_text() == "mine"
    assert run(["compress", str(model_folder), "-p", PRUNE, "-o", "/proc/smaller"]) == 2
    assert "/proc/smaller cannot be written" in capsys.readouterr().err
    assert run(["compress", str(model_folder), "-p", PRUNE, "-o", str(file / "deeper")]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_a_full_disk_exits_2_before_any_work(
    model_folder: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_command.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert run(["compress", str(model_folder), "-p", PRUNE, "-o", str(tmp_path / "a" / "b")]) == 2
    assert f"and {tmp_path} has 1000 B free" in capsys.readouterr().err


def test_a_damaged_tokenizer_exits_2(model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    broken_folder("none", model_folder, folder)
    (folder / "tokenizer.json").write_text("{}")
    assert run(["compress", str(folder), "-p", "score", "-o", str(tmp_path / "out"), "--data", str(text_file)]) == 2
    assert "has no tokenizer that opens" in capsys.readouterr().err


@pytest.mark.parametrize("error", [SecateurError("it broke"), ArtifactError("disk full"), OSError(28, "No space left")])
def test_a_failing_job_exits_1(
    model_folder: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(compress_command, "save", fail)
    arguments = ["compress", str(model_folder), "-p", PRUNE, "-o", str(tmp_path / "out")]
    assert run([*arguments, "--json"]) == 1
    captured = capsys.readouterr()
    assert str(error) in captured.err
    assert "Traceback" not in captured.err
    assert json.loads(captured.out) == {"error": str(error), "exit_code": 1}
    assert run([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_failing_pass_is_named(
    model_folder: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise SecateurError("it broke")

    monkeypatch.setattr("secateur.passes.prune_width.keep", fail_second(fail))
    assert run(["compress", str(model_folder), "-p", PRUNE, "-o", str(tmp_path / "out")]) == 1
    assert "in pass prune-width (2 of 2); already run: score" in capsys.readouterr().err


def fail_second(fail: Any) -> Any:
    """Lets the preview pass and fails the work itself."""
    from secateur.graph import keep

    def either(program: Any, edit: Any) -> Any:
        on_meta = any(p.is_meta for _, p in program.named_parameters())
        return keep(program, edit) if on_meta else fail()

    return either


def test_help_and_no_arguments(capsys: Output) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("inspect", "compress", "passes", "recipes", "demo"))
    assert run([]) == 2
    assert run(["prune"]) == 2


def test_as_a_program_the_exit_code_arrives(model_folder: Path) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "secateur", "inspect", str(model_folder / "nothing"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert json.loads(done.stdout)["exit_code"] == 2
