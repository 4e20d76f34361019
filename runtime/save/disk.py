"""The few things that this package asks of a file system: flush, exchange two folders atomically,
explain a failure."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
from pathlib import Path

ASIDE = ".old"
AT_FDCWD = -100
RENAME_EXCHANGE = 2
REASONS = {
    errno.ENOSPC: "the disk is full; free some space, or choose another disk",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose another disk",
    errno.EFBIG: "a file would pass the largest size allowed here; raise the limit (ulimit -f), or "
    "choose another disk",
    errno.EACCES: "permission denied; choose a folder that you may write",
    errno.EPERM: "permission denied; choose a folder that you may write",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EEXIST: "a part of the path is a file; choose another folder",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk reports an input/output error; check it, or choose another one",
}


def is_disk_failure(error: BaseException) -> bool:
    """Whether an exception says that the disk refused: an OSError, or safetensors' text of one."""
    return _error_number(error) in REASONS


def explain_error(error: BaseException) -> str:
    """Why the disk refused, and what to do."""
    return REASONS.get(_error_number(error), str(error))


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write there."""
    return shutil.disk_usage(folder).free


def write_synced(file: Path, text: str) -> None:
    """Write a text file (UTF-8) and wait until it is on the disk."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def flush_tree(folder: Path, *, deep: bool = True) -> None:
    """Wait until a folder's entries, and with `deep` all files below it, are on the disk."""
    inside = list[Path]()
    if deep:
        inside = sorted(folder.rglob("*"), reverse=True)
    for path in [*inside, folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def try_lock(folder: Path) -> int | None:
    """An open, exclusively locked descriptor of a folder, or None if its writer lives.  The kernel
    frees the lock of a killed process."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def exchange_folders(new: Path, old: Path) -> None:
    """Swap two folders in one step.  Where the file system cannot, two renames come close: the old
    folder is moved aside under the new one's name, and moved back if the second rename fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    rename = getattr(libc, "renameat2", None)
    if (
        rename
        and rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0
    ):
        return
    aside = new.with_name(new.name + ASIDE)
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _error_number(error: BaseException) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number:
        return int(number.group(1))
    return 0
