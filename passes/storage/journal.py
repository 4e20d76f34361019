"""Journals of passes: atomic entries from which an interrupted run continues.

An entry is one safetensors file with its tensors, and in its metadata its facts (JSON), the order
of the tensors, and a SHA-256 over all.  It is written beside its place, flushed to the disk and
renamed, so that a kill leaves the old entry or the new one.  An entry that does not match its own
SHA-256 is logged and treated as absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.graph.errors import ArtifactError

JSON = dict[str, Any]
SUFFIX = ".safetensors"
UNFINISHED = ".part"
log = logging.getLogger("secateur.passes")


@dataclass(frozen=True, eq=False)
class Entry:
    """One entry: tensors in their order, on the CPU, with memory of their own; and JSON values."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: JSON = field(default_factory=dict)


class Journal:
    """Entries in a folder.  Without a folder nothing is kept and nothing is found, so that a pass
    need not ask.

    Names may hold any characters; an entry written under a name replaces the one before it.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @property
    def ensure_folder(self) -> Path | None:
        """The folder, made where there is none yet."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def write(
        self, name: str, tensors: Mapping[str, Tensor] | None = None, facts: JSON | None = None
    ) -> None:
        """Keep an entry; when this returns it is on the disk.  Floats in facts are kept exactly.

        Args:
            name: any characters.
            tensors: on any device; None: none.
            facts: JSON values; None: none.

        Raises:
            ArtifactError: the disk refuses.
            TypeError: facts are not JSON values.
        """
        if self.folder is None:
            return
        entries = {}
        for key, tensor in (tensors or {}).items():
            entries[key] = tensor.detach().cpu().contiguous()
        text = json.dumps({"names": list(entries), "facts": facts or {}})
        metadata = {"text": text, "sha256": _hash_tensors(entries, text)}
        file = self._entry_file(name)
        part = file.with_name(file.name + UNFINISHED)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(_unshare_memory(entries), part, metadata)
            _flush_to_disk(part)
            os.replace(part, file)
            _flush_to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                part.unlink()
            raise ArtifactError(
                f"cannot keep {file} to resume from: {error}; free some space or choose another "
                "disk, and start again: "
                "what was finished before is kept"
            ) from error

    def read(self, name: str) -> Entry | None:
        """The entry, or None where there is none, or only a damaged one.

        Args:
            name: as given to ``write``.
        """
        file = None
        if self.folder is not None:
            file = self._entry_file(name)
        if file is None or not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                document = json.loads(metadata["text"])
                tensors = {}
                for key in document["names"]:
                    tensors[key] = opened.get_tensor(key).clone()
            if metadata["sha256"] == _hash_tensors(tensors, metadata["text"]):
                return Entry(tensors, document["facts"])
            reason = "its content has changed"
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = str(error) or type(error).__name__
        log.warning("%s is damaged (%s): what it held is worked out again", file, reason)
        return None

    def names(self) -> list[str]:
        """The names of all entries, sorted; damaged ones are included."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(
            unquote(file.name.removesuffix(SUFFIX)) for file in self.folder.glob(f"*{SUFFIX}")
        )

    def remove(self, name: str) -> None:
        """Forget an entry, where there is one.

        Args:
            name: as given to ``write``.
        """
        if self.folder is not None:
            self._entry_file(name).unlink(missing_ok=True)

    def _entry_file(self, name: str) -> Path:
        """The file of an entry."""
        assert self.folder is not None
        return self.folder / f"{quote(name, safe=' @#')}{SUFFIX}"


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's dtype, shape and values, wherever it lies and however it is
    strided.

    Args:
        tensor: on any device.

    Returns:
        64 hexadecimal digits.
    """
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {list(data.shape)} ".encode())
    digest.update(data.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash_tensors(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 (hex) of named tensors and a text."""
    parts = []
    for key, tensor in sorted(tensors.items()):
        parts.append(f"{len(key)} {key} {hash_tensor(tensor)}")
    return hashlib.sha256("\n".join([text, *parts]).encode()).hexdigest()


def _unshare_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own, which safetensors asks for."""
    seen: set[int] = set()
    copies = {}
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen:
            copies[key] = tensor.clone()
        else:
            copies[key] = tensor
        seen.add(memory)
    return copies


def _flush_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
