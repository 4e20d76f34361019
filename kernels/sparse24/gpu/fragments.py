"""Fragment order: the canonical 2:4 weight, permuted so that a lane of a warp loads its tensor-core
operand with one 16-byte read.

A warp's instruction mma.sp.m16n8k32 multiplies a 16 x 32 tile of the weight; lane = 4 * g + t.  Its
operands (PTX ISA, "Matrix Fragments for sparse mma.m16n8k32"; the emulator in tests/kernels/gpu
holds the same facts as arithmetic):

* value register r of a lane: row g + 8 * (r & 1), the two kept values of the group of four columns
    4 * (r >> 1) + t;
* index word, which lanes t = 2 * s + c give for selector s: bits 0-15 row g, bits 16-31 row g + 8,
columns 16 * c ..
  16 * c + 15, four bits a group, i0 | i1 << 2 with i0 < i1.  So one word a lane serves two k tiles:
  lanes 0, 1 the even, 2, 3 the odd.

=================  ==============================  ====================
=========================================== kind               values, int32
indices, int32        scale bfloat16, float16  [tiles, K/32, 32, 4]            [tiles, K/64, 32]
none int8               [tiles, K/64, 32, 4], q + 128   [tiles, K/64, 32]     float32 [N], a row
int4               [tiles, K/128, 32, 4], q + 8    [tiles, K/64, 32]     int32 [tiles, K/128, 8],
bf16 of rows g, g + 8 =================  ==============================  ====================
===========================================

tiles = ceil(N / 16).  N is padded to a multiple of 16, K to one of 64 (int4: 128), with zeros kept
at positions 0 and 1 of each group, so that index words are always valid.  All is a permutation of
bytes in plain torch, exact both ways, on any device.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.kernels.sparse24.formats import (
    GROUP_INT4,
    FormatError,
    Packed24,
    check_packed,
    indices_to_mask,
    mask_to_indices,
    pack_nibbles,
    unpack_nibbles,
)

ROWS = 16
BLOCK_K = {
    "bfloat16": 64,
    "float16": 64,
    "int8": 64,
    "int4": GROUP_INT4,
}  # columns that a kernel takes at a time
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FILLER = 0x33  # mask byte of padding: positions 0 and 1 of both groups

# Axes of the row-major array -> axes of the fragment-order array.
#   n tile of 16 rows   h row g or g + 8   g row in eight   b block of k   s k tile in its block
#   c half of a k tile   t lane in four   j first or second value of a group, or byte of a half word
ORDERS = {
    "float": ("n h2 g8 b c2 t4 j2", "n b g t c h j"),
    "int8": ("n h2 g8 b s2 c2 t4 j2", "n b g t s c h j"),
    "int4": ("n h2 g8 b s4 c2 t4 j2", "n b g t s j c h"),
    "indices": ("n h2 g8 b s2 c2 j2", "n b g s c h j"),
    "scale": ("n h2 g8 b", "n b g h"),
}


@dataclass(frozen=True, eq=False)
class Fragments:
    """A weight in fragment order; `shape` is (N, K) before any padding, the tensors are those of
    the module's table."""

    kind: str
    shape: tuple[int, int]
    values: Tensor
    indices: Tensor
    scale: Tensor | None = None

    @property
    def padded_columns(self) -> int:
        """Inputs K, padded to whole fragments."""
        return 64 * int(self.indices.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of values, indices and scales."""
        return sum(t.nbytes for t in (self.values, self.indices, self.scale) if t is not None)


def pack_fragments(packed: Packed24) -> Fragments:
    """The canonical weight in fragment order, on the same device.

    Raises:
        FormatError: kind float32, which the sparse tensor cores do not take; or the packed weight
            is damaged.
    """
    check_packed(packed)
    kind = packed.kind
    if kind not in BLOCK_K:
        raise FormatError(
            f"a {kind} weight has no fragment order: convert it to bfloat16 or float16 first"
        )
    if kind == "int4":
        kept = unpack_nibbles(packed.values)
    else:
        kept = packed.values
    rows = -packed.shape[0] % ROWS
    cols = -2 * kept.shape[1] % BLOCK_K[kind]
    tiles = (packed.shape[0] + rows) // ROWS
    codes = mask_to_indices(F.pad(packed.mask, (0, cols // 8, 0, rows), value=FILLER))
    indices = permute(codes[:, 0::2] | codes[:, 1::2] << 4, "indices").view(torch.int32)
    values = _pack_values(F.pad(kept, (0, cols // 2, 0, rows)), kind)
    scale = packed.scale
    if kind == "int4" and scale is not None:
        scale = permute(F.pad(scale, (0, 0, 0, rows)), "scale").view(torch.int32).view(tiles, -1, 8)
    return Fragments(
        kind, packed.shape, values.view(tiles, -1, 32, 4), indices.view(tiles, -1, 32), scale
    )


def unpack_fragments(weight: Fragments) -> Packed24:
    """The canonical weight that `pack_fragments` took: its inverse, bit for bit."""
    n = weight.shape[0]
    stored = -(-weight.shape[1] // 8) * 8
    rows = ROWS * int(weight.values.shape[0])
    codes = restore(weight.indices.reshape(-1).view(torch.uint8), "indices", rows)
    mask = indices_to_mask(torch.stack([codes & 15, codes >> 4], -1).flatten(1))[
        :n, : stored // 8
    ].contiguous()
    values = _unpack_values(weight.values.reshape(-1), weight.kind, rows)[
        :n, : stored // 2
    ].contiguous()
    scale = weight.scale
    if weight.kind == "int4" and scale is not None:
        scale = restore(scale.reshape(-1).view(torch.bfloat16), "scale", rows)[:n].contiguous()
    return Packed24(
        weight.kind,
        weight.shape,
        pack_nibbles(values) if weight.kind == "int4" else values,
        mask,
        scale,
    )


def restore_dense(
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    kind: str,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dense [n, k] of fragment-order tensors; levels times scales are taken in float32, then
    rounded to `dtype`."""
    return (
        unpack_fragments(Fragments(kind, (n, k), values, indices, scale))
        .to_dense(torch.float32)
        .to(dtype)
    )


def permute(tensor: Tensor, order: str) -> Tensor:
    """A row-major [N, ...] array in fragment order, flat."""
    source, target = ORDERS[order]
    names, sizes = _named_axes(source, tensor.numel(), int(tensor.shape[0]))
    return tensor.reshape(sizes).permute([names.index(name) for name in target.split()]).reshape(-1)


def restore(flat: Tensor, order: str, rows: int) -> Tensor:
    """The inverse of `permute`: [rows, ...]."""
    source, target = ORDERS[order]
    names, sizes = _named_axes(source, flat.numel(), rows)
    targets = target.split()
    grouped = flat.reshape([sizes[names.index(name)] for name in targets])
    return grouped.permute([targets.index(name) for name in names]).reshape(rows, -1)


def _named_axes(source: str, numel: int, rows: int) -> tuple[list[str], list[int]]:
    """Names and sizes of the axes: n follows from the rows, b takes what is left."""
    named = {name: int(size or 1) for name, size in re.findall(r"([a-z])(\d*)", source)}
    named["n"] = rows // ROWS
    named["b"] = numel // max(1, math.prod(named.values()))
    return list(named), list(named.values())


def _pack_values(kept: Tensor, kind: str) -> Tensor:
    """Flat int32 words of the kept values [N, S/2]: floats, or levels raised to bytes or nibbles
    without a sign."""
    if kind in FLOATS:
        return permute(kept, "float").view(torch.int32)
    if kind == "int8":
        return permute((kept.to(torch.int16) + 128).to(torch.uint8), "int8").view(torch.int32)
    return pack_nibbles(permute(kept, "int4")[None]).view(-1).view(torch.int32)


def _unpack_values(words: Tensor, kind: str, rows: int) -> Tensor:
    if kind in FLOATS:
        return restore(words.view(FLOATS[kind]), "float", rows)
    if kind == "int8":
        return (restore(words.view(torch.uint8), "int8", rows).to(torch.int16) - 128).to(torch.int8)
    return restore(unpack_nibbles(words.view(torch.uint8)[None])[0], "int4", rows)
