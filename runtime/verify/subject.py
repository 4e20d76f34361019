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

JSON = dict[str, Any]
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


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
        found = sorted(
            file for file in self.folder.rglob("*") if file.is_file() or file.is_symlink()
        )
        return [file.relative_to(self.folder) for file in found]

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
        found: dict[str, TensorRecord] = {}
        for file in loose:
            records = read_header(file)
            if twice := sorted(found.keys() & records.keys()):
                raise SourceError(
                    f"{file} and {found[twice[0]].file.name} both hold {twice[0]}: keep one of them"
                )
            found |= records
        return found

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
        for name, parameter in (
            self.model.named_parameters(remove_duplicate=False) if self.model is not None else ()
        ):
            groups.setdefault(id(parameter), []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def stored_name(self, name: str) -> str | None:
        """Under which name a parameter is stored: its own, or one that it is tied to, with or
        without the prefix that transformers gives the inner model."""
        alike = next((names for names in self.ties if name in names), [])
        if self.model is not None:
            prefix = f"{self.model.base_model_prefix}."
        else:
            prefix = ""
        tried = [
            name,
            *alike,
            *(one.removeprefix(prefix) for one in (name, *alike)),
            prefix + name,
            name + BITMASK,
        ]
        return next((one for one in tried if one in self.stored_tensors), None)

    @cached_property
    def claims(self) -> tuple[tuple[Claim, ...], tuple[Overall, ...]]:
        """All claims: of single weights, and of weights together.

        Raises:
            ArtifactError, SourceError, PatternError: a file that makes claims is damaged, or not to
                be understood.
        """
        single = [*self.given, *(claim for source in OURS for claim in source(self.folder))]
        overall = list[Overall]()
        for where, value in sparsity_configs(self.config).items():
            if self.model is None:
                raise SourceError(
                    f"{CONFIG}: {where} cannot be checked: no stock class says which modules "
                    "it means"
                )
            made = from_config(f"{CONFIG}: {where}", value, self.model)
            single += made if isinstance(made, list) else []
            overall += [made] if isinstance(made, Overall) else []
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
        found: dict[str, Census] = {}
        for one in self.progress(
            self._count_tensors(by_file, patterns), "counting zeros", len(self.stored_tensors)
        ):
            found[one.name] = one
        self.count_seconds = time.perf_counter() - began
        return found

    def _count_tensors(
        self, by_file: Mapping[Path, Mapping[str, TensorRecord]], patterns: Any
    ) -> Iterable[Census]:
        for file, records in by_file.items():
            whole = None
            if self.manifest is not None:
                whole = hashlib.sha256()
            yield from census_of_file(file, records, patterns, whole=whole, digests=self.digests)
            if whole is not None:
                self.hashes[file.relative_to(self.folder).as_posix()] = whole.hexdigest()

    def _claimed_patterns(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Claimed patterns that are not counted anyway."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            claims = self.claims[0]
        except SecateurError:  # told by the check of patterns
            return {}
        for claim in claims:
            name = self.stored_name(claim.tensor)
            one = claim.pattern
            if name is not None and isinstance(one, Pattern) and str(one) not in PATTERNS:
                found.setdefault(name, {})[str(one)] = (one.kept, one.of)
        return found

    @property
    def num_bytes(self) -> int:
        """Of the files that hold the tensors."""
        return sum(
            file.stat().st_size for file in {record.file for record in self.stored_tensors.values()}
        )

    def tensor(self, name: str) -> torch.Tensor:
        """One stored tensor."""
        with safe_open(self.stored_tensors[name].file, "pt") as held:
            tensor: torch.Tensor = held.get_tensor(name)
        return tensor

    @property
    def pickles(self) -> list[str]:
        """Files that can run code when they are read."""
        return [
            file.as_posix()
            for file in self.files
            if any(file.match(pattern) for pattern in PICKLES)
        ]
