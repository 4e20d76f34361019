"""The canonical form of a 2:4 weight: what lies on disk, what the CPU kernels read, what GPU
layouts are made from.

A dense weight [N, K] holds at most 2 non-zeros in every 4 neighbours along K.  Columns are padded
with zeros to S, the next multiple of 8 (so that a row of the mask is whole bytes), and stored as

=========  ==========================
======================================================================= values     [N, S/2]
float32/16, bf16  the two kept elements of each group, ascending column, row after row
           [N, S/2]  int8              the same, levels -127..127
           (kind int8) [N, S/4]  uint8             two levels -8..7 a byte, stored + 8, the earlier
           in the low half (int4)
mask       [N, S/8]  uint8             bit j % 8 of byte j // 8: column j is kept; exactly two bits
a group scale      [N]       float32           int8: weight = level * scale of its row
           [N, G]    bfloat16          int4: the same for 128 dense columns, G = ceil(S / 128), the
           last may be short
=========  ==========================
=======================================================================

A group with fewer than two non-zeros keeps zeros at its first free columns, so the mask is valid
and deterministic. Values and mask are compressed-tensors' ``sparse-24-bitmask`` byte for byte.
Negative zero becomes zero; denormals are kept; what is not finite is refused.

Dims: N outputs, K inputs, S stored inputs, G scale groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GROUP = 4
GROUP_INT4 = 128
ALIGN = 8
FLOAT_KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUANTIZED_KINDS = ("int8", "int4")
KINDS = (*FLOAT_KINDS, *QUANTIZED_KINDS)
LEVELS = {"int8": (-127, 127), "int4": (-8, 7)}
SCALE_DTYPE = {"int8": torch.float32, "int4": torch.bfloat16}


class FormatError(ValueError):
    """A weight is not 2:4, or tensors are not a packed one; says what was expected, found, where,
    and what to do."""


@dataclass(frozen=True, eq=False)
class Packed24:
    """A 2:4 weight in the canonical form.

    Attributes:
        kind: one of KINDS.
        shape: (N, K) of the dense weight, K before padding.   values,
        mask, scale: the module's table; scale only for int8 and int4.
    """

    kind: str
    shape: tuple[int, int]
    values: Tensor
    mask: Tensor
    scale: Tensor | None = None

    @property
    def stored_columns(self) -> int:
        """S: K rounded up to a multiple of 8."""
        return count_stored_columns(self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.to_tensors().values())

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors by name, contiguous, as safetensors stores them."""
        named = {"values": self.values, "mask": self.mask, "scale": self.scale}
        return {name: t.contiguous() for name, t in named.items() if t is not None}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], kind: str, shape: tuple[int, int]
    ) -> Packed24:
        """Tensors by name, as ``to_tensors`` gave them, checked.

        Raises:
            FormatError: a tensor is missing, unknown, or of another dtype or shape; the mask is not
                2:4.
        """
        wanted = {"values", "mask"} | ({"scale"} if kind in QUANTIZED_KINDS else set())
        if set(tensors) != wanted:
            raise FormatError(
                f"a packed {kind} weight has the tensors {sorted(wanted)}, got {sorted(tensors)}"
            )
        packed = cls(
            kind,
            (int(shape[0]), int(shape[1])),
            tensors["values"],
            tensors["mask"],
            tensors.get("scale"),
        )
        check_packed(packed)
        return packed

    def to(self, device: torch.device | str) -> Packed24:
        """The same on another device."""
        scale = None
        if self.scale is not None:
            scale = self.scale.to(device)
        return replace(self, values=self.values.to(device), mask=self.mask.to(device), scale=scale)

    def to_levels(self) -> Tensor:
        """Dense [N, K] of what is stored: the floats, or int8 levels of a quantised kind."""
        if self.kind == "int4":
            kept = unpack_nibbles(self.values)
        else:
            kept = self.values
        return expand_kept(kept, self.mask)[:, : self.shape[1]]

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense [N, K] weight.
        dtype: the values' own for floats and float32 for quantised kinds, if not given.
        """
        if self.scale is None:
            dense = self.to_levels()
        else:
            dense = self.to_levels().float() * self.column_scale()
        if dtype is None:
            return dense
        return dense.to(dtype)

    def column_scale(self) -> Tensor:
        """float32, [N, 1] (int8) or [N, K] (int4): what each level is multiplied by."""
        assert self.scale is not None, f"{self.kind} has no scale"
        return scale_of_columns(self.scale, self.shape[1])


def count_stored_columns(columns: int) -> int:
    """S of K: columns padded with zeros until a row of the mask is whole bytes."""
    return -(-columns // ALIGN) * ALIGN


def scale_of_columns(scale: Tensor, columns: int) -> Tensor:
    """float32 [N, 1] from a row scale [N]; float32 [N, columns] from a group scale [N, G]."""
    if scale.ndim == 1:
        return scale.float()[:, None]
    return scale.float().repeat_interleave(GROUP_INT4, 1)[:, :columns]


def pack(weight: Tensor, kind: str | None = None, scale: Tensor | None = None) -> Packed24:
    """A 2:4 weight in the canonical form.

    Args:
        weight: [N, K], floats, or int8 levels for a quantised kind.
        kind: one of KINDS; the weight's own float type if not given.
        scale: of a quantised kind only; [N] for int8, [N, ceil(K/128)] for int4; stored as float32
            and bfloat16.

    Raises:
        FormatError: not two-dimensional, not finite, levels out of range, or more than two
            non-zeros in a group (names the first row and columns).
    """
    if kind is None:
        kind = str(weight.dtype).removeprefix("torch.")
    else:
        kind = kind
    _check_weight(weight, kind, scale)
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.detach(), (0, count_stored_columns(columns) - columns))
    nibbles = _fill_mask(padded)
    groups = padded.view(rows, -1, GROUP)
    values = groups.gather(-1, kept_columns(nibbles)).view(rows, -1)
    values = torch.where(values == 0, torch.zeros_like(values), values)
    if scale is not None:
        scale = scale.detach().to(SCALE_DTYPE[kind]).contiguous()
    if kind == "int4":
        packed = pack_nibbles(values)
    else:
        packed = values.contiguous()
    return Packed24(kind, (rows, columns), packed, nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scale)


def pack_dense(levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scale) of a dense quantised weight as the ops ``linear_int8`` and ``linear_int4``
    take them.

    Args:
        levels: int8 [N, K].
        scale: [N] for int8, [N, ceil(K/128)] for int4.

    Returns:
        int8 [N, S] and float32, or uint8 [N, S/2] and bfloat16.

    Raises:
        FormatError: out of range, or shapes disagree.
    """
    if scale.ndim == 1:
        kind = "int8"
    else:
        kind = "int4"
    _check_weight(levels, kind, scale)
    padded = torch.nn.functional.pad(
        levels.detach(), (0, count_stored_columns(levels.shape[1]) - levels.shape[1])
    )
    return pack_nibbles(padded) if kind == "int4" else padded.contiguous(), scale.detach().to(
        SCALE_DTYPE[kind]
    )


def is_24(weight: Tensor) -> bool:
    """Whether a matrix [N, K] has at most two non-zeros in every four neighbours along K."""
    columns = weight.shape[-1]
    groups = torch.nn.functional.pad(weight.detach() != 0, (0, -columns % GROUP)).view(
        *weight.shape[:-1], -1, GROUP
    )
    return bool((groups.sum(-1) <= 2).all())


def expand_kept(kept: Tensor, mask: Tensor) -> Tensor:
    """Dense [N, S] from kept elements [N, S/2] and their mask [N, S/8]."""
    rows, half = kept.shape
    places = kept_columns(nibbles_of(mask))
    dense = kept.new_zeros(rows, half // 2, GROUP)
    return dense.scatter_(-1, places, kept.view(rows, -1, 2)).view(rows, 2 * half)


def nibbles_of(mask: Tensor) -> Tensor:
    """uint8 [N, S/4]: four mask bits of each group, from the mask [N, S/8]."""
    return torch.stack([mask & 15, mask >> 4], -1).flatten(1)


def kept_columns(nibbles: Tensor) -> Tensor:
    """int64 [..., 2]: the kept columns of each group, ascending, from its mask bits [...]."""
    return torch.tensor(_POSITIONS, device=nibbles.device)[nibbles.int()]


def mask_to_indices(mask: Tensor) -> Tensor:
    """uint8 [N, S/4]: i0 | i1 << 2, the two kept columns of each group with i0 < i1, from the mask
    [N, S/8]."""
    first, second = kept_columns(nibbles_of(mask)).to(torch.uint8).unbind(-1)
    return first | second << 2


def indices_to_mask(indices: Tensor) -> Tensor:
    """The mask [N, S/8] from indices [N, S/4] as ``mask_to_indices`` makes them."""
    one = torch.ones_like(indices)
    nibbles = one << (indices & 3) | one << (indices >> 2)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def to_cutlass(packed: Packed24) -> tuple[Tensor, Tensor]:
    """(values, words) in the layout of torch's CUTLASS kernels
    (``torch.sparse.SparseSemiStructuredTensorCUTLASS``).

    Values are ours.  words: int16 [N, K/16] for 16-bit floats, int32 [N, K/32] for int8: four bits
    of indices a group, low group first, in the interleaved order of CUTLASS's reorder_meta
    (host_reorder.h).

    Raises:
        FormatError: another kind, or N and K are no multiples of 32 and 64 (int8: 16 and 128).
    """
    words = mask_to_indices(packed.mask)
    bytes_ = words[:, 0::2] | words[:, 1::2] << 4
    axes, shape, dtype = _cutlass_layout(packed.kind, *packed.shape)
    rows, columns = packed.shape
    flat = bytes_.contiguous().view(dtype).view(shape).permute(axes)
    return packed.values, flat.reshape(rows, columns // (8 * dtype.itemsize))


def from_cutlass(values: Tensor, words: Tensor) -> Packed24:
    """The canonical form of ``to_cutlass``'s pair; the scale of int8 levels is one, torch keeps
    none.

    Raises:
        FormatError: as ``to_cutlass``, or the words are no valid indices.
    """
    kind = str(values.dtype).removeprefix("torch.")
    rows = values.shape[0]
    columns = 2 * values.shape[1]
    axes, shape, _ = _cutlass_layout(kind, rows, columns)
    permuted = words.contiguous().view([shape[axis] for axis in axes])
    inverse = sorted(range(len(axes)), key=axes.__getitem__)
    bytes_ = permuted.permute(inverse).reshape(rows, -1).contiguous().view(torch.uint8)
    indices = torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(1)
    scale = None
    if kind == "int8":
        scale = torch.ones(rows, device=values.device)
    packed = Packed24(kind, (rows, columns), values, indices_to_mask(indices), scale)
    check_packed(packed)
    return packed


def _cutlass_layout(
    kind: str, rows: int, columns: int
) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    """How index words [N, words a row], viewed in a shape, are permuted; that shape; the type of a
    word."""
    known = {"float16": (32, 64), "bfloat16": (32, 64), "int8": (16, 128)}
    if kind not in known:
        raise FormatError(f"torch's CUTLASS layout knows {', '.join(known)}, not {kind}")
    n, k = known[kind]
    if rows % n or columns % k:
        raise FormatError(
            f"torch's CUTLASS layout of {kind} takes multiples of {n} x {k}, got {rows} x {columns}"
        )
    if kind == "int8":  # row 16a + 8p + g, word 2b + h  ->  [b, a, g, h, p]
        return (3, 0, 2, 4, 1), (rows // 16, 2, 8, columns // 64, 2), torch.int32
    # row 32a + 16p + 8q + g, word 2b + h  ->  [b, a, g, p, h, q]
    return (4, 0, 3, 1, 5, 2), (rows // 32, 2, 2, 8, columns // 32, 2), torch.int16


def pack_nibbles(levels: Tensor) -> Tensor:
    """uint8 [N, M/2] from levels [N, M] of -8..7: each + 8, the earlier in the low half; M even."""
    raised = (levels.to(torch.int16) + 8).to(torch.uint8)
    return raised[:, 0::2] | raised[:, 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """int8 levels [N, M] from ``pack_nibbles``'s [N, M/2]."""
    return (torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int8)) - 8


def check_packed(packed: Packed24) -> None:
    """Raises FormatError where a Packed24 is not what the module's table says."""
    if packed.kind not in KINDS:
        raise FormatError(f"kind {packed.kind!r}: expected one of {', '.join(KINDS)}")
    wanted = _tensor_layout(packed.kind, *packed.shape)
    for name, (dtype, shape) in wanted.items():
        found = getattr(packed, name)
        if found is None or found.dtype != dtype or tuple(found.shape) != shape:
            if found is None:
                got = "nothing"
            else:
                got = f"{found.dtype} {list(found.shape)}"
            where = f"{name} of a {packed.kind} weight {list(packed.shape)}"
            raise FormatError(f"{where}: expected {dtype} {list(shape)}, got {got}")
    pairs = (packed.mask & 0x55) + (packed.mask >> 1 & 0x55)
    counts = (pairs & 0x33) + (pairs >> 2 & 0x33)  # of ones, in each half of a byte
    bad = counts != 0x22
    if bool(bad.any()):
        row, byte = bad.nonzero()[0].tolist()
        group = 2 * byte + int(int(counts[row, byte]) & 0xF == 2)
        where = f"mask: row {row}, columns {4 * group}-{4 * group + 3}"
        raise FormatError(
            f"{where} do not keep exactly two; the packed weight is damaged: pack it again"
        )


def _tensor_layout(
    kind: str, rows: int, columns: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    wide = count_stored_columns(columns)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "mask": (torch.uint8, (rows, wide // 8))
    }
    if kind in FLOAT_KINDS:
        return layout | {"values": (FLOAT_KINDS[kind], (rows, wide // 2))}
    if kind == "int8":
        return layout | {
            "values": (torch.int8, (rows, wide // 2)),
            "scale": (torch.float32, (rows,)),
        }
    groups = -(-wide // GROUP_INT4)
    return layout | {
        "values": (torch.uint8, (rows, wide // 4)),
        "scale": (torch.bfloat16, (rows, groups)),
    }


def _fill_mask(padded: Tensor) -> Tensor:
    """Mask bits of each group [N, S/4], filled up to two; raises where a group has more."""
    bits = padded.view(len(padded), -1, GROUP) != 0
    nibbles = (
        bits.to(torch.uint8) * torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=bits.device)
    ).sum(-1)
    filled = torch.tensor(_FILLED, dtype=torch.uint8, device=padded.device)[nibbles.int()]
    bad = (filled == 0).nonzero()
    if len(bad):
        row, group = bad[0].tolist()
        where = (
            f"row {row}, columns {4 * group}-{4 * group + 3} hold "
            f"{int(bits[row, group].sum())} non-zeros"
        )
        if len(bad) > 1:
            others = f"{len(bad)} such groups"
        else:
            others = "the only such group"
        raise FormatError(
            f"not 2:4: {where}, at most 2 are allowed ({others}): prune the weight to 2:4 first"
        )
    return filled


def _check_weight(weight: Tensor, kind: str, scale: Tensor | None) -> None:
    if kind not in KINDS:
        raise FormatError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise FormatError(f"weight: expected a matrix [N, K], got {list(weight.shape)}")
    expected = FLOAT_KINDS.get(kind, torch.int8)
    if weight.dtype != expected:
        raise FormatError(
            f"a {kind} weight is given in {expected}, got {weight.dtype}: convert it first"
        )
    if (kind in QUANTIZED_KINDS) != (scale is not None):
        raise FormatError(
            f"kind {kind}: {'a scale is needed' if scale is None else 'takes no scale'}"
        )
    if kind in FLOAT_KINDS:
        _check_finite("weight", weight)
        return
    assert scale is not None
    low, high = LEVELS[kind]
    if int(weight.min()) < low or int(weight.max()) > high:
        span = f"{int(weight.min())}..{int(weight.max())}"
        raise FormatError(f"{kind} levels lie in {low}..{high}, got {span}: clamp them")
    shape = _tensor_layout(kind, *weight.shape)["scale"][1]
    if tuple(scale.shape) != shape:
        where = f"scale of a {kind} weight {list(weight.shape)}"
        raise FormatError(f"{where}: expected {list(shape)}, got {list(scale.shape)}")
    _check_finite("scale", scale.to(SCALE_DTYPE[kind]))


def _check_finite(name: str, tensor: Tensor) -> None:
    bad = (~torch.isfinite(tensor)).nonzero()
    if len(bad):
        at = bad[0].tolist()
        where = f"{name}{at} is {tensor[tuple(at)].item()} ({len(bad)} elements are not finite)"
        raise FormatError(f"{where}: the model is damaged; nothing was packed")


def _first_two_columns(held: list[int]) -> list[int]:
    """The first two columns kept: what is held, then the first free ones."""
    return sorted((held + [i for i in range(GROUP) if i not in held])[:2])


_HELD = [
    [i for i in range(GROUP) if nibble >> i & 1] for nibble in range(16)
]  # by a group's mask bits: columns
_POSITIONS = [_first_two_columns(held) for held in _HELD]
_FILLED = [
    sum(1 << i for i in _first_two_columns(held)) if len(held) <= 2 else 0 for held in _HELD
]  # 0: more than two
