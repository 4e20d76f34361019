"""Text files become windows of tokens: the same ones every time, with the end token between
documents."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateur.tools.evaluate import corpus

END = 0


class Letters:
    """A tokenizer of one token a character."""

    eos_token_id: int | None = END

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        assert add_special_tokens is False
        return {"input_ids": [[ord(c) for c in document] for document in text]}


def test_plain_text_splits_at_two_empty_lines_and_jsonl_at_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\nstill one\n\n\ntwo\r\n\r\n\r\nthree\n")
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "four\n\n\nfour"}) + "\n\n" + json.dumps({"text": " five "})
    )
    found = corpus.read_documents([tmp_path / "a.txt", str(tmp_path / "b.jsonl")])
    assert found == ["one\n\nstill one", "two", "three", "four\n\n\nfour", "five"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "cannot read the text file"),
        ("latin.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("empty.txt", b" \n", "no text in"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', ":2: expected a JSON object"),
        ("other.jsonl", b'{"body": "a"}', 'expected a JSON object with "text"'),
        ("list.jsonl", b"[1]", 'expected a JSON object with "text"'),
        ("number.jsonl", b'{"text": 1}', '"text" must be a string, got int'),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(corpus.CorpusError, match=message) as raised:
        corpus.read_documents([tmp_path / name])
    assert name in str(raised.value)


def test_an_empty_list_of_files_is_refused() -> None:
    with pytest.raises(corpus.CorpusError, match="empty list"):
        corpus.read_documents([])


def test_the_stream_joins_documents_by_the_end_token_and_stops_early() -> None:
    stream, used = corpus.token_stream(["ab", "c", "def"], Letters())
    assert (
        stream.tolist() == [97, 98, END, 99, END, 100, 101, 102, END]
        and used == 3
        and stream.dtype == torch.int64
    )
    stream, used = corpus.token_stream(["ab", "c", "def"], Letters(), tokens=4)
    assert stream.tolist() == [97, 98, END, 99] and used == 2


def test_windows_are_full_disjoint_and_the_same_for_any_order_of_the_documents() -> None:
    documents = [chr(97 + i) * (3 + i) for i in range(9)]
    windows = corpus.calibration_windows(documents, Letters(), tokens=30, window=7, batch=3, seed=5)
    again = corpus.calibration_windows(documents[::-1], Letters(), tokens=30, window=7, seed=5)
    other = corpus.calibration_windows(documents, Letters(), tokens=30, window=7, seed=6)
    assert windows.windows.shape == (4, 7) and windows.tokens == 28
    assert torch.equal(windows.windows, again.windows) and not torch.equal(
        windows.windows, other.windows
    )
    stream, _ = corpus.token_stream(corpus.shuffle_documents(documents, 5), Letters())
    assert torch.equal(windows.windows.flatten(), stream[:28])


def test_windows_can_be_iterated_twice_in_batches() -> None:
    windows = corpus.calibration_windows(["abcdefghij"], Letters(), tokens=10, window=2, batch=2)
    shapes = [tuple(batch.shape) for batch in windows]
    assert (
        shapes == [(2, 2), (2, 2), (1, 2)] == [tuple(batch.shape) for batch in windows]
        and len(windows) == 3
    )


def test_windows_describe_themselves() -> None:
    windows = corpus.calibration_windows(["abc", "def"], Letters(), tokens=6, window=3)
    told = windows.describe()
    assert {k: told[k] for k in ("windows", "window_tokens", "tokens", "documents", "seed")} == {
        "windows": 2,
        "window_tokens": 3,
        "tokens": 6,
        "documents": 2,
        "seed": 0,
    }
    assert json.loads(json.dumps(told)) == told and len(told["sha256"]) == 64


@pytest.mark.parametrize(
    "options", [{"tokens": 3, "window": 4}, {"tokens": 8, "window": 1}, {"tokens": 8, "batch": 0}]
)
def test_options_that_make_no_window_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(corpus.CorpusError, match="need 2 <= window <= tokens"):
        corpus.calibration_windows(["abcdefghij"], Letters(), **({"window": 4} | options))


def test_too_little_text_is_said_with_both_counts() -> None:
    with pytest.raises(corpus.CorpusError, match="8 tokens asked for, the text holds 4"):
        corpus.calibration_windows(["abc"], Letters(), tokens=8, window=4)


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    with pytest.raises(corpus.CorpusError, match="no end token"):
        corpus.token_stream(["abc"], SimpleNamespace(eos_token_id=None))  # type: ignore[arg-type]
