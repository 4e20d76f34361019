"""Bad requests: an exit code and a clear message for each, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from secateur.graph import SecateurError
from secateur.graph.errors import ArtifactError
from secateur.tools.cli import run_command
from secateur.tools.commands import common as opening
from secateur.tools.commands import compress as compress_command

Output = pytest.CaptureFixture[str]
PRUNE = "score{metric=random},prune-width{mlp=0.25}"
pytestmark = pytest.mark.usefixtures("opened_once")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


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
    (
        "score{metric=random},prune-width{families=[heads],ratio=0.5}",
        "'heads' is no family of groups",
    ),
    (
        "score{metric=random},prune-width{groups={mlp@nowhere=0.5}}",
        "no group is named 'mlp@nowhere'",
    ),
    ("score{metric=random},prune-width{vocabulary=0.5}", "is locked"),
    ("score{metric=random},prune-width{mlp=0.5,skip=[0],uniform=false}", "cannot hold this model"),
]


@pytest.mark.parametrize(("text", "says"), BAD_PIPELINES)
def test_bad_pipelines_exit_2(
    model_folder: Path, tmp_path: Path, capsys: Output, text: str, says: str
) -> None:
    assert (
        run_command(["compress", str(model_folder), "-p", text, "-o", str(tmp_path / "out")]) == 2
    )
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
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
    extra: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["compress", str(model_folder), *extra]) == 2
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
    [
        ("truncated", "model.safetensors"),
        ("lies", "97"),
        ("pickle", "pickle"),
        ("json", "config.json"),
    ],
)
def test_damaged_models_exit_2(
    model_folder: Path, tmp_path: Path, capsys: Output, kind: str, says: str
) -> None:
    folder = tmp_path / kind
    folder.mkdir()
    broken_folder(kind, model_folder, folder)
    assert run_command(["compress", str(folder), "-p", PRUNE, "-o", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "compress"])
def test_no_such_model_exits_2(tmp_path: Path, capsys: Output, command: str) -> None:
    extra = ["-p", PRUNE, "-o", str(tmp_path / "out")] if command == "compress" else []
    assert run_command([command, str(tmp_path / "nothing" / "here"), *extra]) == 2
    assert "no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run_command([command, str(tmp_path / "empty"), *extra]) == 2
    assert "config.json" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_exits_2_before_any_work(
    model_folder: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        opening, "open_program", lambda *a, **k: pytest.fail("the model was opened")
    )
    file = tmp_path / "file"
    file.write_text("mine")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for target, says in ((file, "is a file"), (full, "not a finished result")):
        assert run_command(["compress", str(model_folder), "-p", PRUNE, "-o", str(target)]) == 2
        assert says in capsys.readouterr().err
    assert (full / "notes.txt").read_text() == file.read_text() == "mine"
    assert run_command(["compress", str(model_folder), "-p", PRUNE, "-o", "/proc/smaller"]) == 2
    assert "/proc/smaller cannot be written" in capsys.readouterr().err
    assert (
        run_command(["compress", str(model_folder), "-p", PRUNE, "-o", str(file / "deeper")]) == 2
    )
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_a_full_disk_exits_2_before_any_work(
    model_folder: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert (
        run_command(["compress", str(model_folder), "-p", PRUNE, "-o", str(tmp_path / "a" / "b")])
        == 2
    )
    says = capsys.readouterr().err
    assert "of disk at once" in says and "1000 B are free" in says


def test_a_damaged_tokenizer_exits_2(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: Output
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    broken_folder("none", model_folder, folder)
    (folder / "tokenizer.json").write_text("{}")
    assert (
        run_command(
            [
                "compress",
                str(folder),
                "-p",
                "score",
                "-o",
                str(tmp_path / "out"),
                "--data",
                str(text_file),
            ]
        )
        == 2
    )
    assert "has no tokenizer that opens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [SecateurError("it broke"), ArtifactError("disk full"), OSError(28, "No space left")]
)
def test_a_failing_job_exits_1(
    model_folder: Path,
    tmp_path: Path,
    capsys: Output,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(compress_command, "save", fail)
    arguments = ["compress", str(model_folder), "-p", PRUNE, "-o", str(tmp_path / "out")]
    assert run_command([*arguments, "--json"]) == 1
    captured = capsys.readouterr()
    assert str(error) in captured.err
    assert "Traceback" not in captured.err
    assert json.loads(captured.out) == {"error": str(error), "exit_code": 1}
    assert run_command([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_failing_pass_is_named(
    model_folder: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise SecateurError("it broke")

    monkeypatch.setattr("secateur.passes.width.prune_width.keep", fail_second(fail))
    assert (
        run_command(["compress", str(model_folder), "-p", PRUNE, "-o", str(tmp_path / "out")]) == 1
    )
    assert "in pass prune-width (2 of 2); already run: score" in capsys.readouterr().err


def fail_second(fail: Any) -> Any:
    """Lets the preview pass and fails the work itself."""
    from secateur.graph import keep

    def either(program: Any, edit: Any) -> Any:
        on_meta = any(p.is_meta for _, p in program.named_parameters())
        return keep(program, edit) if on_meta else fail()

    return either
