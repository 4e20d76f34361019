"""Every kind of text file gives the same documents, or a sentence that names file and row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from secateur.graph.errors import SecateurError
from secateur.passes.calibration.documents import read_documents

TEXTS = ["one\u2028line\x85still one", "second", "third"]
ROWS = [{"text": text, "label": 1} for text in TEXTS]


def json_lines(rows: list[dict[str, object]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)


def csv_text() -> bytes:
    return ("text,label\r\n" + "".join(f'"{text}",1\r\n' for text in TEXTS)).encode()


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(json_lines(ROWS)),
    "mark.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json_lines(ROWS)),
    "windows.jsonl": lambda path: path.write_bytes(json_lines(ROWS).replace(b"\n", b"\r\n")),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(json_lines(ROWS))),
    "array.json": lambda path: path.write_text(json.dumps(ROWS), "utf-8"),
    "strings.json": lambda path: path.write_text(json.dumps(TEXTS), "utf-8"),
    "rows.csv": lambda path: path.write_bytes(csv_text()),
    "rows.parquet": parquet,
    "plain.txt": lambda path: path.write_text("\n\n\n".join(TEXTS), "utf-8"),
    "plain.txt.gz": lambda path: path.write_bytes(gzip.compress("\n\n\n".join(TEXTS).encode())),
}
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "surrogate": ("a.jsonl", b'{"text": "ok"}\n{"text": "\\ud800"}', r"a\.jsonl:2: half of"),
    "null": ("a.jsonl", b'{"text": "ok"}\n{"text": null}', r'a\.jsonl:2: "text" must be a string'),
    "no object": ("a.jsonl", b"[1]", r'a\.jsonl:1: expected a JSON object with "text"'),
    "no JSON": ("a.jsonl", b"{", r"a\.jsonl:1: expected a JSON object"),
    "deep": ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: expected a JSON object"),
    "chat": ("a.jsonl", b'{"messages": []}', "apply_chat_template"),
    "lines in .json": ("a.json", b'{"text": "a"}\n{"text": "b"}', "one object a line is .jsonl"),
    "object": ("a.json", b'{"text": "a"}', "expected an array of rows"),
    "column": ("a.csv", b"body,label\nx,1\n", 'no column "text": it has body, label'),
    "latin": ("a.txt", b"caf\xe9", "not UTF-8 at byte 3"),
    "binary": ("a.bin", b"a\0b", "no kind of text that is known"),
    "broken gzip": ("a.jsonl.gz", b"no gzip", "no whole gzip file"),
    "broken parquet": ("a.parquet", b"no parquet", "no sound Parquet file"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read_documents(tmp_path / name) == TEXTS


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused_by_file_and_row(case: str, tmp_path: Path) -> None:
    name, data, words = REFUSED[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SecateurError, match=words):
        read_documents(tmp_path / name)


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": " a "}\n{"body": " "}', "utf-8")
    assert read_documents(tmp_path / "a.jsonl", field="body") == ["a"]


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="cannot read the text file"):
        read_documents(tmp_path / "none.jsonl")
    with pytest.raises(SecateurError, match="is a folder"):
        read_documents(tmp_path)
