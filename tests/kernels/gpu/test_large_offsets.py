"""Weights of more than 2^31 words: the last program of each kernel, under the stand-in, on imagined
memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gluon_standin import DType, Kernels, Pointer, Program

N, K, B = 540_672, 16_384, 3
TILES = N // 16
INT32, BF16 = DType("i32", np.int32), DType("bf16", np.uint16)


class Imagined:
    """A buffer of `size` equal elements that notes the last one that was reached."""

    def __init__(self, size: int, value: int, dtype: DType) -> None:
        self.size, self.value, self.dtype, self.last = size, value, dtype, -1

    def __getitem__(self, offsets: Any) -> Any:
        self.last = max(self.last, int(np.max(offsets)))
        return np.full(np.shape(offsets), self.value, self.dtype.numpy)

    def __setitem__(self, offsets: Any, values: Any) -> None:
        self.last = max(self.last, int(np.max(offsets)))


SHAPES: dict[str, tuple[dict[str, Any], int]] = {  # compile-time values, row tiles of a program
    "decode": ({"KIND": "float", "F16": False, "P": 4, "MT": 2, "NT": 1, "WARPS": 8, "L": None}, 2),
    "gemm": (
        {"KIND": "float", "F16": False, "MT": 1, "NT": 1, "WM": 2, "WN": 1, "KU": 2, "STAGES": 2},
        2,
    ),
    "wgmma": ({"F16": False, "WG": 1, "STAGES": 2, "L": None}, 4),
}


def reached(kernels: Kernels, name: str) -> tuple[int, int]:
    """How far from their ends the last program stops reading values and writing results: (0, 0) is
    right."""
    shape, tiles = SHAPES[name]
    x = Imagined(B * K // 2, 0, INT32) if name != "wgmma" else Imagined(B * K, 0, BF16)
    values, indices = (
        Imagined(TILES * K // 32 * 128, 0, INT32),
        Imagined(TILES * K // 64 * 32, 0x44444444, INT32),
    )
    out = Imagined(B * N, 0, BF16)
    tensors = [x, values, indices, *([] if name == "wgmma" else [indices]), out]
    layouts = dict.fromkeys(("L", "LA", "LE", "LX")) if name == "gemm" else {}
    kernels.machine.program = Program(
        (TILES // tiles - 1, 0, 0), (TILES // tiles, 1, 1), early=False
    )
    kernel = getattr(getattr(kernels, name), name)
    kernel(*(Pointer(t, t.dtype) for t in tensors), B, N, K, **shape, **layouts)
    return values.size - 1 - values.last, out.size - 1 - out.last


@pytest.mark.parametrize("name", SHAPES)
def test_the_last_program_reads_and_writes_to_the_very_end(name: str) -> None:
    assert TILES * K // 32 * 128 > 2**31
    assert reached(Kernels(), name) == (0, 0)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("decode", "tile.to(gl.int64) * blocks", "tile * blocks"),
        (
            "gemm",
            "a_tile = gl.minimum(tile0 + ar % TILES, last_tile).to(gl.int64)",
            "a_tile = tile0 + ar % TILES",
        ),
        (
            "wgmma",
            "gl.minimum(tile, (N + 15) // 16 - 1).to(gl.int64)",
            "gl.minimum(tile, (N + 15) // 16 - 1)",
        ),
    ],
)
def test_offsets_of_32_bits_are_seen(name: str, old: str, new: str) -> None:
    with pytest.raises(AssertionError, match="outside its tensor"):
        reached(Kernels((name, old, new)), name)
