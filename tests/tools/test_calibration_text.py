"""Several calibration texts share the windows; a file may be named with its share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.graph import Program, capture
from secateur.passes import DataSpec
from secateur.runtime import open_model
from secateur.tools.commands.calibration_text import choose_data, parse_sources, read_windows
from secateur.tools.evaluate.corpus import CorpusError, share_windows
from secateur.tools.report.console import BadInput


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Two files of rows, one of them with chats and one with another field."""
    files = {"a": tmp_path / "a.jsonl", "b": tmp_path / "b:1.jsonl", "chat": tmp_path / "c.json"}
    files["a"].write_text("".join(json.dumps({"body": "a" * 90}) + "\n" for _ in range(3)))
    files["b"].write_text("".join(json.dumps({"body": "b" * 90}) + "\n" for _ in range(3)))
    files["chat"].write_text(json.dumps([{"messages": [{"role": "user", "content": "cc"}]}] * 90))
    return files


def test_windows_are_shared_by_weight() -> None:
    assert share_windows(9, [2, 1]) == [6, 3]
    assert share_windows(10, [1, 1, 1]) == [4, 3, 3]
    with pytest.raises(CorpusError, match="more --tokens"):
        share_windows(2, [100, 1])


def test_a_share_follows_the_last_colon(texts: dict[str, Path]) -> None:
    a, b = parse_sources(DataSpec(file=(f"{texts['a']}:2.5", str(texts["b"]))))
    assert (a.path, a.share) == (texts["a"], 2.5)
    assert (b.path, b.share) == (texts["b"], 1.0)


@pytest.mark.parametrize("share", ["0", "-1", "inf", "nan", "many"])
def test_what_is_no_share_is_refused(texts: dict[str, Path], share: str) -> None:
    with pytest.raises(BadInput, match="share above zero"):
        parse_sources(DataSpec(file=f"{texts['a']}:{share}"))


def test_the_command_line_goes_before_the_recipe(tmp_path: Path) -> None:
    recipe = DataSpec(file=("x.txt", "y.txt:2"), field="body", tokens=512)
    spec = choose_data(recipe, str(tmp_path / "r.yaml"), None, None, None, 64)
    assert spec.file == (str(tmp_path / "x.txt"), str(tmp_path / "y.txt:2"))
    assert (spec.field, spec.tokens, spec.window) == ("body", 512, 64)
    spec = choose_data(recipe, None, ["z.txt"], "text", 128, None)
    assert (spec.file, spec.field, spec.tokens) == (("z.txt",), "text", 128)


@pytest.fixture(scope="module")
def program(model_folder: Path) -> Program:
    return capture(open_model(model_folder), folder=model_folder)


def test_each_file_gives_its_part(texts: dict[str, Path], program: Program) -> None:
    files = (f"{texts['a']}:2", str(texts["b"]))
    spec = DataSpec(file=files, field="body", tokens=96, window=16)
    windows, figures = read_windows(program, spec, seed=0)
    letters = [set(row.tolist()) for row in windows.windows]
    assert [3 in row for row in letters] == [True] * 4 + [False] * 2
    assert [4 in row for row in letters] == [False] * 4 + [True] * 2
    assert figures["windows_by_file"] == {"a.jsonl": 4, "b:1.jsonl": 2}


def test_chats_go_through_the_template(
    texts: dict[str, Path], program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.tools.commands import calibration_text

    spec = DataSpec(file=str(texts["chat"]), tokens=32, window=16)
    with pytest.raises(CorpusError, match="chat template does not take"):
        read_windows(program, spec, seed=0)
    real = calibration_text.open_tokenizer

    def with_template(*arguments: object) -> object:
        tokenizer = real(*arguments)  # type: ignore[arg-type]
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}ab{% endfor %}"
        return tokenizer

    monkeypatch.setattr(calibration_text, "open_tokenizer", with_template)
    windows, _ = read_windows(program, spec, seed=0)
    assert windows.windows[0, :5].tolist() == [5, 5, 3, 4, 2]
