"""An artifact is whole or absent: whatever goes wrong, nothing that looks finished is left."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from secateur.graph.errors import ArtifactError
from secateur.runtime.save import disk, drafts
from secateur.runtime.save.artifact import MANIFEST, read_manifest, verify_artifact, write_artifact


def write(path: Path, text: str = "hello", **options: object) -> None:
    with write_artifact(path, **options) as draft:  # type: ignore[arg-type]
        (draft.folder / "inner").mkdir()
        (draft.folder / "inner" / "a.txt").write_text(text)
        draft.history.append({"name": "test"})


def test_written_artifact_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "new" / "out")
    manifest = verify_artifact(tmp_path / "new" / "out")
    assert list(manifest.files) == ["inner/a.txt"]
    assert manifest.num_bytes == 5
    assert manifest.history == ({"name": "test"},)
    assert manifest.versions["torch"]
    assert os.listdir(tmp_path / "new") == ["out"]


def test_own_artifact_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(ArtifactError, match=r"an earlier result: .*--overwrite"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "inner" / "a.txt").read_text() == "old"
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "inner" / "a.txt").read_text() == "new"
    assert verify_artifact(tmp_path / "out") and os.listdir(tmp_path) == ["out"]


def test_failed_replacement_keeps_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with (
        pytest.raises(ZeroDivisionError),
        write_artifact(tmp_path / "out", overwrite=True) as draft,
    ):
        (draft.folder / "a.txt").write_text("half")
        _ = 1 / 0
    assert (tmp_path / "out" / "inner" / "a.txt").read_text() == "old"
    assert verify_artifact(tmp_path / "out") and os.listdir(tmp_path) == ["out"]


def test_replacement_where_the_file_system_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "old")
    monkeypatch.setattr(
        disk.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=lambda *_: -1)
    )
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "inner" / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_artifact_moved_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / f".out{drafts.DRAFT}abcd_123{disk.ASIDE}")
    drafts.remove_leftovers(tmp_path / "out")
    assert verify_artifact(tmp_path / "out") and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), write_artifact(tmp_path / "out") as draft:
        (draft.folder / "a.txt").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(
            ArtifactError, match=r"not a finished result of secateur \(thesis.txt\)"
        ):
            write(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert verify_artifact(tmp_path / "out")


def test_file_at_the_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "x"


def test_file_in_the_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="a part of the path is a file"):
        write(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_as_an_ordinary_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="permission denied"):
        write(tmp_path / "out")


def test_unwritable_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(drafts.tempfile, "mkdtemp", refuse)
    with pytest.raises(ArtifactError, match="permission denied"):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_read_only_file_system() -> None:
    with pytest.raises(ArtifactError, match="cannot write"):
        write(Path("/proc/secateur-test/out"))


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="are needed"):
        write(tmp_path / "out", needed_bytes=1 << 60)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_full_while_writing(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(ArtifactError, match="disk is full"),
        write_artifact(tmp_path / "out") as draft,
    ):
        (draft.folder / "a.txt").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def write_beyond_the_limit(path: Path, result: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        with write_artifact(path) as draft:
            save_file({"a": torch.zeros(1 << 18)}, draft.folder / "a.safetensors")
    except ArtifactError as error:
        result.send(str(error))


def test_real_size_limit_while_writing(tmp_path: Path) -> None:
    """The kernel itself refuses (ulimit -f), inside safetensors' writer."""
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("fork").Process(
        target=write_beyond_the_limit, args=(tmp_path / "out", theirs)
    ).start()
    assert ours.poll(60) and "largest size allowed" in ours.recv()
    assert os.listdir(tmp_path) == []


def write_slowly(path: Path, ready: Connection) -> None:
    with write_artifact(path) as draft:
        (draft.folder / "a.txt").write_text("half")
        ready.send("ready")
        time.sleep(60)


def write_again_and_again(path: Path, ready: Connection) -> None:
    for number in itertools.count():
        with write_artifact(path, overwrite=True) as draft:
            (draft.folder / "a.txt").write_text(str(number))
        ready.send(number)


def start(
    target: Callable[[Path, Connection], None], path: Path
) -> multiprocessing.context.ForkProcess:
    """A process that writes, once it has said that it is on its way."""
    ours, theirs = multiprocessing.Pipe()
    writer = multiprocessing.get_context("fork").Process(target=target, args=(path, theirs))
    writer.start()
    ours.recv()
    return writer


def test_killed_writer_leaves_nothing_finished_and_is_cleaned_up(tmp_path: Path) -> None:
    writer = start(write_slowly, tmp_path / "out")
    writer.kill()
    writer.join()
    left = os.listdir(tmp_path)
    assert len(left) == 1 and left[0].startswith(f".out{drafts.DRAFT}")
    with pytest.raises(ArtifactError, match="not a finished"):
        read_manifest(tmp_path / left[0])
    write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_draft_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    writer = start(write_slowly, tmp_path / "out")
    try:
        write(tmp_path / "out")
        assert any(name.startswith(f".out{drafts.DRAFT}") for name in os.listdir(tmp_path))
    finally:
        writer.kill()
        writer.join()


def test_kill_at_any_moment_of_a_replacement(tmp_path: Path) -> None:
    """There is a valid artifact at the path whenever one looks."""
    for pause in (0.0, 0.001, 0.003, 0.006, 0.011, 0.02):
        writer = start(write_again_and_again, tmp_path / "out")
        time.sleep(pause)
        writer.kill()
        writer.join()
        assert verify_artifact(tmp_path / "out").files
    write(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def damage_size(folder: Path) -> None:
    (folder / "inner" / "a.txt").write_text("hell")


def damage_content(folder: Path) -> None:
    (folder / "inner" / "a.txt").write_text("jello")


def remove(folder: Path) -> None:
    (folder / "inner" / "a.txt").unlink()


def add_code(folder: Path) -> None:
    (folder / "modeling.py").write_text("print('hello')")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damage_size, "4 bytes instead of 5"),
        (damage_content, "content of inner/a.txt has changed"),
        (remove, "inner/a.txt is missing"),
        (add_code, "modeling.py is not in the manifest"),
    ],
)
def test_changed_artifact_is_refused(tmp_path: Path, change: object, words: str) -> None:
    write(tmp_path / "out")
    change(tmp_path / "out")  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=words):
        verify_artifact(tmp_path / "out")


def test_sizes_alone_do_not_see_a_changed_byte(tmp_path: Path) -> None:
    write(tmp_path / "out")
    damage_content(tmp_path / "out")
    assert verify_artifact(tmp_path / "out", hashes=False).files


def test_note_of_the_user_is_tolerated(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    assert verify_artifact(tmp_path / "out").files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 99}, "open it with the version"),
        ({"files": {"../outside": {"bytes": 1, "sha256": ""}}}, "outside the artifact"),
        ({"files": {"a": {}}}, "damaged"),
        ({"files": 3}, "damaged"),
    ],
)
def test_bad_manifest_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    write(tmp_path / "out")
    file = tmp_path / "out" / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ArtifactError, match=words):
        read_manifest(tmp_path / "out")


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with write_artifact(tmp_path / "out") as draft:
            (draft.folder / "a.txt").write_text("x")
            (draft.folder / "a.txt").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "a.txt").stat().st_mode & 0o777 == 0o644
