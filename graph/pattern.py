"""Which entries of a weight may be other than zero: n of every m neighbours, or a share of every
row.

Dims: N outputs, K inputs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from secateur.graph.errors import PatternError

WIDEST = 32  # group whose entries are compared in pairs


class Sparsity(ABC):
    """What ``Pattern`` and ``Share`` have in common."""

    @property
    @abstractmethod
    def density(self) -> float:
        """Part of the entries that is kept, 0..1."""

    @abstractmethod
    def incompatibility(self, columns: int) -> str | None:
        """Why a weight of so many inputs cannot be sparse in this way, or None."""

    @abstractmethod
    def group_size(self, columns: int) -> int:
        """How many neighbours compete with each other in a row of so many inputs."""

    @abstractmethod
    def kept_per_group(self, columns: int) -> int:
        """How many of a group's entries stay."""

    @abstractmethod
    def write_mask(self, score_NK: Tensor, out: Tensor) -> Tensor:
        """Write the mask of a score without NaN, of fitting shape, into ``out``."""

    def select_mask(self, score_NK: Tensor, out: Tensor | None = None) -> Tensor:
        """The entries of highest score in each group; of equal scores those of lower index.

        Args:
            score_NK: [..., N, K] float; infinities are ranked like other numbers, 0 and -0 are
                equal.
            out: bool of that shape, any strides, to write into.

        Returns:
            [..., N, K] bool, ``out`` where it is given.

        Raises:
            PatternError: a score is NaN, or K does not fit.
        """
        if reason := self.incompatibility(score_NK.shape[-1]):
            raise PatternError(f"{self} does not fit: {reason}")
        if score_NK.numel() and bool(
            score_NK.max().isnan()
        ):  # the greatest of all is NaN if one is
            *rows, column = score_NK.isnan().nonzero()[0].tolist()
            place = f"row {', '.join(map(str, rows))}, input {column}"
            raise PatternError(
                f"the score of {place} is NaN: no mask can be made; look for NaN in weights "
                "or inputs"
            )
        if out is None:
            made = torch.empty(score_NK.shape, dtype=torch.bool, device=score_NK.device)
        else:
            made = out
        return self.write_mask(score_NK, made)

    def describe_violations(self, weight_NK: Tensor) -> str | None:
        """How many groups of a weight have too many non-zeros (NaN is one), and the first; None
        where none has."""
        columns = weight_NK.shape[-1]
        if reason := self.incompatibility(columns):
            return f"{self} does not fit: {reason}"
        width = self.group_size(columns)
        kept = self.kept_per_group(columns)
        if not weight_NK.numel():
            return None
        over = (weight_NK != 0).unflatten(-1, (columns // width, width)).sum(-1) > kept
        if not bool(over.any()):
            return None
        *rows, group = over.nonzero()[0].tolist()
        where = (
            f"the first in row {', '.join(map(str, rows))}, inputs {width * group} to "
            f"{width * (group + 1) - 1}"
        )
        return (
            f"{int(over.sum()):,} of {over.numel():,} groups of {width} have over {kept} "
            f"non-zeros, {where}"
        )


@dataclass(frozen=True)
class Pattern(Sparsity):
    """At most ``kept`` non-zeros in each group of ``of`` neighbouring inputs of an output.  Written
    ``2:4``."""

    kept: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.of <= WIDEST:
            raise PatternError(
                f"{self.kept}:{self.of}: expected n:m with 0 < n < m <= {WIDEST}, such as 2:4"
            )

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern of a text such as ``2:4``.

        Raises:
            PatternError: it is none.
        """
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if found is None:
            raise PatternError(f"{text!r} is no pattern: expected n:m, such as 2:4")
        return cls(int(found[1]), int(found[2]))

    @property
    def density(self) -> float:
        """Part of the entries that may be other than zero."""
        return self.kept / self.of

    def incompatibility(self, columns: int) -> str | None:
        """Why rows of so many inputs cannot have this pattern, or None."""
        if columns % self.of == 0:
            return None
        return f"{columns} inputs are no multiple of {self.of}"

    def group_size(self, columns: int) -> int:
        """Neighbouring inputs of a group."""
        return self.of

    def kept_per_group(self, columns: int) -> int:
        """Entries of a group that may be other than zero."""
        return self.kept

    def write_mask(self, score_NK: Tensor, out: Tensor) -> Tensor:
        """Mark the entries of highest score in each group.

        Args:
            score_NK: the higher, the rather kept.
            out: [N, K] bool, written.
        """
        groups = score_NK.shape[-1] // self.of, self.of
        select_highest(score_NK.unflatten(-1, groups), self.kept, out.unflatten(-1, groups))
        return out


@dataclass(frozen=True)
class Share(Sparsity):
    """At least the given part of each row's entries is zero, wherever they lie.  Written ``50%``.

    ratio: of zeros, 0..1, both excluded; the number of zeros in a row is rounded down.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise PatternError(
                f"{self}: expected a share of zeros between 0% and 100%, both excluded"
            )

    def __str__(self) -> str:
        return f"{100 * self.ratio:.10g}%"

    @classmethod
    def parse(cls, text: str) -> Share:
        """The share of a text such as ``50%``.

        Raises:
            PatternError: it is none.
        """
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
        if found is None:
            raise PatternError(f"{text!r} is no share of zeros: expected a percentage, such as 50%")
        return cls(float(found[1]) / 100)

    @property
    def density(self) -> float:
        """Part of the entries that may be other than zero."""
        return 1 - self.ratio

    def incompatibility(self, columns: int) -> str | None:
        """Why rows of so many inputs cannot have this share, or None."""
        return None

    def group_size(self, columns: int) -> int:
        """A row is one group."""
        return columns

    def kept_per_group(self, columns: int) -> int:
        """Entries of a row that may be other than zero."""
        return columns - int(columns * self.ratio + 1e-9)

    def write_mask(self, score_NK: Tensor, out: Tensor) -> Tensor:
        """Mark the entries of highest score in each row.

        Args:
            score_NK: the higher, the rather kept.
            out: [N, K] bool, written.
        """
        return select_highest(score_NK, self.kept_per_group(score_NK.shape[-1]), out)


def select_highest(score: Tensor, kept: int, out: Tensor | None = None) -> Tensor:
    """The ``kept`` highest of each group [..., m], of equal ones the first: [..., m] bool, ``out``
    where it is given.

    Up to WIDEST an entry's rank is the number of those in its group that go before it, from one
    comparison for each pair; longer groups are sorted.  The score must hold no NaN.
    """
    if out is None:
        made = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    else:
        made = out
    width = score.shape[-1]
    if width > WIDEST:
        order = score.sort(dim=-1, descending=True, stable=True).indices
        return made.fill_(False).scatter_(-1, order[..., :kept], True)
    entries = score.unbind(-1)
    ranks = [torch.zeros(entry.shape, dtype=torch.uint8, device=entry.device) for entry in entries]
    for first, second in combinations(range(width), 2):
        before = (entries[first] >= entries[second]).view(torch.uint8)
        ranks[second] += before
        ranks[first] += before ^ 1
    for rank, place in zip(ranks, made.unbind(-1), strict=True):
        torch.lt(rank, kept, out=place)
    return made


def parse_pattern(text: str) -> Pattern | Share:
    """The pattern ``n:m`` or the share ``p%`` of a text.

    Raises:
        PatternError: it is neither.
    """
    if not re.search("[:%]", text):
        raise PatternError(
            f"{text!r} is no pattern: expected n:m, such as 2:4, or a share of zeros, such as 50%"
        )
    if "%" in text:
        return Share.parse(text)
    return Pattern.parse(text)
