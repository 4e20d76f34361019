"""The manifest of an artifact: its files with size and SHA-256, how it was made, and what a folder
lacks of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from secateur.graph.errors import ArtifactError, SecateurError
from secateur.graph.program import JSON
from secateur.graph.reading import parse_json, reason_of, shown

MANIFEST = "secateur.json"
FORMAT = "secateur-artifact"
VERSION = 1
SUFFIXES_THAT_LOAD = frozenset(
    {
        ".safetensors",
        ".json",
        ".py",
        ".bin",
        ".pt",
        ".pth",
        ".pkl",
        ".ckpt",
        ".gguf",
        ".jinja",
        ".model",
        ".txt",
    }
)
"""An unlisted file with one of these endings could change what a loader reads, so the folder is
refused."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact holds: its files by relative name, how it was made, and with which
    versions."""

    files: Mapping[str, FileRecord]
    history: tuple[JSON, ...] = ()
    figures: JSON = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all listed files."""
        return sum(record.bytes for record in self.files.values())


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a finished artifact; the files themselves are not looked at.

    Raises:
        ArtifactError: no manifest (unfinished or not an artifact), not JSON, or of an unknown
            version.
    """
    file = Path(path) / MANIFEST
    try:
        data = parse_json(file.read_bytes(), file, ArtifactError)
        if (data["format"], data["version"]) != (FORMAT, VERSION):
            raise ArtifactError(
                f"{file}: format {data['format']} version {data['version']}, expected {FORMAT} "
                f"version {VERSION}: "
                "open it with the version of secateur that wrote it"
            )
        files = {}
        for name, record in data["files"].items():
            files[_safe_name(file, name)] = FileRecord(record["bytes"], record["sha256"])
        manifest = Manifest(files, tuple(data["history"]), data["figures"], data["versions"])
        if fault := _wrong_type(manifest):
            raise ArtifactError(f"{file} is damaged ({fault}): save the artifact again")
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"{path} has no {MANIFEST}: it is not a finished secateur artifact; save it again"
        ) from None
    except SecateurError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{file} is damaged ({reason_of(error)}): save the artifact again"
        ) from error


def verify_artifact(path: str | Path, *, hashes: bool = True) -> Manifest:
    """Compare every file with the manifest.

    Args:
        path: the folder of the artifact.
        hashes: re-hash each file; False compares sizes only.

    Raises:
        ArtifactError: a file is missing, unlisted, of another size, or of another hash; names each.
    """
    manifest = read_manifest(path)
    if faults := artifact_faults(path, manifest, hashes=hashes):
        raise ArtifactError(
            f"{path} is not what its manifest says: {'; '.join(faults[:5])}. Save or copy it again"
        )
    return manifest


def artifact_faults(
    path: str | Path,
    manifest: Manifest,
    *,
    hashes: bool = True,
    known: Mapping[str, str] | None = None,
) -> list[str]:
    """Where a folder is not what a manifest says: files missing, unlisted, of another size, or of
    another hash.

    Args:
        path: the folder.
        manifest: what it should hold.
        hashes: re-hash each file.
        known: SHA-256 (hex) of files that were hashed already, by relative name.
    """
    folder = Path(path)
    digests = known or {}
    faults = list[str]()
    for name, record in manifest.files.items():
        if fault := _fault(folder, name, record, hashes, digests.get(name)):
            faults.append(fault)
    for name, file in files_below(folder):
        if file.suffix in SUFFIXES_THAT_LOAD and name not in manifest.files:
            faults.append(f"{name} is not in the manifest")
    return faults


def foreign_files(path: str | Path, manifest: Manifest) -> list[str]:
    """What lies in a folder and is not what its manifest lists: other files, links, and listed
    files that changed."""
    folder = Path(path)
    inside = [file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()]
    names = {file.relative_to(folder).as_posix() for file in inside} - {MANIFEST}
    changed = []
    for name in names & manifest.files.keys():
        if _fault(folder, name, manifest.files[name], True, None):
            changed.append(name)
    return sorted(names - manifest.files.keys()) + sorted(changed)


def files_below(folder: Path) -> list[tuple[str, Path]]:
    """Every file below a folder but the manifest, with its relative name."""
    files = list[tuple[str, Path]]()
    for file in sorted(folder.rglob("*")):
        if (file.is_file() or file.is_symlink()) and file != folder / MANIFEST:
            files.append((file.relative_to(folder).as_posix(), file))
    return files


def _fault(folder: Path, name: str, record: FileRecord, hashes: bool, known: str | None) -> str:
    file = folder / name
    if file.is_symlink() or not file.is_file():
        return f"{name} is missing"
    if (size := file.stat().st_size) != record.bytes:
        return f"{name} has {size:,} bytes instead of {record.bytes:,}"
    if hashes and (known or sha256_of(file)) != record.sha256:
        return f"the content of {name} has changed"
    return ""


def sha256_of(file: Path) -> str:
    """SHA-256 of the content of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _safe_name(manifest: Path, name: str) -> str:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise ArtifactError(
            f"{manifest} lists {shown(name)}, which lies outside the artifact: do not trust "
            "this folder"
        )
    return name


def _wrong_type(manifest: Manifest) -> str:
    """What of a manifest is of another type than it should be, "" if nothing."""
    for name, record in manifest.files.items():
        if type(record.bytes) is not int or not isinstance(record.sha256, str):
            return f"size or hash of {shown(name)}"
    for step in manifest.history:
        figures = None
        if isinstance(step, dict):
            figures = step.get("figures", {})
        if not isinstance(figures, dict) or not isinstance(step.get("name"), str):
            return "history"
    own_figures: object = manifest.figures
    if not isinstance(own_figures, dict):
        return "figures"
    if isinstance(manifest.versions, dict):
        return ""
    return "versions"
