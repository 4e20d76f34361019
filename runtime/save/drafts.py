"""Drafts of artifacts: hidden folders beside the target, locked while their writer lives, and what
is left of them."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from secateur.graph.errors import ArtifactError
from secateur.runtime.save.disk import ASIDE, try_lock
from secateur.runtime.save.manifest import MANIFEST, read_manifest

log = logging.getLogger(__name__)

DRAFT = ".draft-"
MARK = ".secateur-draft"
"""An empty file that says of a folder: a draft, all of it ours. It goes when the manifest is
there."""
LEFT = ".left"


def locked_draft(target: Path) -> tuple[Path, int]:
    """Make a marked draft folder beside `target`.

    Returns:
        The folder, and the lock that says its writer lives.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}{DRAFT}", dir=target.parent))
        lock = try_lock(folder)
        if lock is None:  # another writer has taken it for a leftover before it was locked
            continue
        try:
            (folder / MARK).touch()
            return folder, lock
        except FileNotFoundError:
            os.close(lock)
        except OSError:
            folder.rmdir()
            os.close(lock)
            raise


def remove_leftovers(target: Path) -> list[Path]:
    """Remove the drafts that killed writers of `target` left behind; a living writer's draft is
    locked and stays."""
    removed = []
    name = re.compile(re.escape(f".{target.name}{DRAFT}") + rf"[a-z0-9_]{{8}}({re.escape(ASIDE)})?")
    for draft in sorted(target.parent.iterdir()):
        if not name.fullmatch(draft.name):
            continue
        if draft.suffix == ASIDE and not target.exists():
            # killed between the two renames of an exchange
            draft.rename(target)
            continue
        lock = try_lock(draft)
        if lock is not None:
            if clear(draft, target):
                removed.append(draft)
            os.close(lock)
    return removed


def clear(folder: Path, target: Path) -> bool:
    """Remove a draft, or the earlier result that an exchange left in its place; nothing else.

    What somebody put into an earlier result while it was replaced is moved to a name that is seen.

    Returns:
        Whether the folder is gone.
    """
    if folder.is_symlink() or not folder.is_dir():
        return not folder.exists()
    if (folder / MARK).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    if (folder / MANIFEST).is_file():
        _remove_listed(folder)
    if _are_folders(folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)
    elif (folder / MANIFEST).is_file():
        _set_aside(folder, target)
    return not folder.exists()


def _remove_listed(folder: Path) -> None:
    """Remove what a result's manifest lists, and at last the manifest, if nothing else is there."""
    with suppress(ArtifactError):
        for name, record in read_manifest(folder).files.items():
            file = folder / name
            if not file.is_symlink() and file.is_file() and file.stat().st_size == record.bytes:
                file.unlink(missing_ok=True)
        others = [path for path in folder.rglob("*") if path != folder / MANIFEST]
        if _are_folders(others):
            (folder / MANIFEST).unlink(missing_ok=True)


def _are_folders(paths: Iterable[Path]) -> bool:
    return all(path.is_dir() and not path.is_symlink() for path in paths)


def _set_aside(folder: Path, target: Path) -> None:
    number = 1
    aside = target.with_name(f"{target.name}{LEFT}-{number}")
    while aside.exists():
        number += 1
        aside = target.with_name(f"{target.name}{LEFT}-{number}")
    folder.rename(aside)
    log.warning("files that no result brought are kept in %s", aside)
