"""The artifact: a folder that is whole or absent.

It is written into a hidden sibling on the same file system; every file is flushed to disk, then the
manifest
``secateur.json`` (size and SHA-256 of each file) is written last, and one rename makes the folder
appear.  An earlier result is replaced only when asked, and by an atomic exchange, so that there is
never a moment without a valid one; where the file system knows no exchange, two renames come close,
and the next save mends what a kill between them left.

Nothing is removed but what the manifest of an earlier result lists, unchanged: a folder with
anything else in it is refused.  A draft is locked while its writer lives and carries a mark: what a
killed writer left behind is recognised by its free lock and its mark, or its manifest, and removed
by the next save.
"""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from secateur.graph.errors import ArtifactError
from secateur.graph.program import JSON
from secateur.runtime.save.disk import (
    exchange_folders,
    explain_error,
    flush_tree,
    free_bytes,
    is_disk_failure,
    write_synced,
)
from secateur.runtime.save.drafts import MARK, clear, locked_draft, remove_leftovers
from secateur.runtime.save.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    FileRecord,
    Manifest,
    artifact_faults,
    files_below,
    foreign_files,
    read_manifest,
    sha256_of,
    verify_artifact,
)
from secateur.runtime.save.target import refuse_inputs, resolve_target

__all__ = [
    "MANIFEST",
    "Draft",
    "FileRecord",
    "Manifest",
    "artifact_faults",
    "check_target",
    "collect_versions",
    "read_manifest",
    "remove_leftovers",
    "verify_artifact",
    "write_artifact",
]

SHOWN = 3


@dataclass
class Draft:
    """An artifact being written: files go into ``folder``; history and figures go into its
    manifest."""

    folder: Path
    history: list[JSON] = field(default_factory=list)
    figures: JSON = field(default_factory=dict)


@contextmanager
def write_artifact(
    path: str | Path,
    *,
    needed_bytes: int = 0,
    overwrite: bool = False,
    inputs: Iterable[str | Path | None] = (),
) -> Iterator[Draft]:
    """Write an artifact; it appears at `path` when the block ends without an exception, and not
    otherwise.

    Args:
        path: the folder to make; its parents are made too, and links are followed.
        needed_bytes: refused early if the disk has less.
        overwrite: replace an earlier result; a folder with anything else in it is never replaced.
        inputs: folders and files that the artifact is made from: it is never written over, inside
            or around them.

    Raises:
        ArtifactError: see ``check_target``; or it cannot be written, or the disk is full.
    """
    target = check_target(path, overwrite=overwrite, inputs=inputs)
    with _disk_failures(target):
        _make_parent(target)
        remove_leftovers(target)
        if needed_bytes > (free := free_bytes(target.parent)):
            raise ArtifactError(
                f"{target.parent} has {free:,} bytes free and {needed_bytes:,} are needed: free "
                "some space, or choose "
                "another disk"
            )
        folder, lock = locked_draft(target)
        try:
            draft = Draft(folder)
            yield draft
            _finish_draft(draft, target, overwrite=overwrite)
        finally:
            clear(folder, target)
            os.close(lock)


def check_target(
    target: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()
) -> Path:
    """Refuse a place where an artifact must not be written; touches nothing.

    Args:
        target: the folder to be made.
        overwrite: whether an earlier result there may be replaced.
        inputs: folders and files that the artifact is made from; names that are no paths here are
            passed over.

    Returns:
        The place, links resolved.

    Raises:
        ArtifactError: `target` is a file; is, holds or lies in an input; holds an earlier result
            and overwrite is not given; or holds files that no earlier result brought, overwrite or
            not.
    """
    place = resolve_target(target)
    refuse_inputs(place, inputs)
    if place.is_dir() and any(place.iterdir()):
        _check_replaceable(place, overwrite)
    return place


def _check_replaceable(place: Path, overwrite: bool) -> None:
    """Refuse to replace a folder that is not, file for file, an earlier result."""
    try:
        manifest = read_manifest(place)
    except ArtifactError:
        names = sorted(path.name for path in place.iterdir())
        raise ArtifactError(
            f"{place} holds files that are not a finished result of secateur ({_few(names)}), and "
            "they are never "
            "removed: choose another folder"
        ) from None
    if not overwrite:
        raise ArtifactError(
            f"{place} holds an earlier result: choose another folder, or replace it with overwrite "
            "(--overwrite)"
        )
    if foreign := foreign_files(place, manifest):
        raise ArtifactError(
            f"{place} holds files that its result did not bring, or that have changed since "
            f"({_few(foreign)}), and "
            "they are never removed: move them, or choose another folder"
        )


def _few(names: list[str]) -> str:
    listed = ", ".join(names[:SHOWN])
    if len(names) > SHOWN:
        listed += f" and {len(names) - SHOWN} more"
    return listed


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"cannot write {target}: no folder can be made there; choose another place"
        ) from error


def _finish_draft(draft: Draft, target: Path, *, overwrite: bool) -> None:
    """Hash, write the manifest last, flush, and let the folder appear."""
    flush_tree(draft.folder)
    write_synced(
        draft.folder / MANIFEST, json.dumps(_manifest_json(draft), indent=1, sort_keys=True) + "\n"
    )
    _open_to_all(draft.folder)
    (draft.folder / MARK).unlink()
    flush_tree(draft.folder, deep=False)
    if target.is_dir() and any(target.iterdir()):
        # asked again: it may have changed while this one was made
        _check_replaceable(target, overwrite)
        exchange_folders(draft.folder, target)
    else:
        _appear(draft.folder, target)
    flush_tree(target.parent, deep=False)


def _appear(folder: Path, target: Path) -> None:
    """Give a draft its name, over nothing or an empty folder."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise ArtifactError(
            f"{target} has been made by somebody else meanwhile: choose another folder"
        ) from error


def _manifest_json(draft: Draft) -> JSON:
    files: JSON = {}
    for name, file in files_below(draft.folder):
        if name != MARK:
            files[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "files": files,
        "history": draft.history,
        "figures": draft.figures,
        "versions": collect_versions() | {"python": platform.python_version()},
    }


def collect_versions() -> dict[str, str]:
    """Versions of this package and of those that decide what it computes."""
    installed = {dist.name for dist in metadata.distributions()} & {
        "secateur",
        "torch",
        "transformers",
        "safetensors",
    }
    return {name: metadata.version(name) for name in sorted(installed)}


@contextmanager
def _disk_failures(target: Path) -> Iterator[None]:
    """Turn what a disk refuses into an ArtifactError; anything else passes."""
    try:
        yield
    except Exception as error:  # safetensors reports a full disk as a bare Exception
        if isinstance(error, ArtifactError) or not is_disk_failure(error):
            raise
        raise ArtifactError(
            f"cannot write {target}: {explain_error(error)}. Nothing was left behind"
        ) from error


def _open_to_all(folder: Path) -> None:
    """The usual permissions instead of the private ones of temporary folders and of safetensors
    files."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        permissions = 0o666
        if path.is_dir():
            permissions = 0o777
        path.chmod(permissions & ~mask)
