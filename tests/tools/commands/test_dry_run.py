"""The dry run tells what the run does: what it says yes to comes out, what is refused is refused by
both, before any work."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from secateur.passes import Pipeline
from secateur.tools.cli import run_command
from secateur.tools.commands import compress as compress_command

Output = pytest.CaptureFixture[str]
SCORE = "score{metric=random}"
pytestmark = pytest.mark.usefixtures("opened_once")


def plan_of(model: Path, text: str, capsys: Output, *more: str, code: int = 0) -> dict[str, Any]:
    """The plan of a dry run that ends with an exit code."""
    arguments = ["compress", str(model), "-p", text, "--dry-run", "--json", *more]
    assert run_command(arguments) == code
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a pass begins."""
    monkeypatch.setattr(Pipeline, "run", lambda *a, **k: pytest.fail("work was begun"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "text",
    [
        f"{SCORE},prune-width{{mlp=0.25,uniform=false}}",
        f"{SCORE},prune-width{{ratio=0.25,families=[mlp,kv_heads],uniform=false,ranking=global}}",
        f"{SCORE},allocate{{damage=scores}}",
        f"{SCORE},prune-width{{hidden=47}}",
    ],
)
def test_what_no_stock_class_holds_is_refused_by_both(
    text: str, model_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    plan = plan_of(model_folder, text, capsys, code=3)
    assert plan["misfit"]
    assert plan["refused"] == [f"no stock class holds the result: {plan['misfit']}"]
    assert run_command(["compress", str(model_folder), "-p", text, "--dry-run"]) == 3
    assert "the run would be refused" in " ".join(capsys.readouterr().out.split())
    target = tmp_path / "out"
    assert run_command(["compress", str(model_folder), "-p", text, "-o", str(target)]) == 2
    assert "Nothing was done" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_uneven_layers_are_told_with_what_makes_them_even(
    model_folder: Path, capsys: Output
) -> None:
    text = f"{SCORE},prune-width{{mlp=0.25,uniform=false}}"
    plan = plan_of(model_folder, text, capsys, code=3)
    assert "a size of its own (prune-width{uniform=false})" in plan["misfit"]
    assert "fill-widths" in plan["misfit"]
    filled = plan_of(model_folder, f"{text},fill-widths", capsys)
    assert filled["misfit"] is None
    assert "as large as that one" in filled["warnings"][0]
    assert plan_of(model_folder, f"{text},fill-widths", capsys)["refused"] == []


def test_a_ranking_with_one_outcome_is_no_doubt(model_folder: Path, capsys: Output) -> None:
    # Each of the layers has two key/value heads and keeps one at least: one each is all there is.
    plan = plan_of(model_folder, f"{SCORE},prune-width{{kv_heads=1,uniform=false}}", capsys)
    assert plan["misfit"] is None
    half = f"{SCORE},prune-width{{kv_heads=0.5,uniform=false}}"
    assert plan_of(model_folder, half, capsys)["misfit"] is None


@pytest.mark.usefixtures("no_work")
def test_a_family_that_the_metric_cannot_score(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output
) -> None:
    text = "score{metric=perplexity},prune-width{mlp=0.25}"
    for more in (["--dry-run"], ["-o", str(tmp_path / "out"), "--data", str(text_file)]):
        assert run_command(["compress", str(model_folder), "-p", text, *more]) == 2
        assert "has no scores: the metric" in capsys.readouterr().err


@pytest.mark.usefixtures("no_work")
def test_a_package_that_is_not_there(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: Output,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a)
    )
    text = f"{SCORE},prune-width{{mlp=0.25}},adapt-lora"
    plan = plan_of(model_folder, text, capsys, code=3)
    assert plan["refused"] == ["adapt-lora needs the package peft: pip install 'secateur[train]'"]
    more = ["-o", str(tmp_path / "out"), "--data", str(text_file), "--tokens", "512"]
    assert run_command(["compress", str(model_folder), "-p", text, *more]) == 2
    assert "needs the package peft" in capsys.readouterr().err


@pytest.mark.usefixtures("no_work")
def test_too_little_text(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output
) -> None:
    repair = f"{SCORE},prune-width{{mlp=0.25}},repair"
    for more in (["--dry-run"], ["-o", str(tmp_path / "out"), "--data", str(text_file)]):
        few = ["--tokens", "64", "--window", "64", *more]
        assert run_command(["compress", str(model_folder), "-p", repair, *few]) == 2
        assert "repair needs 2 calibration sequences or more" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("a b c")
    for text, option in (
        (repair, "--data"),
        (f"{SCORE},prune-width{{mlp=0.25}},distill", "--train"),
    ):
        plan = plan_of(model_folder, text, capsys, option, str(short), code=3)
        (reason,) = plan["refused"]
        assert "tokens" in reason
        more = [option, str(short), "-o", str(tmp_path / "out")]
        assert run_command(["compress", str(model_folder), "-p", text, *more]) == 2
        assert "tokens" in capsys.readouterr().err


def test_a_disk_that_is_too_small(
    model_folder: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_command, "free_bytes", lambda folder: 100_000)
    text = f"{SCORE},prune-width{{mlp=0.25}}"
    target = ["-o", str(tmp_path / "out")]
    plan = plan_of(model_folder, text, capsys, *target, code=3)
    assert "of disk at once" in plan["refused"][0] and "choose another disk" in plan["refused"][0]
    assert run_command(["compress", str(model_folder), "-p", text, *target]) == 2
    assert plan_of(model_folder, text, capsys)["refused"] == []


def test_another_share_than_asked_for_is_told_with_what_the_class_takes(
    model_folder: Path, capsys: Output
) -> None:
    plan = plan_of(model_folder, f"{SCORE},prune-width{{kv_heads=0.3}}", capsys)
    (advice,) = [one for one in plan["advice"] if one["name"] == "another share than asked for"]
    assert "kv_heads: 30% was asked for and 50% goes (1 of 2)" in advice["says"]
    assert "kv_heads=2 (all of them)" in advice["says"]
