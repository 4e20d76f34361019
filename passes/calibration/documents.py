"""Documents of text files: one reader for calibration, training and evaluation.

JSON lines, JSON arrays, CSV, Parquet and plain text, each also compressed by gzip where it is text.
Lines of JSON end at a line feed alone: U+2028 and U+0085 are letters of a text, not ends of lines.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from secateur.graph.errors import SecateurError
from secateur.graph.reading import lfs_pointer

DOCUMENT_BREAK = "\n\n\n"
PLAIN = frozenset({"", ".txt", ".text", ".md", ".rst"})
KNOWN = ".jsonl, .json (an array), .csv, .parquet, .txt, and .gz of these but Parquet"
SHOWN = 60


Render = Callable[[list[object]], str]
"""Writes the messages of a conversation as one text, as a chat template does."""


def read_documents(
    path: Path,
    *,
    field: str = "text",
    render: Render | None = None,
    error: type[SecateurError] = SecateurError,
) -> list[str]:
    """Read the documents of one file.

    Args:
        path: the file; its ending says what it holds.  Of ``.jsonl``, ``.json``, ``.csv`` and
            ``.parquet`` each row is a document; any other file is UTF-8 text whose documents are
            separated by two empty lines (a file without them is one document).
        field: the key or the column of the text in a row.
        render: writes conversations (rows with ``messages`` and without the field) as text; None
            refuses them.
        error: the class of the errors raised.

    Returns:
        The documents without surrounding white space, empty ones left out.

    Raises:
        SecateurError: as ``error``; a file that cannot be read, or a row without text; names file
            and row.
    """
    if path.is_dir():
        raise error(f"{path} is a folder: give the text files in it, one by one")
    try:
        with path.open("rb") as stream:
            beginning = stream.read(64)
        if lfs_pointer(beginning):
            raise error(
                f"{path} is a git-lfs pointer and not the text: run `git lfs pull` where it was "
                "cloned"
            )
        rows = list(_iterate_rows(path, field, render, error))
    except OSError as failure:
        reason = failure.strerror or str(failure)
        raise error(f"cannot read the text file {path}: {reason}") from failure
    documents: list[str] = []
    for place, text in rows:
        if not isinstance(text, str):
            raise error(f'{place}: "{field}" must be a string, got {type(text).__name__}')
        if not _is_encodable(text):
            raise error(f"{place}: half of a surrogate pair, which is no text: remove it")
        if text.strip():
            documents.append(text.strip())
    return documents


def _iterate_rows(
    path: Path, field: str, render: Render | None, error: type[SecateurError]
) -> Iterator[tuple[str, object]]:
    """Yield where a text stands, and the text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_compressed = suffixes[-1:] == [".gz"]
    if is_compressed:
        suffixes = suffixes[:-1]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        return _parquet_rows(path, field, error)
    data = path.read_bytes()
    if is_compressed:
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError) as failure:
            raise error(f"{path} is no whole gzip file ({failure}): fetch it again") from failure
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(
            f"{path} is not UTF-8 at byte {failure.start}: convert it to UTF-8 text or .jsonl"
        ) from failure
    if kind == ".jsonl":
        return _json_lines(path, text, field, render, error)
    if kind == ".json":
        return _json_array(path, text, field, render, error)
    if kind == ".csv":
        return _csv_rows(path, text, field, error)
    if kind not in PLAIN and ("\0" in text or is_compressed):
        raise error(f"{path}: no kind of text that is known ({KNOWN})")
    parts = text.replace("\r\n", "\n").split(DOCUMENT_BREAK)
    return iter([(str(path), part) for part in parts])


def _json_lines(
    path: Path, text: str, field: str, render: Render | None, error: type[SecateurError]
) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as failure:
            raise error(
                f'{place}: expected a JSON object with "{field}", got {line[:SHOWN]!r}'
            ) from failure
        yield place, _text_of(value, field, render, place, error)


def _json_array(
    path: Path, text: str, field: str, render: Render | None, error: type[SecateurError]
) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as failure:
        raise error(
            f"{path} is no JSON ({str(failure)[:SHOWN]}): a file of one object a line is .jsonl"
        ) from failure
    if not isinstance(rows, list):
        raise error(f"{path}: expected an array of rows, got {type(rows).__name__}")
    for number, value in enumerate(rows, 1):
        place = f"{path}, row {number}"
        if isinstance(value, str):
            yield place, value
        else:
            yield place, _text_of(value, field, render, place, error)


def _text_of(
    value: object, field: str, render: Render | None, place: str, error: type[SecateurError]
) -> object:
    if not isinstance(value, dict) or field not in value:
        if isinstance(value, dict) and "messages" in value:
            return _render_messages(value["messages"], field, render, place, error)
        raise error(
            f'{place}: expected a JSON object with "{field}", got {json.dumps(value)[:SHOWN]!r}'
        )
    return value[field]


def _render_messages(
    messages: object, field: str, render: Render | None, place: str, error: type[SecateurError]
) -> str:
    if render is None:
        raise error(
            f'{place}: a row of chat messages and no "{field}": write each conversation as '
            f"text first, by the tokenizer's apply_chat_template(..., tokenize=False)"
        )
    if not isinstance(messages, list):
        raise error(f'{place}: "messages" must be a list, got {type(messages).__name__}')
    try:
        return render(messages)
    except Exception as failure:  # a template is a program in a sandbox, and raises what it likes
        raise error(
            f"{place}: the chat template does not take these messages ({str(failure)[:SHOWN]})"
        ) from failure


def _csv_rows(
    path: Path, text: str, field: str, error: type[SecateurError]
) -> Iterator[tuple[str, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or ()
        _check_column(path, columns, field, error)
        for number, row in enumerate(reader, 1):
            yield f"{path}, row {number}", row[field] or ""
    except csv.Error as failure:
        raise error(f"{path}:{reader.line_num}: no CSV ({failure})") from failure


def _parquet_rows(
    path: Path, field: str, error: type[SecateurError]
) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as failure:
        raise error(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from failure
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_column(path, file.schema_arrow.names, field, error)
        number = 0
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield f"{path}, row {number}", value
    except pyarrow.ArrowException as failure:
        raise error(f"{path} is no sound Parquet file ({str(failure)[:SHOWN]})") from failure


def _check_column(
    path: Path, columns: Iterable[str], field: str, error: type[SecateurError]
) -> None:
    names = list(columns)
    if field not in names:
        raise error(f'{path} has no column "{field}": it has {", ".join(names)[:SHOWN] or "none"}')


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
