"""Fragment order: exact both ways, padding is valid, sizes are those that the table of the module
states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights24 import KINDS, random_24, random_packed

from secateur.kernels.sparse24.formats import FormatError, pack
from secateur.kernels.sparse24.gpu.fragments import (
    BLOCK_K,
    Fragments,
    pack_fragments,
    restore_dense,
    unpack_fragments,
)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 300),
    st.sampled_from(KINDS),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2**31),
)
def test_the_canonical_weight_comes_back_bit_for_bit(
    n: int, k: int, kind: str, thin: float, seed: int
) -> None:
    packed = random_packed(n, k, kind, torch.Generator().manual_seed(seed), thin)
    back = unpack_fragments(pack_fragments(packed))
    assert (back.kind, back.shape) == (kind, (n, k))
    ours, theirs = packed.to_tensors(), back.to_tensors()
    assert ours.keys() == theirs.keys()
    assert all(
        a.dtype == theirs[name].dtype and torch.equal(a, theirs[name]) for name, a in ours.items()
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from(KINDS), st.integers(0, 2**31))
def test_every_index_word_is_ordered_and_padding_is_zero(
    n: int, k: int, kind: str, seed: int
) -> None:
    weight = pack_fragments(random_packed(n, k, kind, torch.Generator().manual_seed(seed)))
    codes = torch.stack([weight.indices >> s & 15 for s in range(0, 32, 4)])
    assert ((codes & 3) < (codes >> 2)).all()
    rows, columns = 16 * len(weight.values), weight.padded_columns
    assert rows - n < 16 and columns - k < max(8, BLOCK_K[kind]) and columns % BLOCK_K[kind] == 0
    whole = Fragments(
        kind, (rows, columns), weight.values, weight.indices, padded_scale(weight, rows)
    )
    dense = unpack_fragments(whole).to_levels()
    assert not dense[n:].any() and not dense[:, k:].any()


def padded_scale(weight: Fragments, rows: int) -> torch.Tensor | None:
    if weight.kind != "int8" or weight.scale is None:
        return weight.scale
    return torch.nn.functional.pad(weight.scale, (0, rows - len(weight.scale)))


@pytest.mark.parametrize(
    ("kind", "share"),
    [("bfloat16", 0.5625), ("float16", 0.5625), ("int8", 0.3125), ("int4", 0.1954)],
)
def test_bytes_against_dense_bf16(kind: str, share: float) -> None:
    weight = pack_fragments(random_packed(256, 4096, kind, torch.Generator().manual_seed(0)))
    row_scales = (
        4 * 256 if kind == "int8" else 0
    )  # a float a row, beside the 4096 columns of the statement
    assert weight.nbytes - row_scales <= share * 2 * 256 * 4096


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weight_is_that_of_the_canonical_form(kind: str) -> None:
    packed = random_packed(40, 132, kind, torch.Generator().manual_seed(1))
    weight = pack_fragments(packed)
    dense = restore_dense(
        weight.values, weight.indices, weight.scale, kind, 40, 132, torch.bfloat16
    )
    assert torch.equal(dense, packed.to_dense(torch.float32).bfloat16())


def test_a_denormal_and_an_infinity_keep_their_bits() -> None:
    weight = random_24(16, 64, torch.Generator().manual_seed(2)).to(torch.bfloat16)
    packed = pack(weight)
    packed.values.view(torch.int16)[0, :4] = torch.tensor(
        [1, 0x7F80, -0x80, 0x7F7F], dtype=torch.int16
    )
    assert torch.equal(
        unpack_fragments(pack_fragments(packed)).values.view(torch.int16),
        packed.values.view(torch.int16),
    )


def test_float32_is_refused_with_what_to_do() -> None:
    with pytest.raises(FormatError, match="convert it to bfloat16"):
        pack_fragments(pack(random_24(16, 64, torch.Generator())))


def test_a_damaged_mask_is_refused() -> None:
    packed = random_packed(16, 64, "bfloat16", torch.Generator().manual_seed(3))
    packed.mask[3, 2] = 0x31
    with pytest.raises(FormatError, match="row 3, columns 16-19"):
        pack_fragments(packed)
