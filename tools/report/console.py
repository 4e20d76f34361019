"""How the command line talks: results on stdout, everything else on stderr, exit codes that mean
one thing each."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from secateur.graph import SecateurError
from secateur.graph.reading import printable, reason_of

T = TypeVar("T")
FAILED = 1
BAD_INPUT = 2
INTERNAL = 70


class BadInput(SecateurError):
    """What was asked for cannot be done; nothing was begun."""


@dataclass(frozen=True)
class CommandConsole:
    """Where a command writes.

    as_json: stdout carries one JSON document and nothing else.
    """

    as_json: bool = False

    @property
    def err(self) -> Console:
        """The console of everything but the result."""
        return Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        """A line for the person who waits."""
        self.err.print(text, markup=False)

    def result(self, value: object, tables: Iterable[Table | str]) -> None:
        """The result: JSON, or tables for a person."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
            return
        console = Console(highlight=False)
        for table in tables:
            console.print(table)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner around work of unknown length."""
        with self.err.status(what):
            yield

    def progress(
        self, items: Iterable[T], description: str, total: int | None = None
    ) -> Iterable[T]:
        """A bar with the time left."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
        with Progress(
            *columns, *times, console=self.err, transient=True, disable=not self.err.is_terminal
        ) as bar:
            yield from bar.track(items, total=total, description=description)


@contextmanager
def before_work() -> Iterator[None]:
    """Whatever is refused in here is the caller's input, not a failed job."""
    try:
        yield
    except BadInput:
        raise
    except SecateurError as error:
        raise BadInput(str(error)) from error


def report_error(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Say what went wrong; returns the exit code."""
    code = FAILED
    if isinstance(error, BadInput):
        code = BAD_INPUT
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    if debug:
        err.print_exception()
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    err.print(printable(f"error: {error}{notes}"), markup=False, style="red")
    if as_json:
        sys.stdout.write(json.dumps({"error": str(error), "exit_code": code}) + "\n")
    return code


def report_internal(error: Exception, *, as_json: bool, debug: bool) -> int:
    """Say that secateur itself failed, where, and how to report it; returns the exit code.

    Args:
        error: what no part of the program expected.
        as_json: one JSON document on stdout as well.
        debug: with the traceback.
    """
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    if debug:
        err.print_exception()
    frames = traceback.extract_tb(error.__traceback__)
    place = "an unknown place"
    if frames:
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    text = f"internal error: {type(error).__name__}: {reason_of(error)} ({place})"
    err.print(printable(text), markup=False, style="red")
    err.print(
        "This is a fault of secateur: please report it with the command, this line, and what the "
        "same command prints "
        "with --debug. Nothing was written to an output folder that is not whole.",
        markup=False,
    )
    if as_json:
        sys.stdout.write(json.dumps({"error": text, "exit_code": INTERNAL}) + "\n")
    return INTERNAL


def log_to_stderr(verbose: bool) -> None:
    """Show the library's log: refusals and choices with --verbose, else warnings."""
    logger = logging.getLogger("secateur")
    logger.handlers = [
        RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)
    ]
    logger.setLevel(logging.WARNING)
    if verbose:
        logger.setLevel(logging.INFO)
