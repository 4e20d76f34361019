"""Run as a script: starts ``secateur compress`` again and again and kills it with SIGKILL, until it
ends by itself.

It imports everything once and forks each run, so that a run costs its own work alone.  Argument: a
JSON object with
``arguments`` (of compress, without -o), ``folder`` (of the outputs) and ``kills``: a list of lists,
one a series of runs with one output; each entry is the number of the disk operation before which a
run dies, or seconds that it may live (a number with a point); after the last a run is left alone.
Prints for each series: exit codes (-9: killed), SHA-256 of the weights, what lies in the folder,
    and the number of disk operations of the last run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.tools.cli import run_command
from secateur.tools.commands import compress as compress_command

OPERATIONS = [
    (os, "replace"),
    (os, "fsync"),
    (shutil, "rmtree"),
    (pathlib.Path, "unlink"),
    (pathlib.Path, "rename"),
    (pathlib.Path, "mkdir"),
    (pathlib.Path, "rmdir"),
]


def die_before(operation: int | None, report: Path) -> None:
    """Count the operations that change the disk, and kill this process before the given one."""
    done = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            report.write_text(str(done))
            if done == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for owner, name in OPERATIONS:
        setattr(owner, name, counted(getattr(owner, name)))


def start(arguments: list[str], log: Path, report: Path, kill: float | int | None) -> int:
    """One run in a child, killed as told; its exit code."""
    child = os.fork()
    if child == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        compress_command.save = functools.partial(compress_command.save, check=False)
        die_before(kill if isinstance(kill, int) else None, report)
        os._exit(run_command(arguments))
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def series(
    number: int, arguments: list[str], folder: Path, kills: list[float | int]
) -> dict[str, Any]:
    place, log, report = (
        folder / str(number),
        folder / f"{number}.log",
        folder / f"{number}.operations",
    )
    place.mkdir(parents=True)
    command = ["compress", *arguments, "-o", str(place / "out")]
    began = time.perf_counter()
    codes = [start(command, log, report, kill) for kill in [*kills, None]]
    weights = place / "out" / "model.safetensors"
    return {
        "codes": codes,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()
        if weights.is_file()
        else log.read_text()[-2000:],
        "left": sorted(path.name for path in place.iterdir()),
        "operations": int(report.read_text()),
        "seconds": round(time.perf_counter() - began, 2),
        "told": log.read_text(),
    }


def main() -> None:
    given = json.loads(sys.argv[1])
    found = [
        series(n, given["arguments"], Path(given["folder"]), kills)
        for n, kills in enumerate(given["kills"])
    ]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
