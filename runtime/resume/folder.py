"""The work folder of a run: ``smaller.work`` beside the output ``smaller``.

It holds what the run was begun with (``fingerprint.json``), the Program after the last finished
pass, and a folder of its own for the pass that runs.  It outlives a kill and is removed when the
output is whole.  A run with another fingerprint is refused, and so is a second process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.graph import Program, SecateurError
from secateur.graph.errors import ArtifactError
from secateur.graph.program import JSON
from secateur.graph.reading import read_json_object
from secateur.passes import Pipeline, Sample
from secateur.passes.storage.journal import UNFINISHED, Journal
from secateur.runtime.resume.fingerprint import (
    code_digest,
    hash_parameters,
    list_differences,
    run_fingerprint,
)
from secateur.runtime.resume.prefix import (
    count_common_passes,
    describe_change,
    list_prefix_differences,
)
from secateur.runtime.resume.state import rebuild_program, state_of
from secateur.runtime.save.artifact import read_manifest
from secateur.runtime.save.disk import explain_error, flush_tree, try_lock, write_synced

log = logging.getLogger(__name__)

SUFFIX = ".work"
FINGERPRINT = "fingerprint.json"
OURS = re.compile(rf"{re.escape(FINGERPRINT)}({re.escape(UNFINISHED)})?|\d{{3,}}-.+")
"""Names in a work folder that runs use; nothing else in it is ever removed."""
RUN = "run"
"""Figure in the manifest of a result: what the run was begun with, as a digest."""
SHOWN = 8


class ResumeError(ArtifactError):
    """A run cannot go on from what is kept; nothing was touched."""


class Work:
    """What a run keeps in its work folder; a pipeline's ``Checkpoints``."""

    def __init__(
        self,
        folder: Path,
        source: Mapping[str, str],
        tell: Callable[[str], None] = log.info,
        run: str = "",
    ) -> None:
        """Open what a run keeps.

        Args:
            folder: the work folder.
            source: ``digests`` of the captured source.
            tell: gets a line where the run goes on from something kept.
            run: digest of what the run was begun with.
        """
        self.path = folder
        self.run = run
        self._journal = Journal(folder)
        self._source = source
        self._tell = tell

    def made(self, output: str | Path) -> bool:
        """Whether a result is of this very run, which was then killed before its work folder was
        removed."""
        try:
            return bool(self.run) and read_manifest(output).figures.get(RUN) == self.run
        except (ArtifactError, AttributeError):
            return False

    def restore(self, program: Program) -> tuple[int, Program]:
        """Build the Program again that the last finished pass left.

        Args:
            program: as it was captured.

        Returns:
            The position of that pass and its Program; 0 and the captured one where there is none.
        """
        for entry in reversed(self._journal.names()):
            position, _, name = entry.partition("-")
            state = self._journal.read(entry)
            try:
                restored = None
                if state:
                    restored = rebuild_program(program, state)
            except SecateurError as error:
                log.warning(
                    "what %s left cannot be built again (%s): it is done once more", name, error
                )
                continue
            if restored is not None:
                self._tell(f"going on after pass {int(position)}, {name}, as kept in {self.path}")
                self._drop_before(int(position))
                return int(position), restored
        if _has_progress(self.path):
            self._tell(f"going on inside the first pass, as kept in {self.path}")
        return 0, program

    def pass_folder(self, position: int, name: str) -> Path:
        """Make the folder in which a pass may keep what it has finished.

        Args:
            position: of the pass, from 1.
            name: of the pass.

        Returns:
            The folder, without the temporary folders of a run that was killed.
        """
        folder = self.path / _pass_label(position, name)
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(f"{tempfile.gettempprefix()}*"):
            _remove_path(leftover)
        return folder

    def store(self, position: int, name: str, program: Program) -> None:
        """Keep the Program that a pass left, and remove what was needed to make it.

        Args:
            position: of the pass, from 1.
            name: of the pass.
            program: what it left.
        """
        state = state_of(program, self._source)
        self._journal.write(_pass_label(position, name), state.tensors, state.facts)
        self._drop_before(position)

    def _drop_before(self, position: int) -> None:
        """Remove what the pass at a position and those before it no longer need: all but the
        Program it left."""
        for path in self.path.iterdir():
            number, dash, _ = path.name.partition("-")
            if not dash or not number.isdigit():
                continue
            if int(number) < position or (int(number) == position and path.is_dir()):
                _remove_path(path)


def work_folder(output: str | Path) -> Path:
    """Where the run of an output keeps its state: beside it, links resolved."""
    place = Path(output).expanduser().absolute().resolve()
    return place.with_name(place.name + SUFFIX)


def is_at_work(output: str | Path) -> bool:
    """Whether a run of an output has begun and not ended."""
    return work_folder(output).is_dir()


@contextmanager
def hold_work_folder(
    output: str | Path,
    program: Program,
    pipeline: Pipeline,
    data: Sequence[Sample] | None,
    seed: int,
    *,
    restart: bool = False,
    keep_work: bool = False,
    tell: Callable[[str], None] = log.info,
) -> Iterator[Work]:
    """Hold the work folder of an output while a run goes on.  When the block ends well, the folder
    is removed; after an exception it stays, if anything is kept in it.

    A run that was begun with other passes serves as far as its finished passes are those that are
    asked for; what goes beyond them is dropped, and told.

    Args:
        output: the folder that the run makes.
        program: as it was captured.
        pipeline: the passes.
        data: calibration sequences that the passes will get.
        seed: that the passes will get.
        keep_work: leave the folder when the block ends well, so that passes can be appended.
        restart: forget what an earlier run kept.
        tell: gets a line where the run goes on from something kept, and where something is kept for
            a next one.

    Raises:
        ResumeError: another process works there; the folder was begun with something else, or is
            not ours.
    """
    folder = work_folder(output)
    source = hash_parameters(program)
    begun_with = run_fingerprint(program, source, pipeline, data, seed)
    lock = _lock_folder(folder)
    finished = False
    try:
        _begin_run(folder, begun_with, pipeline, restart, tell)
        try:
            yield Work(folder, source, tell, _digest(begun_with))
            finished = True
        finally:
            if finished and keep_work:
                tell(f"kept in {folder}: the same command with passes appended goes on from there")
            elif finished or not _has_progress(folder):
                _clear_folder(folder)
                _remove_if_empty(folder, tell)
            else:
                tell(f"what was finished is kept in {folder}: the same command goes on from there")
    finally:
        os.close(lock)


def _lock_folder(folder: Path) -> int:
    """The lock of the work folder, which is made where it is not there."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResumeError(
                f"cannot make the work folder {folder}: {explain_error(error)}"
            ) from error
        lock = try_lock(folder)
        if lock is None:
            raise ResumeError(
                f"another process is at work in {folder}: wait until it ends, or give another "
                "output folder"
            )
        if folder.is_dir() and os.path.samestat(os.fstat(lock), folder.stat()):
            return lock
        os.close(lock)  # the process before removed the folder between the two steps


def _begin_run(
    folder: Path,
    now: JSON,
    pipeline: Pipeline,
    restart: bool,
    tell: Callable[[str], None],
) -> None:
    """Write what the run is begun with, or compare it with what is there."""
    file = folder / FINGERPRINT
    now = json.loads(json.dumps({"begun with": now, "code": code_digest()}))
    if not file.is_file():
        foreign = []
        for path in folder.iterdir():
            if not path.name.startswith(FINGERPRINT):
                foreign.append(path.name)
        if foreign:
            raise ResumeError(
                f"{folder} holds files that no run kept ({foreign[0]}): move them, or give "
                "another output"
            )
    elif restart:
        _clear_folder(folder)
    else:
        _compare_fingerprints(folder, _read_json(file), now, pipeline, tell)
    if not file.is_file() or _read_json(file).get("begun with") != now["begun with"]:
        part = folder / (FINGERPRINT + UNFINISHED)
        write_synced(part, json.dumps(now, indent=1) + "\n")
        os.replace(part, file)
        flush_tree(folder, deep=False)


def _compare_fingerprints(
    folder: Path,
    then: JSON,
    now: JSON,
    pipeline: Pipeline,
    tell: Callable[[str], None],
) -> None:
    """Refuse to go on with something else than what the run was begun with, unless other passes
    come after those that are finished; a change of our own code is told."""
    if changed := list_differences(then.get("begun with"), now["begun with"]):
        _go_on_with_others(folder, then.get("begun with"), now["begun with"], pipeline, tell)
        log.info("begun with something else: %s", "; ".join(changed))
    if then.get("code") != now["code"]:
        tell(
            "the sources of secateur have changed since this run began: its bits may differ from "
            "those of a whole run"
        )


def _go_on_with_others(
    folder: Path, then: Any, now: JSON, pipeline: Pipeline, tell: Callable[[str], None]
) -> None:
    """Drop what a kept run had begun of a pass that is no more asked for.

    Raises:
        ResumeError: a finished pass, or something that it depends on, is another now.
    """
    changed = list_differences(then, now)
    if not isinstance(then, Mapping):
        raise ResumeError(_refuse_changed(folder, changed))
    common = min(count_common_passes(then, now), len(pipeline.passes_to_run))
    finished = max((int(entry.partition("-")[0]) for entry in Journal(folder).names()), default=0)
    if common < max(finished, 1):
        raise ResumeError(_refuse_changed(folder, changed))
    if differences := list_prefix_differences(then, now, pipeline, common):
        raise ResumeError(_refuse_changed(folder, differences))
    tell(describe_change(then, now, common))
    for path in sorted(folder.iterdir()):
        number, dash, name = path.name.partition("-")
        if dash and number.isdigit() and int(number) > common and OURS.fullmatch(path.name):
            tell(f"what pass {int(number)}, {name}, had begun is dropped")
            _remove_path(path)


def _has_progress(folder: Path) -> bool:
    """Whether a work folder holds something that a next run can go on from."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != FINGERPRINT and path.suffix != UNFINISHED:
            return True
    return False


def _clear_folder(folder: Path) -> None:
    """Remove what a run kept, what it was begun with last, so that a kill in between leaves a sound
    work folder."""
    for path in sorted(folder.iterdir(), key=lambda p: p.name == FINGERPRINT):
        if OURS.fullmatch(path.name):
            _remove_path(path)


def _remove_if_empty(folder: Path, tell: Callable[[str], None]) -> None:
    if names := sorted(path.name for path in folder.iterdir()):
        tell(f"{folder} stays: it holds files that the run did not make ({names[0]})")
    else:
        folder.rmdir()


def _digest(begun_with: JSON) -> str:
    return hashlib.sha256(json.dumps(begun_with, sort_keys=True).encode()).hexdigest()


def _remove_path(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_json(file: Path) -> JSON:
    try:
        return read_json_object(file, ResumeError)
    except ResumeError as error:
        raise ResumeError(
            f"{file} is damaged ({error}): start afresh with restart (--restart)"
        ) from error


def _refuse_changed(folder: Path, changed: list[str]) -> str:
    lines = [f"{folder} keeps a run that was begun with something else:", *changed[:SHOWN]]
    if len(changed) > SHOWN:
        lines.append(f"and {len(changed) - SHOWN} more")
    lines.append(
        "Go on with what it was begun with, give another output folder, or forget it with "
        "restart (--restart)"
    )
    return "\n  ".join(lines)


def _pass_label(position: int, name: str) -> str:
    return f"{position:03d}-{name}"
