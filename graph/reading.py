"""The boundary between files that others wrote and this package: what a reader raises becomes a
sentence.

Whoever reads a file that a person or another tool gave does so inside ``reading``: then the only
exceptions that leave are those of ``errors``, each naming the place, and never a whole value of the
file.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.graph.errors import SecateurError, SourceError

MAX_DEPTH = 64
MAX_NUMBER_DIGITS = 40
SHOWN_CHARACTERS = 80
REASON_CHARACTERS = 300
LFS = b"version https://git-lfs.github.com/spec/"
AGAIN = "Fetch or save it again"


@contextmanager
def reading(
    where: object, kind: type[SecateurError] = SourceError, mend: str = AGAIN
) -> Iterator[None]:
    """Turn whatever a reader raises into one sentence; errors of this package pass as they are.

    Args:
        where: the file, or the file and the place in it.
        kind: the class of the error to raise.
        mend: what to do about it.

    Raises:
        SecateurError: of that kind; the reader's own exception is its cause.
    """
    try:
        yield
    except (SecateurError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # readers share no root: the tokenizers library raises a bare Exception
        raise kind(f"{where} cannot be read: {reason_of(error)}. {mend}") from error


def reason_of(error: BaseException) -> str:
    """The first line of an exception, short and printable; its class where it says nothing.

    Args:
        error: any exception.
    """
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, KeyError):
        return f"{shown(error.args[0] if error.args else '')} is missing or unknown"
    lines = []
    for line in str(error).splitlines():
        if line.strip():
            lines.append(line.strip())
    if lines:
        text = printable(lines[0])
    else:
        text = type(error).__name__
    if len(text) > REASON_CHARACTERS:
        text = text[:REASON_CHARACTERS] + "..."
    return text.rstrip(".")


def shown(value: object) -> str:
    """A value as it may stand in a message: printable, and never longer than a line.

    Args:
        value: anything that was read.
    """
    try:
        text = _cut(value)
    except Exception:  # a number beyond the limit of digits, a value nested too deep
        text = f"a {type(value).__name__} too large to print"
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return text[: SHOWN_CHARACTERS - 3] + "..."


def printable(text: str) -> str:
    """A text whose control characters and lone surrogates are written as escapes; line ends stay.

    Args:
        text: perhaps of a hostile file.
    """
    return "".join(
        one
        if one == "\n" or unicodedata.category(one) not in ("Cc", "Cs", "Cf")
        else repr(one)[1:-1]
        for one in text
    )


def lfs_pointer(data: bytes) -> bool:
    """Whether the beginning of a file is that of a git-lfs pointer, which stands for a file not
    fetched.

    Args:
        data: its first bytes, at least 48.
    """
    return data.startswith(LFS)


def parse_json(text: str | bytes, where: object, kind: type[SecateurError] = SourceError) -> Any:
    """A JSON value, not nested beyond 64 levels and without numbers of more than 40 digits.

    Args:
        text: UTF-8 where it is bytes; a byte order mark is passed over.
        where: the file, for messages.
        kind: the class of the error to raise.

    Raises:
        SecateurError: of that kind: not JSON, a name given twice, too deep, a number too long.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise kind(f"{where} cannot be read as JSON: {reason_of(error)}. {AGAIN}") from error
    if _deeper(value, MAX_DEPTH):
        raise kind(f"{where} cannot be read as JSON: it is nested deeper than {MAX_DEPTH}. {AGAIN}")
    return value


def read_json_object(file: Path, kind: type[SecateurError] = SourceError) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        file: to read.
        kind: the class of the error to raise.

    Raises:
        SecateurError: of that kind: unreadable, what ``parse_json`` refuses, or not an object.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        why = error.strerror or reason_of(error)
        raise kind(f"{file} cannot be read: {why}. {AGAIN}") from error
    if lfs_pointer(data):
        raise kind(
            f"{file} is a git-lfs pointer and not the file: run `git lfs pull` where it was cloned"
        )
    value = parse_json(data, file, kind)
    if not isinstance(value, dict):
        found = type(value).__name__
        raise kind(f"{file} holds a JSON {found} instead of an object. {AGAIN}")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"the name {shown(twice)} appears twice")
    return found


def _deeper(value: Any, levels: int) -> bool:
    """Whether a value is nested beyond so many levels; asked level by level, without recursion."""
    front = [value]
    for _ in range(levels + 1):
        inner = list[Any]()
        for one in front:
            if isinstance(one, dict):
                inner.extend(one.values())
            elif isinstance(one, list):
                inner.extend(one)
        front = inner
    return bool(front)


def _cut(value: object) -> str:
    """The repr of a value of which no more is looked at than is shown."""
    if isinstance(value, str):
        return printable(repr(value[: SHOWN_CHARACTERS + 1]))
    if isinstance(value, bytes):
        return repr(value[: SHOWN_CHARACTERS + 1])
    if isinstance(value, dict | list | tuple | set | frozenset) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value):,} entries"
    return printable(repr(value))
