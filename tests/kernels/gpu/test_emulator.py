"""The emulated instruction against torch's own metadata for it, and the unpacking assembly over
every value."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
import torch
from gluon_standin import Kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass
from weights24 import random_24


def a_registers(values: np.ndarray) -> np.ndarray:
    """Kept 16-bit values [16, 16] of a tile as a lane's registers [32, 4], by the instruction's own
    index arrays."""
    picked = values[emulator.A_ROW, emulator.A_COL]
    return emulator.join(picked[..., 0], picked[..., 1])


def b_registers(x: np.ndarray) -> np.ndarray:
    """16-bit x [8 batch rows, 32] as registers [32, 4]."""
    picked = x.T[emulator.B_ROW, emulator.B_COL]
    return emulator.join(picked[..., 0], picked[..., 1])


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.bfloat16, torch.float16]))
def test_it_multiplies_what_torch_packs_for_cutlass(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = random_24(32, 64, generator).to(dtype)
    x = torch.randn(8, 64, generator=generator).to(dtype)
    kept, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    words = (
        metadata.reshape(-1).numpy().view(np.uint32).reshape(2, 32)
    )  # [k tile, lane]; selector: the tile of 16 rows
    element = "bf16" if dtype == torch.bfloat16 else "f16"
    for tile in range(2):
        total = np.zeros((32, 4), np.float32)
        for k in range(2):
            a = a_registers(
                bits(kept[16 * tile : 16 * tile + 16, 16 * k : 16 * k + 16].contiguous())
            )
            b = b_registers(bits(x[:, 32 * k : 32 * k + 32].contiguous()))
            total = emulator.mma_sp(a, b, total, words[k], tile, element)
        found = np.zeros((16, 8))
        found[emulator.C_ROW, emulator.C_COL] = total
        want = weight[16 * tile : 16 * tile + 16].double() @ x.double().T
        assert np.allclose(found, want.numpy(), rtol=1e-6, atol=1e-5)


def test_an_index_word_that_is_not_ordered_is_refused() -> None:
    zeros = np.zeros((32, 4), np.uint32)
    with pytest.raises(AssertionError, match="not ordered"):
        emulator.mma_sp(zeros, zeros, zeros.view(np.float32), np.full(32, 0x44444441, np.uint32), 0)


@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_int8_assembly_gives_every_level_exactly(element: str) -> None:
    words = np.arange(256, dtype=np.uint8).view(np.uint32).reshape(4, 16).T  # [lanes, 4 words]
    operands = {f"${8 + i}": np.ascontiguousarray(words[:, i]) for i in range(4)}
    found = emulator.Ptx().run(Kernels().mma.int8_text(element), operands)
    levels = words[..., None] >> np.array([0, 8, 16, 24], np.uint32) & 255
    for out in range(8):
        want = levels[:, out // 2, 2 * (out % 2) : 2 * (out % 2) + 2].astype(np.float64) - 128
        assert (emulator.halves(found[f"${out}"], element) == want).all()


@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_int4_assembly_gives_every_level_exactly(element: str) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (64, 4), dtype=np.uint32)
    operands = {f"${16 + i}": np.ascontiguousarray(words[:, i]) for i in range(4)}
    found = emulator.Ptx().run(Kernels().mma.int4_text(element), operands)
    for out in range(16):
        word, r = words[:, out // 4].astype(np.int64), out % 4
        want = np.stack([(word >> 4 * r & 15) - 8, (word >> 16 + 4 * r & 15) - 8], -1)
        assert (emulator.halves(found[f"${out}"], element) == want).all()
