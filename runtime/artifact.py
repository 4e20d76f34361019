"""The artifact: a folder that is whole or absent.

It is written into a hidden sibling on the same file system; every file is flushed to disk, then the manifest
``secateur.json`` (size and SHA-256 of each file) is written last, and one rename makes the folder appear.  A finished
artifact is replaced by an atomic exchange, so that there is never a moment without a valid one.  A draft is locked
while its writer lives: what a killed writer left behind is recognised by its free lock and removed by the next save.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from secateur.graph.errors import ArtifactError, SecateurError
from secateur.graph.reading import parse_json, reason_of, shown
from secateur.runtime.disk import (
    ASIDE,
    exchange,
    explain,
    flush_tree,
    free_bytes,
    is_disk_failure,
    try_lock,
    write_synced,
)

MANIFEST = "secateur.json"
FORMAT = "secateur-artifact"
VERSION = 1
DRAFT = ".draft-"
SUFFIXES_THAT_LOAD = frozenset(
    {".safetensors", ".json", ".py", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".jinja", ".model", ".txt"}
)
"""An unlisted file with one of these endings could change what a loader reads, so the folder is refused."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact holds: its files by relative name, how it was made, and with which versions."""

    files: Mapping[str, FileRecord]
    history: tuple[Mapping[str, Any], ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all listed files."""
        return sum(record.bytes for record in self.files.values())


@dataclass
class Draft:
    """An artifact being written: files go into ``folder``; history and figures go into its manifest."""

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@contextmanager
def writing(path: str | Path, *, needed_bytes: int = 0, force: bool = False) -> Iterator[Draft]:
    """Write an artifact; it appears at `path` when the block ends without an exception, and not otherwise.

    Args:  path: the folder to make; its parents are made too.   needed_bytes: refused early if the disk has less.
        force: replace a folder that is not an artifact.
    Raises: ArtifactError: `path` is a file or somebody else's folder, cannot be written, or the disk is full."""
    target = Path(path).expanduser().absolute()
    check_target(target, force=force)
    with _disk_failures(target):
        _make_parent(target)
        remove_leftovers(target)
        if needed_bytes > (free := free_bytes(target.parent)):
            raise ArtifactError(
                f"{target.parent} has {free:,} bytes free and {needed_bytes:,} are needed: free some space, or choose "
                "another disk"
            )
        folder, lock = _locked_draft(target)
        try:
            draft = Draft(folder)
            yield draft
            _finish(draft, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def check_target(target: str | Path, *, force: bool = False) -> None:
    """Refuse a place where an artifact must not be written; touches nothing.

    Raises: ArtifactError: `target` is a file or, without force, a folder with files that are not an artifact's."""
    target = Path(target).expanduser().absolute()
    if target.is_file() or (target.is_symlink() and not target.is_dir()):
        raise ArtifactError(f"{target} is a file: give the name of a folder to be made")
    if target.is_dir() and any(target.iterdir()) and not force and not (target / MANIFEST).is_file():
        raise ArtifactError(
            f"{target} holds files that are not a secateur artifact: choose another folder, or force the replacement"
        )


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a finished artifact; the files themselves are not looked at.

    Raises: ArtifactError: no manifest (unfinished or not an artifact), not JSON, or of an unknown version."""
    file = Path(path) / MANIFEST
    try:
        data = parse_json(file.read_bytes(), file, ArtifactError)
        if (data["format"], data["version"]) != (FORMAT, VERSION):
            raise ArtifactError(
                f"{file}: format {data['format']} version {data['version']}, expected {FORMAT} version {VERSION}: "
                "open it with the version of secateur that wrote it"
            )
        files = {_safe_name(file, name): FileRecord(r["bytes"], r["sha256"]) for name, r in data["files"].items()}
        read = Manifest(files, tuple(data["history"]), data["figures"], data["versions"])
        if fault := _wrong_type(read):
            raise ArtifactError(f"{file} is damaged ({fault}): save the artifact again")
        return read
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"{path} has no {MANIFEST}: it is not a finished secateur artifact; save it again"
        ) from None
    except SecateurError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged ({reason_of(error)}): save the artifact again") from error


def verify_artifact(path: str | Path, *, hashes: bool = True) -> Manifest:
    """Compare every file with the manifest.

    Args:  hashes: re-hash each file; False compares sizes only.
    Raises: ArtifactError: a file is missing, unlisted, of another size, or of another hash; names each."""
    manifest = read_manifest(path)
    if found := artifact_faults(path, manifest, hashes=hashes):
        raise ArtifactError(f"{path} is not what its manifest says: {'; '.join(found[:5])}. Save or copy it again")
    return manifest


def artifact_faults(
    path: str | Path, manifest: Manifest, *, hashes: bool = True, known: Mapping[str, str] | None = None
) -> list[str]:
    """Where a folder is not what a manifest says: files missing, unlisted, of another size, or of another hash.

    Args:  hashes: re-hash each file.   known: SHA-256 (hex) of files that were hashed already, by relative name."""
    folder, seen = Path(path), known or {}
    faults = [_fault(folder, name, record, hashes, seen.get(name)) for name, record in manifest.files.items()]
    faults += [f"{name} is not in the manifest" for name in _unlisted(folder, manifest)]
    return [fault for fault in faults if fault]


def remove_leftovers(target: Path) -> list[Path]:
    """Remove the drafts that killed writers of `target` left behind; a living writer's draft is locked and stays."""
    removed = []
    for draft in sorted(target.parent.glob(f".{_glob_escape(target.name)}{DRAFT}*")):
        if draft.suffix == ASIDE and not target.exists():  # killed between the two renames of an exchange
            draft.rename(target)
            continue
        lock = try_lock(draft)
        if lock is not None:
            shutil.rmtree(draft, ignore_errors=True)
            os.close(lock)
            removed.append(draft)
    return removed


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise ArtifactError(f"cannot write {target}: no folder can be made there; choose another place") from error


def _finish(draft: Draft, target: Path) -> None:
    """Hash, write the manifest last, flush, and let the folder appear."""
    flush_tree(draft.folder)
    write_synced(draft.folder / MANIFEST, json.dumps(_manifest_json(draft), indent=1, sort_keys=True) + "\n")
    _open_to_all(draft.folder)
    if target.is_dir():
        exchange(draft.folder, target)
    else:
        draft.folder.rename(target)
    flush_tree(target.parent, deep=False)


def _manifest_json(draft: Draft) -> dict[str, Any]:
    files = {name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for name, file in _files(draft.folder)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "files": files,
        "history": draft.history,
        "figures": draft.figures,
        "versions": installed_versions() | {"python": platform.python_version()},
    }


def installed_versions() -> dict[str, str]:
    """Versions of this package and of those that decide what it computes."""
    installed = {dist.name for dist in metadata.distributions()} & {"secateur", "torch", "transformers", "safetensors"}
    return {name: metadata.version(name) for name in sorted(installed)}


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Every file below a folder but the manifest, with its relative name."""
    found = sorted(file for file in folder.rglob("*") if file.is_file() or file.is_symlink())
    return [(file.relative_to(folder).as_posix(), file) for file in found if file != folder / MANIFEST]


def _unlisted(folder: Path, manifest: Manifest) -> list[str]:
    names = [name for name, file in _files(folder) if file.suffix in SUFFIXES_THAT_LOAD]
    return [name for name in names if name not in manifest.files]


def _fault(folder: Path, name: str, record: FileRecord, hashes: bool, known: str | None) -> str:
    file = folder / name
    if file.is_symlink() or not file.is_file():
        return f"{name} is missing"
    if (size := file.stat().st_size) != record.bytes:
        return f"{name} has {size:,} bytes instead of {record.bytes:,}"
    if hashes and (known or _sha256(file)) != record.sha256:
        return f"the content of {name} has changed"
    return ""


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _wrong_type(read: Manifest) -> str:
    """What of a manifest is of another type than it should be, "" if nothing."""
    for name, record in read.files.items():
        if type(record.bytes) is not int or not isinstance(record.sha256, str):
            return f"size or hash of {shown(name)}"
    for step in read.history:
        figures = step.get("figures", {}) if isinstance(step, dict) else None
        if not isinstance(figures, dict) or not isinstance(step.get("name"), str):
            return "history"
    if not isinstance(read.figures, dict):
        return "figures"
    return "" if isinstance(read.versions, dict) else "versions"


def _safe_name(manifest: Path, name: str) -> str:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise ArtifactError(
            f"{manifest} lists {shown(name)}, which lies outside the artifact: do not trust this folder"
        )
    return name


def _locked_draft(target: Path) -> tuple[Path, int]:
    """A fresh draft folder beside `target`, and the lock that says its writer lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}{DRAFT}", dir=target.parent))
        lock = try_lock(folder)
        if lock is not None and folder.is_dir():  # another writer may have taken it for a leftover before it was locked
            return folder, lock


@contextmanager
def _disk_failures(target: Path) -> Iterator[None]:
    """Turn what a disk refuses into an ArtifactError; anything else passes."""
    try:
        yield
    except Exception as error:  # safetensors reports a full disk as a bare Exception
        if isinstance(error, ArtifactError) or not is_disk_failure(error):
            raise
        raise ArtifactError(f"cannot write {target}: {explain(error)}. Nothing was left behind") from error


def _glob_escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _open_to_all(folder: Path) -> None:
    """The usual permissions instead of the private ones of temporary folders and of safetensors files."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
