"""A folder under examination: each thing that checks look at is read once, when the first of them
asks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from secateur.graph.errors import SecateurError, SourceError
from secateur.graph.pattern import Pattern
from secateur.graph.program import JSON
from secateur.runtime.open.checkpoint import (
    INDEX,
    PICKLES,
    SINGLE,
    TensorRecord,
    read_checkpoint,
    read_header,
    read_json,
)
from secateur.runtime.open.classes import BUILD_FAILURES, build_on_meta
from secateur.runtime.open.source import CONFIG, REFUSED_FIELDS, stock_class
from secateur.runtime.save.artifact import Manifest, read_manifest
from secateur.runtime.verify.census import BITMASK, PATTERNS, Census, census_of_file
from secateur.runtime.verify.claims import OURS, Claim, Overall, from_config, sparsity_configs

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
Patterns = Mapping[str, Mapping[str, tuple[int, int]]]


@dataclass
class Subject:
    """A folder.

    given: claims beside those that the folder makes.
    digests: take the SHA-256 of each tensor while it is counted.
    """

    folder: Path
    given: tuple[Claim, ...] = ()
    digests: bool = False
    progress: Progress = lambda items, *_: items
    hashes: dict[str, str] = field(default_factory=dict)
    count_seconds: float = 0.0

    @cached_property
    def files(self) -> list[Path]:
        """Every file, relative to the folder."""
        files = list[Path]()
        for file in sorted(self.folder.rglob("*")):
            if file.is_file() or file.is_symlink():
                files.append(file.relative_to(self.folder))
        return files

    @cached_property
    def manifest(self) -> Manifest | None:
        """Ours, or None where there is none that can be read."""
        try:
            return read_manifest(self.folder)
        except SecateurError:
            return None

    @cached_property
    def config(self) -> JSON:
        """config.json; empty where there is none.

        Raises:
            SourceError: damaged.
        """
        if (self.folder / CONFIG).is_file():
            return read_json(self.folder / CONFIG)
        return {}

    @cached_property
    def stored_tensors(self) -> dict[str, TensorRecord]:
        """The tensors that a loader would read; those of every file where no file has a usual name.

        Raises:
            SourceError: no weights, or files that are damaged.
        """
        loose = sorted(self.folder.glob("*.safetensors"))
        if (self.folder / SINGLE).is_file() or (self.folder / INDEX).is_file() or not loose:
            return read_checkpoint(self.folder)
        stored: dict[str, TensorRecord] = {}
        for file in loose:
            records = read_header(file)
            if twice := sorted(stored.keys() & records.keys()):
                other = stored[twice[0]].file.name
                raise SourceError(f"{file} and {other} both hold {twice[0]}: keep one of them")
            stored |= records
        return stored

    @cached_property
    def model(self) -> PreTrainedModel | None:
        """The stock class on the meta device, or None where no configuration leads to one."""
        try:
            if self.config:
                return self.build()
            return None
        except (SecateurError, *BUILD_FAILURES):
            return None

    def build(self) -> PreTrainedModel:
        """The stock class on the meta device, whatever the stored weights are.

        Raises:
            SourceError: no such class.   Any of BUILD_FAILURES: the class dislikes its
                configuration.
        """
        data = {}
        for name, value in self.config.items():
            if name not in REFUSED_FIELDS:
                data[name] = value
        config, cls = stock_class(data, self.folder / CONFIG)
        return build_on_meta(cls, config)

    @cached_property
    def ties(self) -> list[list[str]]:
        """Names of parameters that are one and the same in the class."""
        groups: dict[int, list[str]] = {}
        if self.model is None:
            return []
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def stored_name(self, name: str) -> str | None:
        """Under which name a parameter is stored: its own, or one that it is tied to, with or
        without the prefix that transformers gives the inner model.

        Args:
            name: of the parameter in the class, or in what a file claims.
        """
        names = [name]
        for tied in self.ties:
            if name in tied:
                names += tied
                break
        prefix = ""
        if self.model is not None:
            prefix = f"{self.model.base_model_prefix}."
        without_prefix = [alias.removeprefix(prefix) for alias in names]
        for candidate in (*names, *without_prefix, prefix + name, name + BITMASK):
            if candidate in self.stored_tensors:
                return candidate
        return None

    @cached_property
    def claims(self) -> tuple[tuple[Claim, ...], tuple[Overall, ...]]:
        """All claims: of single weights, and of weights together.

        Raises:
            ArtifactError, SourceError, PatternError: a file that makes claims is damaged, or not to
                be understood.
        """
        single = list(self.given)
        for source in OURS:
            single += source(self.folder)
        overall = list[Overall]()
        for where, value in sparsity_configs(self.config).items():
            if self.model is None:
                raise SourceError(
                    f"{CONFIG}: {where} cannot be checked: no stock class says which modules "
                    "it means"
                )
            claims = from_config(f"{CONFIG}: {where}", value, self.model)
            if isinstance(claims, Overall):
                overall.append(claims)
            else:
                single += claims
        return tuple(single), tuple(overall)

    @cached_property
    def tensors(self) -> dict[str, Census]:
        """Every stored tensor counted, file by file; files that a manifest lists are hashed on the
        way."""
        by_file: dict[Path, dict[str, TensorRecord]] = {}
        for name, record in self.stored_tensors.items():
            by_file.setdefault(record.file, {})[name] = record
        began = time.perf_counter()
        patterns = self._claimed_patterns()
        counting = self._count_tensors(by_file, patterns)
        tensors: dict[str, Census] = {}
        for census in self.progress(counting, "counting zeros", len(self.stored_tensors)):
            tensors[census.name] = census
        self.count_seconds = time.perf_counter() - began
        return tensors

    def _count_tensors(
        self, by_file: Mapping[Path, Mapping[str, TensorRecord]], patterns: Patterns
    ) -> Iterable[Census]:
        for file, records in by_file.items():
            file_hash = None
            if self.manifest is not None:
                file_hash = hashlib.sha256()
            yield from census_of_file(
                file, records, patterns, whole=file_hash, digests=self.digests
            )
            if file_hash is not None:
                self.hashes[file.relative_to(self.folder).as_posix()] = file_hash.hexdigest()

    def _claimed_patterns(self) -> Patterns:
        """Claimed patterns that are not counted anyway."""
        patterns: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            claims = self.claims[0]
        except SecateurError:  # told by the check of patterns
            return {}
        for claim in claims:
            name = self.stored_name(claim.tensor)
            pattern = claim.pattern
            if name is None or not isinstance(pattern, Pattern) or str(pattern) in PATTERNS:
                continue
            patterns.setdefault(name, {})[str(pattern)] = (pattern.kept, pattern.of)
        return patterns

    @property
    def num_bytes(self) -> int:
        """Of the files that hold the tensors."""
        files = {record.file for record in self.stored_tensors.values()}
        return sum(file.stat().st_size for file in files)

    def tensor(self, name: str) -> torch.Tensor:
        """One stored tensor."""
        with safe_open(self.stored_tensors[name].file, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    @property
    def pickles(self) -> list[str]:
        """Files that can run code when they are read."""
        names = list[str]()
        for file in self.files:
            if any(file.match(pattern) for pattern in PICKLES):
                names.append(file.as_posix())
        return names
