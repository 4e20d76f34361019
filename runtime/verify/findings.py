"""What was found in a folder, and how bad it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from secateur.graph.program import JSON
from secateur.runtime.verify.census import Census

Level = Literal["ok", "note", "warning", "fault"]
LEVELS: tuple[Level, ...] = ("note", "ok", "warning", "fault")
"""Mildest first."""
SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    says: what and where.
    mend: what to do about it.
    """

    level: Level
    says: str
    mend: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one check found; never nothing."""

    check: str
    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        """The worst of its findings."""
        return max((finding.level for finding in self.findings), key=LEVELS.index)


@dataclass(frozen=True)
class Verification:
    """What all checks found.

    num_bytes: of the tensors that were counted.
    count_seconds: that reading and counting (and hashing) them took.
    seconds: of everything.
    """

    folder: Path
    outcomes: tuple[Outcome, ...]
    tensors: tuple[Census, ...]
    num_bytes: int
    count_seconds: float
    seconds: float

    @property
    def green(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    @property
    def faults(self) -> list[Finding]:
        """Every fault, in the order of the checks."""
        faults = list[Finding]()
        for outcome in self.outcomes:
            faults += [finding for finding in outcome.findings if finding.level == "fault"]
        return faults

    @property
    def gbps(self) -> float:
        """10^9 bytes a second of reading and counting."""
        if self.count_seconds:
            return self.num_bytes / 1e9 / self.count_seconds
        return 0.0

    def to_json(self) -> JSON:
        """As JSON values."""
        tensors = list[JSON]()
        for census in self.tensors:
            more = {"pattern": census.pattern, "share_of_zeros": census.share}
            tensors.append(asdict(census) | more)
        checks = list[JSON]()
        levels = Counter[Level]()
        for outcome in self.outcomes:
            checks.append(asdict(outcome) | {"level": outcome.level})
            levels.update(finding.level for finding in outcome.findings)
        return {
            "folder": str(self.folder),
            "green": self.green,
            "faults": levels["fault"],
            "warnings": levels["warning"],
            "checks": checks,
            "bytes": self.num_bytes,
            "count_seconds": self.count_seconds,
            "gb_per_second": self.gbps,
            "seconds": self.seconds,
            "tensors": tensors,
        }


def limit_findings(findings: Sequence[Finding], what: str) -> list[Finding]:
    """The first few findings of one kind, and how many more there are.

    Args:
        findings: of one kind.
        what: the plural of what they are about.
    """
    limited = list(findings[:SHOWN])
    more = len(findings) - SHOWN
    if more > 0:
        first_left_out = findings[SHOWN]
        says = f"and {more:,} more {what}"
        limited.append(Finding(first_left_out.level, says, first_left_out.mend))
    return limited


def describe_place(census: Census, where: tuple[int, int], width: int = 1) -> str:
    """``row 3, columns 8-11 of layers.0.up.weight in model.safetensors``.

    Args:
        census: of the tensor.
        where: (row, first column).
        width: columns of a group.
    """
    row, column = where
    if width == 1:
        columns = f"column {column}"
    else:
        columns = f"columns {column}-{min(column + width, census.columns) - 1}"
    return f"row {row}, {columns} of {census.name} in {census.file}"


def count_by_level(levels: Mapping[str, int]) -> str:
    """``3 a, 1 b``."""
    return ", ".join(f"{number:,} {name}" for name, number in levels.items())
