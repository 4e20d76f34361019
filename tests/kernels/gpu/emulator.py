"""The sparse tensor-core instruction as arithmetic, and an interpreter of the PTX that the kernels'
assembly uses.

Arrays hold a register of every lane: uint32 [..., 32].  Lane = 4 * g + t.  Facts of mma.sp.m16n8k32
(PTX ISA), checked against the metadata that torch's converter for CUTLASS writes
(test_emulator.py):

* a, register r: row g + 8 * (r & 1), kept values 2 * (4 * (r >> 1) + t) and the next; low half
    first;
* b, register r: rows 8 * r + 2 * t and the next, column g;
* c and d, register r: row g + 8 * (r >> 1), column 2 * t + (r & 1);
* e of lanes t = 2 * selector + h: bits 0-15 row g, 16-31 row g + 8, columns 16 * h .. 16 * h + 15;
codes i0 | i1 << 2,
  where i0 < i1 or the result is undefined.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LANE = np.arange(32)
G, T, R, J = LANE // 4, LANE % 4, np.arange(4), np.arange(2)
# Index arrays [32 lanes, 4 registers, 2 halves].
A_ROW = (G[:, None, None] + 8 * (R[:, None] & 1)) + 0 * J
A_COL = 8 * (R[:, None] >> 1) + 2 * T[:, None, None] + J
B_ROW = 8 * R[:, None] + 2 * T[:, None, None] + J
B_COL = G[:, None, None] + 0 * B_ROW
C_ROW, C_COL = G[:, None] + 8 * (R >> 1), 2 * T[:, None] + (R & 1)
SWIZZLE_128 = 1


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: Array) -> Array:
    """uint16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_f16(bits: Array) -> Array:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def to_f16(values: Array) -> Array:
    return values.astype(np.float16).view(np.uint16)


FLOATS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "bf16": (from_bf16, to_bf16),
    "f16": (from_f16, to_f16),
}


def halves(words: Array, element: str) -> Array:
    """float64 [..., 2] of packed words, low half first."""
    words = words.astype(np.uint32)
    return FLOATS[element][0](np.stack([words & 0xFFFF, words >> 16], -1)).astype(np.float64)


def join(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def expand_a(a: Array, e: Array, selector: int, element: str) -> Array:
    """Dense [..., 16, 32] of the registers a [..., 32, 4] and the index words e [..., 32]."""
    kept = np.zeros((*a.shape[:-2], 16, 16))
    kept[..., A_ROW, A_COL] = halves(a, element)
    lanes = (
        e[..., selector == (T // 2)].reshape(*e.shape[:-1], 8, 2).astype(np.uint32)
    )  # [..., g, h]
    fields = (
        lanes[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)
    ) & 15  # [..., g, h, row half and group]
    codes = np.moveaxis(
        fields.reshape(*fields.shape[:-1], 2, 4), -2, -4
    )  # [..., row half, g, h, group]
    codes = codes.reshape(*codes.shape[:-4], 16, 8)
    first, second = (codes & 3).astype(np.int64), (codes >> 2).astype(np.int64)
    assert (first < second).all(), "an index word is not ordered: undefined on hardware"
    pairs = kept.reshape(*kept.shape[:-1], 8, 2)
    dense = np.zeros((*codes.shape, 4))
    np.put_along_axis(dense, first[..., None], pairs[..., :1], -1)
    np.put_along_axis(dense, second[..., None], pairs[..., 1:], -1)
    return dense.reshape(*codes.shape[:-1], 32)


def mma_sp(a: Array, b: Array, c: Array, e: Array, selector: int, element: str = "bf16") -> Array:
    """d float32 [..., 32, 4] of a, b uint32 [..., 32, 4], c float32 [..., 32, 4] and index words e
    uint32 [..., 32]."""
    right = np.zeros((*b.shape[:-2], 32, 8))
    right[..., B_ROW, B_COL] = halves(b, element)
    total = expand_a(a, e, selector, element) @ right
    return (total[..., C_ROW, C_COL] + c).astype(np.float32)


def shared_fragments(memory: Array, base: int, descriptor: int, columns: int) -> Array:
    """b uint32 [columns / 8, 32, 4] of the K-major tile [columns, 32] of 16-bit floats that a
    descriptor points to."""
    start, stride = (descriptor & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    assert descriptor >> 62 == SWIZZLE_128, "only the 128-byte swizzle is modelled"
    n = 8 * np.arange(columns // 8)[:, None, None, None] + B_COL
    address = start + n // 8 * stride + n % 8 * 128 + 2 * B_ROW
    address ^= ((address >> 7) & 7) << 4
    address -= base
    assert address.min() >= 0 and address.max() < memory.size, (
        "a descriptor that points outside shared memory"
    )
    elements = memory.view(np.uint16)[address // 2]
    return join(elements[..., 0], elements[..., 1])


class Ptx:
    """Runs inline assembly on whole arrays: `operands` are the registers $0, $1, ... as arrays
    [..., 32].

    `memory` is shared memory in bytes, at address `base` (the symbol global_smem).
    """

    def __init__(self, memory: Array | None = None, base: int = 0) -> None:
        self.memory, self.base = memory, base
        self.registers: dict[str, Array] = {}
        self.pending = ""

    def run(self, text: str, operands: dict[str, Array]) -> dict[str, Array]:
        self.registers = dict(operands)
        body = text.strip()
        if body.startswith("{"):
            body = body[1:].rsplit("}", 1)[0]
        for statement in filter(None, (part.strip() for part in body.split(";"))):
            opcode, _, rest = statement.partition(" ")
            if opcode == ".reg":
                continue
            names = [
                name.strip() for name in re.findall(r"\{[^}]*\}|[^,{}]+", rest) if name.strip()
            ]
            handler = next((f for prefix, f in HANDLERS.items() if opcode.startswith(prefix)), None)
            assert handler is not None, f"the emulator does not know {opcode}"
            handler(self, opcode, names)
        return self.registers

    def __getitem__(self, name: str) -> Array:
        if name in self.registers:
            return self.registers[name]
        if name == "global_smem":
            return np.uint32(self.base)
        if name.startswith("0f"):
            return np.array(int(name[2:], 16), np.uint32).view(np.float32)
        return np.array(int(name, 0), np.int64)

    def words(self, name: str) -> Array:
        """A 32-bit operand as unsigned bits."""
        value = np.asarray(self[name])
        return value.view(np.uint32) if value.dtype == np.float32 else value.astype(np.uint32)

    def group(self, name: str) -> list[str]:
        return [part.strip() for part in name.strip("{}").split(",")]


def _move(ptx: Ptx, opcode: str, names: list[str]) -> None:
    if opcode.endswith("b64"):
        low, high = (ptx.words(part).astype(np.uint64) for part in ptx.group(names[1]))
        ptx.registers[names[0]] = low | high << np.uint64(32)
    else:
        ptx.registers[names[0]] = ptx.words(names[1])


def _permute_bytes(ptx: Ptx, opcode: str, names: list[str]) -> None:
    a, b = ptx.words(names[1]).astype(np.uint64), ptx.words(names[2]).astype(np.uint64)
    both, out = a | b << np.uint64(32), np.uint64(0)
    for i in range(4):
        pick = int(names[3], 0) >> (4 * i) & 15
        assert pick < 8, "sign replication is not modelled"
        out = out | (both >> np.uint64(8 * pick) & np.uint64(255)) << np.uint64(8 * i)
    ptx.registers[names[0]] = out.astype(np.uint32)


def _logic3(ptx: Ptx, opcode: str, names: list[str]) -> None:
    a, b, c = (ptx.words(name) for name in names[1:4])
    table, out = int(names[4], 0), np.uint32(0)
    for i in range(8):
        if table >> i & 1:
            out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    ptx.registers[names[0]] = out


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Ptx, str, list[str]], None]:
    def run(ptx: Ptx, opcode: str, names: list[str]) -> None:
        if opcode.endswith("f32"):
            ptx.registers[names[0]] = function(
                *(ptx.words(n).view(np.float32) for n in names[1:3])
            ).view(np.uint32)
        elif opcode.endswith("64"):
            ptx.registers[names[0]] = function(
                *(np.asarray(ptx[n]).astype(np.uint64) for n in names[1:3])
            )
        else:
            ptx.registers[names[0]] = function(*(ptx.words(n) for n in names[1:3]))

    return run


def _convert_pair(ptx: Ptx, opcode: str, names: list[str]) -> None:
    """cvt.rn.{element}x2.f32 d, high, low"""
    narrow = FLOATS[opcode.split(".")[2].removesuffix("x2")][1]
    high, low = (narrow(ptx.words(name).view(np.float32)) for name in names[1:3])
    ptx.registers[names[0]] = join(low, high)


def _fma_pair(ptx: Ptx, opcode: str, names: list[str]) -> None:
    element = opcode.split(".")[2].removesuffix("x2")
    a, b, c = (halves(ptx.words(name), element) for name in names[1:4])
    out = FLOATS[element][1](a * b + c)
    ptx.registers[names[0]] = join(out[..., 0], out[..., 1])


def _stack(ptx: Ptx, name: str) -> Array:
    return np.stack(np.broadcast_arrays(*(ptx.words(part) for part in ptx.group(name))), -1)


def _mma(ptx: Ptx, opcode: str, names: list[str]) -> None:
    assert "ordered_metadata" in opcode and "m16n8k32.row.col" in opcode, opcode
    a, b, c = (_stack(ptx, name) for name in names[1:4])
    d = mma_sp(
        a, b, c.view(np.float32), ptx.words(names[4]), int(names[5], 0), opcode.split(".")[-2]
    )
    for register, name in enumerate(ptx.group(names[0])):
        ptx.registers[name] = d[..., register].view(np.uint32)


def _wgmma(ptx: Ptx, opcode: str, names: list[str]) -> None:
    """wgmma.mma_async.sp {d}, {a}, descriptor, e, selector, keep d, scale a, scale b, transpose
    b"""
    assert ptx.memory is not None and "fence" in ptx.pending, "no fence before wgmma"
    assert [int(name, 0) for name in names[6:]] == [1, 1, 0], names[6:]
    outs, a, e = ptx.group(names[0]), _stack(ptx, names[1]), ptx.words(names[3])
    descriptors = np.unique(ptx[names[2]])
    assert len(descriptors) == 1, "the lanes of a warpgroup disagree on the descriptor"
    b = shared_fragments(ptx.memory, ptx.base, int(descriptors[0]), 2 * len(outs))
    c = np.stack([ptx.words(name) for name in outs], -1).view(
        np.float32
    )  # [..., 32, 4 a tile of 8 columns]
    c = np.moveaxis(c.reshape(*c.shape[:-1], -1, 4), -2, -3)  # [..., tiles, 32, 4]
    dense = expand_a(a, e, int(names[4]), opcode.split(".")[-1])[..., None, :, :]
    right = np.zeros((b.shape[0], 32, 8))
    right[..., B_ROW, B_COL] = halves(b, opcode.split(".")[-1])
    with np.errstate(over="ignore"):  # poison, where a fault is planted
        d = ((dense @ right)[..., C_ROW, C_COL] + c).astype(np.float32)
    flat = np.moveaxis(d, -3, -2).reshape(*d.shape[:-3], 32, len(outs))
    for register, name in enumerate(outs):
        ptx.registers[name] = np.ascontiguousarray(flat[..., register]).view(np.uint32)
    ptx.pending = "fence, products in flight"


def _order(step: str, needed: str) -> Callable[[Ptx, str, list[str]], None]:
    def run(ptx: Ptx, opcode: str, names: list[str]) -> None:
        assert needed in ptx.pending, f"{opcode} out of order"
        ptx.pending = step

    return run


def _nothing(ptx: Ptx, opcode: str, names: list[str]) -> None:
    return


HANDLERS: dict[str, Callable[[Ptx, str, list[str]], None]] = {
    "mov.": _move,
    "prmt.b32": _permute_bytes,
    "lop3.b32": _logic3,
    "shr.u32": _binary(lambda a, b: a >> b),
    "and.b32": _binary(lambda a, b: a & b),
    "add.": _binary(lambda a, b: a + b),
    "cvt.rn.": _convert_pair,
    "fma.rn.": _fma_pair,
    "setp.": _nothing,
    "mma.sp": _mma,
    "wgmma.fence": _order("fence", ""),
    "wgmma.mma_async.sp": _wgmma,
    "wgmma.commit_group": _order("committed", "in flight"),
    "wgmma.wait_group": _order("", "committed"),
}
