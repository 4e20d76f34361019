"""Counting the zeros of stored tensors straight from the file, piece by piece: no model is built,
no tensor is held.

Eight neighbours along the last dim are one byte of bits (1 where a number is not zero), so a
histogram of 256 counts tells how many groups break every n:m pattern whose m divides 8.  Nothing
here is shared with the code that prunes or
packs: a wrong mask and a wrong count cannot have one cause.  NumPy does the counting, in one
thread: the pieces fit into a core's cache, and what limits it is the disk.

Dims: N rows (all dims but the last), K columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from secateur.graph.errors import SourceError
from secateur.runtime.open.checkpoint import MEND, TensorRecord

Array = npt.NDArray[Any]
PATTERNS: Mapping[str, tuple[int, int]] = {
    "1:4": (1, 4),
    "1:2": (1, 2),
    "2:4": (2, 4),
    "4:8": (4, 8),
}
"""Strictest first: each of them holds wherever one before it does."""
CHUNK_BYTES = 1 << 20
CODE = 8
BITMASK = ".bitmask"
COMPRESSED = ".compressed"
"""Endings of the two tensors in which compressed-tensors keeps a sparse weight: a bit an element,
and the values."""


@dataclass(frozen=True)
class Bits:
    """How a type of numbers is read as whole numbers.

    whole: the integer type of its size.
    odd: the least bits, without the sign, of what is not finite, or None.
    nan: the same of what is no number.
    signed: whether it has a -0.0.
    """

    whole: Any
    odd: int | None
    nan: int
    signed: bool = True


BITS: Mapping[torch.dtype, Bits] = {
    torch.float64: Bits(np.int64, 0x7FF << 52, (0x7FF << 52) + 1),
    torch.float32: Bits(np.int32, 0x7F800000, 0x7F800001),
    torch.float16: Bits(np.int16, 0x7C00, 0x7C01),
    torch.bfloat16: Bits(np.int16, 0x7F80, 0x7F81),
    torch.float8_e5m2: Bits(np.int8, 0x7C, 0x7D),
    torch.float8_e4m3fn: Bits(np.int8, 0x7F, 0x7F),
    torch.int8: Bits(np.int8, None, 0, signed=False),
}
"""The types that weights have; other tensors (indices, packed numbers) are not counted."""


@dataclass(frozen=True)
class Census:
    """What one stored tensor holds.

    zeros: elements that are +0.0 or -0.0; negative_zeros: those of them that are -0.0.
    over: by pattern, how many groups hold too many non-zeros; of matrices only.
    first: by pattern, row and first column of the first such group.
    fullest: the most non-zeros of a row, and that row.
    odd: row and column of the first element that is not finite.
    shape: [N, K] of the weight for the bits that compressed-tensors keeps of one, K rounded up to
        whole bytes.
    digest: SHA-256 as ``reload.digest`` takes it; empty if it was not asked for.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int = 0
    negative_zeros: int = 0
    nans: int = 0
    infinities: int = 0
    over: Mapping[str, int] = field(default_factory=dict)
    first: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    fullest: tuple[int, int] = (0, 0)
    odd: tuple[int, int] | None = None
    digest: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """K."""
        if self.shape:
            return self.shape[-1]
        return 1

    @property
    def pattern(self) -> str:
        """The strictest of PATTERNS that holds; "" where none does or nothing was counted."""
        for name in PATTERNS:
            if self.over.get(name, 1) == 0:
                return name
        return ""

    @property
    def share(self) -> float:
        """Zeros as a part of all elements, 0..1."""
        if self.numel:
            return self.zeros / self.numel
        return 0.0


def census_of_file(
    file: Path,
    records: Mapping[str, TensorRecord],
    patterns: Mapping[str, Mapping[str, tuple[int, int]]] | None = None,
    *,
    whole: Any = None,
    digests: bool = False,
) -> Iterator[Census]:
    """Count every tensor of one safetensors file, in the order in which they lie there; the file is
    read once.

    Args:
        file: to be read.
        records: the file's, as ``read_header`` gives them: they lie one after another without gaps.
        patterns: by tensor, n:m patterns to count beside PATTERNS: text -> (n, m).
        whole: a hashlib object that is to see every byte of the file.
        digests: take that of each tensor, too.

    Raises:
        SourceError: the file ends early.
    """
    ordered = sorted(records.items(), key=lambda pair: (pair[1].begin, math.prod(pair[1].shape)))
    with file.open("rb") as stream:
        if ordered:
            head = stream.read(ordered[0][1].begin)
        else:
            head = stream.read()
        if whole is not None:
            whole.update(head)
        for name, record in ordered:
            tensor_hash = hashlib.sha256(f"{record.dtype} {list(record.shape)} ".encode())
            values = name.removesuffix(BITMASK) + COMPRESSED
            kept_as_bits = name.endswith(BITMASK) and values in records
            count = _Count(record, (patterns or {}).get(name, {}), kept_as_bits)
            for piece in _read_pieces(stream, record):
                if whole is not None:
                    whole.update(piece)
                if digests:
                    tensor_hash.update(piece)
                count.add_piece(piece)
            digest = ""
            if digests:
                digest = tensor_hash.hexdigest()
            yield count.make_census(name, digest)


def group_by_family(tensors: Iterable[Census]) -> dict[str, list[Census]]:
    """Tensors whose names differ in whole numbers only, together:
    ``layers.*.mlp.up_proj.weight``.

    Args:
        tensors: any number of counted tensors.
    """
    families: dict[str, list[Census]] = {}
    for census in tensors:
        parts = census.name.split(".")
        for place, part in enumerate(parts):
            if part.isdigit():
                parts[place] = "*"
        families.setdefault(".".join(parts), []).append(census)
    return families


def _read_pieces(stream: BufferedReader, record: TensorRecord) -> Iterator[memoryview]:
    """The data of a tensor in pieces of whole rows, each valid until the next is asked for."""
    row_bytes = _count_columns(record) * record.dtype.itemsize
    remaining = math.prod(record.shape) * record.dtype.itemsize
    buffer = memoryview(bytearray(max(1, CHUNK_BYTES // max(row_bytes, 1)) * row_bytes))
    while remaining:
        piece = buffer[: min(remaining, len(buffer))]
        if stream.readinto(piece) != len(piece):
            raise SourceError(f"{record.file} ended while it was read. {MEND}")
        remaining -= len(piece)
        yield piece


def _count_columns(record: TensorRecord) -> int:
    """K; 1 where a tensor has no dims."""
    if record.shape:
        return record.shape[-1]
    return 1


class _Count:
    """The counts of one tensor, added up piece by piece."""

    def __init__(
        self, record: TensorRecord, patterns: Mapping[str, tuple[int, int]], kept_as_bits: bool
    ) -> None:
        self.record = record
        self.bits = BITS.get(record.dtype)
        self.kept_as_bits = kept_as_bits and record.dtype == torch.uint8
        self.columns = _count_columns(record)
        self.patterns: dict[str, tuple[int, int]] = {}
        if len(record.shape) > 1 and (self.bits is not None or self.kept_as_bits):
            self.patterns = dict(PATTERNS) | dict(patterns)
        self.row = self.filled = self.negative = self.nans = self.infinities = 0
        self.over = dict.fromkeys(self.patterns, 0)
        self.first: dict[str, tuple[int, int]] = {}
        self.fullest = (0, 0)
        self.odd: tuple[int, int] | None = None

    def add_piece(self, piece: memoryview) -> None:
        """Count one piece of whole rows."""
        if self.kept_as_bits:
            codes = np.frombuffer(piece, dtype=np.uint8).reshape(-1, self.columns)
            filled_NK = np.unpackbits(codes, axis=1, bitorder="little")
        elif self.bits is not None:
            bits = np.frombuffer(piece, dtype=self.bits.whole).reshape(-1, self.columns)
            filled_NK = self._find_nonzero(bits, self.bits)
            # [N, K/8]; columns beyond K are zeros
            codes = np.packbits(filled_NK, axis=1, bitorder="little")
        else:
            return
        per_row = ONES[codes].sum(1, dtype=np.int64)
        self.filled += int(per_row.sum())
        most = int(per_row.argmax())
        if int(per_row[most]) > self.fullest[0]:
            self.fullest = (int(per_row[most]), self.row + most)
        if self.patterns:
            self._count_groups(np.bincount(codes.ravel(), minlength=1 << CODE), codes, filled_NK)
        self.row += len(codes)

    def _find_nonzero(self, bits: Array, kind: Bits) -> Array:
        """Which elements are not zero; counts negative zeros and what is not finite."""
        if not kind.signed:
            return np.asarray(bits != 0)
        lowest = np.iinfo(kind.whole).min  # the bits of -0.0
        if bits.min() == lowest:
            self.negative += int(np.count_nonzero(bits == lowest))
        magnitude = bits & np.iinfo(kind.whole).max
        if kind.odd is not None and magnitude.max() >= kind.odd:
            odd = magnitude >= kind.odd
            nans = int(np.count_nonzero(magnitude >= kind.nan))
            self.nans += nans
            self.infinities += int(np.count_nonzero(odd)) - nans
            row, column = divmod(int(odd.argmax()), self.columns)
            self.odd = self.odd or (self.row + row, column)
        return np.asarray(magnitude != 0)

    def _count_groups(self, histogram: Array, codes: Array, filled_NK: Array) -> None:
        for name, (kept, of) in self.patterns.items():
            if CODE % of == 0:
                table = _count_broken_groups(kept, of)
                broken = int(histogram @ table)
                width = CODE
                wrong = codes
                if broken and name not in self.first:
                    wrong = table[codes]
            else:
                padded = np.pad(filled_NK, ((0, 0), (0, -filled_NK.shape[1] % of)))
                wrong = padded.reshape(len(padded), -1, of).sum(-1) > kept
                broken = int(np.count_nonzero(wrong))
                width = of
            self.over[name] += broken
            if broken and name not in self.first:
                row, place = divmod(int((wrong > 0).argmax()), wrong.shape[1])
                column = place * width
                if CODE % of == 0:
                    column += _first_broken(int(codes[row, place]), kept, of)
                self.first[name] = (self.row + row, column)

    def make_census(self, name: str, digest: str) -> Census:
        """Return the counts of all pieces.

        Args:
            name: of the tensor.
            digest: of its content, or empty.
        """
        record = self.record
        shape = record.shape
        if self.kept_as_bits:
            shape = (*record.shape[:-1], CODE * self.columns)
        zeros = 0
        if self.bits or self.kept_as_bits:
            zeros = math.prod(shape) - self.filled
        return Census(
            name=name,
            file=record.file.name,
            shape=shape,
            dtype=str(record.dtype).removeprefix("torch."),
            zeros=zeros,
            negative_zeros=self.negative,
            nans=self.nans,
            infinities=self.infinities,
            over=self.over,
            first=self.first,
            fullest=self.fullest,
            odd=self.odd,
            digest=digest,
        )


ONES: Array = np.array([code.bit_count() for code in range(1 << CODE)], np.uint8)


@cache
def _count_broken_groups(kept: int, of: int) -> Array:
    """int64 [256]: how many groups of ``of`` bits hold more than ``kept`` ones, by code."""
    counts = []
    for code in range(1 << CODE):
        groups = [code >> start & (1 << of) - 1 for start in range(0, CODE, of)]
        counts.append(sum(group.bit_count() > kept for group in groups))
    return np.array(counts, np.int64)


def _first_broken(code: int, kept: int, of: int) -> int:
    """The first column, 0..7, of the first group of a code that holds too many ones."""
    start = 0
    while (code >> start & (1 << of) - 1).bit_count() <= kept:
        start += of
    return start
