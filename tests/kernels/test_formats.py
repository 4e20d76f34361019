"""Packing is exact, its masks are always valid, and it refuses what is not 2:4; others' formats
agree with ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse import _semi_structured_conversions as theirs
from zoo.sparse24 import quantized, weight_24

from secateur.kernels.sparse24 import formats
from secateur.kernels.sparse24.formats import (
    FormatError,
    Packed24,
    check_packed,
    from_cutlass,
    is_24,
    pack,
    to_cutlass,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
shapes = st.tuples(st.integers(1, 70), st.integers(1, 300))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(FLOATS), st.floats(0, 1), st.integers(0, 99))
def test_floats_come_back_bit_for_bit_and_the_mask_keeps_two(
    shape: tuple[int, int], dtype: torch.dtype, empty: float, seed: int
) -> None:
    weight = weight_24(*shape, dtype, empty, seed)
    packed = pack(weight)
    assert is_24(weight) and torch.equal(bits(packed.to_dense()), bits(weight))
    wide = formats.count_stored_columns(shape[1])
    assert packed.values.shape == (shape[0], wide // 2) and packed.mask.shape == (
        shape[0],
        wide // 8,
    )
    each = packed.mask[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    assert bool((each.view(shape[0], -1, 4).sum(-1) == 2).all())
    again = Packed24.from_tensors(packed.to_tensors(), packed.kind, packed.shape)
    assert torch.equal(again.to_dense(), weight)


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(["int8", "int4"]), st.floats(0, 1), st.integers(0, 99))
def test_levels_come_back_and_scales_meet_their_columns(
    shape: tuple[int, int], kind: str, empty: float, seed: int
) -> None:
    levels, scale = quantized(weight_24(*shape, empty=empty, seed=seed), kind)
    packed = pack(levels, kind, scale)
    assert torch.equal(packed.to_levels(), levels)
    factor = [
        [float(scale[n] if kind == "int8" else scale[n, k // 128]) for k in range(shape[1])]
        for n in (0, -1)
    ]
    assert torch.equal(packed.to_dense()[[0, -1]], levels[[0, -1]].float() * torch.tensor(factor))
    assert Packed24.from_tensors(packed.to_tensors(), kind, shape).nbytes == packed.nbytes


def test_layout_of_one_row_by_hand() -> None:
    packed = pack(
        torch.tensor([[0, 5.0, 0, 7], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 9]]).view(1, 16)
    )
    assert packed.values.tolist() == [[5, 7, 1, 0, 0, 0, 0, 9]]
    assert packed.mask.tolist() == [[0b0011_1010, 0b1001_0011]]
    assert formats.mask_to_indices(packed.mask).tolist() == [
        [1 | 3 << 2, 0 | 1 << 2, 0 | 1 << 2, 0 | 3 << 2]
    ]
    four = pack(
        torch.tensor([[0, -8, 0, 7, 1, 0, 0, 2]], dtype=torch.int8), "int4", torch.ones(1, 1)
    )
    assert four.values.tolist() == [[0 | 15 << 4, 9 | 10 << 4]]


def test_short_rows_are_padded_with_valid_groups() -> None:
    packed = pack(torch.tensor([[1.0, 0, 2, 0, 3]]))
    assert packed.stored_columns == 8 and packed.mask.tolist() == [[0b0011_0101]]
    assert packed.values.tolist() == [[1, 2, 3, 0]] and packed.to_dense().tolist() == [
        [1, 0, 2, 0, 3]
    ]


def test_negative_zero_becomes_zero_and_denormals_stay() -> None:
    tiny = torch.tensor([[-0.0, 1e-45, -0.0, -1e-45]])
    packed = pack(tiny)
    assert (
        packed.values[:, :2].tolist() == tiny[:, 1::2].tolist() and packed.mask[0, 0] & 15 == 0b1010
    )
    assert not torch.signbit(pack(torch.full((1, 8), -0.0)).values).any()
    assert packed.to_dense().tolist() == [[0.0, tiny[0, 1].item(), 0.0, tiny[0, 3].item()]]


def spoiled(column: int, value: float) -> Tensor:
    weight = weight_24(9, 32)
    weight[5, column] = value
    return weight


BAD: list[tuple[str, Callable[[], object]]] = [
    (r"weight\[5, 17\] is nan \(1 elements", lambda: pack(spoiled(17, float("nan")))),
    (r"weight\[5, 17\] is -inf", lambda: pack(spoiled(17, float("-inf")))),
    (
        r"row 0, columns 0-3 hold 3 non-zeros.*the only "
        r"such group",
        lambda: pack(torch.tensor([[1.0, 2, 3, 0]])),
    ),
    (r"row 0, columns 0-3 hold 4 non-zeros.*18 such groups", lambda: pack(torch.ones(9, 8))),
    (r"expected a matrix", lambda: pack(torch.ones(8))),
    (r"expected a matrix", lambda: pack(torch.ones(0, 8))),
    (r"kind 'float64'", lambda: pack(torch.zeros(1, 8, dtype=torch.float64))),
    (
        r"given in torch.int8, got "
        r"torch.float32",
        lambda: pack(torch.zeros(1, 8), "int8", torch.ones(1)),
    ),
    (r"a scale is needed", lambda: pack(torch.zeros(1, 8, dtype=torch.int8), "int8")),
    (r"takes no scale", lambda: pack(torch.zeros(1, 8), scale=torch.ones(1))),
    (
        r"in -127..127, "
        r"got "
        r"-128..0",
        lambda: pack(torch.tensor([[0, -128]], dtype=torch.int8), "int8", torch.ones(1)),
    ),
    (
        r"lie in -8..7, "
        r"got 0..8",
        lambda: pack(torch.tensor([[0, 8]], dtype=torch.int8), "int4", torch.ones(1, 1)),
    ),
    (
        r"expected \[3, 2\], got",
        lambda: pack(torch.zeros(3, 136, dtype=torch.int8), "int4", torch.ones(3, 1)),
    ),
    (
        r"scale\[1\] is inf",
        lambda: pack(torch.zeros(2, 8, dtype=torch.int8), "int8", torch.tensor([1, float("inf")])),
    ),
    (
        r"scale\[0, 0\] is inf",
        lambda: pack(torch.zeros(1, 8, dtype=torch.int8), "int4", torch.full((1, 1), 3.4e38)),
    ),
    (
        r"expected \[3\], got \[2\]",
        lambda: formats.pack_dense(torch.zeros(3, 8, dtype=torch.int8), torch.ones(2)),
    ),
]


@pytest.mark.parametrize(("message", "make"), BAD, ids=[message for message, _ in BAD])
def test_what_cannot_be_packed_is_refused_by_name(message: str, make: Callable[[], object]) -> None:
    with pytest.raises(FormatError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "mask",
            torch.zeros(3, 4, dtype=torch.uint8),
            "row 0, columns 0-3 do not keep exactly two",
        ),
        (
            "mask",
            torch.full((3, 3), 0x33, dtype=torch.uint8),
            r"mask of a float32.*expected torch.uint8 \[3, 4\]",
        ),
        ("values", torch.zeros(3, 16, dtype=torch.float16), "values of a float32"),
        ("scale", torch.ones(3), "has the tensors"),
    ],
)
def test_damaged_tensors_are_refused(name: str, tensor: Tensor, message: str) -> None:
    tensors = pack(weight_24(3, 32)).to_tensors()
    with pytest.raises(FormatError, match=message):
        Packed24.from_tensors(tensors | {name: tensor}, "float32", (3, 32))


def test_more_than_two_in_a_group_is_not_24() -> None:
    assert is_24(torch.tensor([[0, 1, 0, 1, 1, 1]])) and not is_24(
        torch.tensor([[1, 0, 1, 1, 0, 0]])
    )


@pytest.mark.parametrize(
    ("kind", "share"), [("bfloat16", 0.5625), ("int8", 0.3125), ("int4", 0.1954)]
)
def test_bytes_beside_dense_bfloat16(kind: str, share: float) -> None:
    """int8's bound is that of values and mask: its row scales come on top, 4 bytes a row."""
    weight = weight_24(64, 4096)
    packed = (
        pack(weight.bfloat16())
        if kind == "bfloat16"
        else pack(*_ordered(kind, *quantized(weight, kind)))
    )
    scales = 4 * 64 if kind == "int8" else 0
    assert packed.nbytes - scales <= share * 2 * weight.numel()


def _ordered(kind: str, levels: Tensor, scale: Tensor) -> tuple[Tensor, str, Tensor]:
    return levels, kind, scale


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([torch.bfloat16, torch.float16, torch.int8]),
    st.integers(0, 99),
)
def test_torchs_cutlass_layout(n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    rows, columns = (16 * n, 128 * k) if dtype == torch.int8 else (32 * n, 64 * k)
    weight = (weight_24(rows, columns, seed=seed) * 9).to(dtype)
    packed = pack(weight, "int8", torch.ones(rows)) if dtype == torch.int8 else pack(weight)
    values, words = theirs.sparse_semi_structured_from_dense_cutlass(weight)
    ours = to_cutlass(packed)
    assert torch.equal(ours[0], values) and torch.equal(ours[1], words)
    assert torch.equal(from_cutlass(values, words).mask, packed.mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_torch_reads_our_filler_and_we_read_its(dtype: torch.dtype) -> None:
    weight = (weight_24(64, 256, empty=0.6) * 9).to(dtype)
    packed = pack(weight, "int8", torch.ones(64)) if dtype == torch.int8 else pack(weight)
    assert torch.equal(theirs.sparse_semi_structured_to_dense_cutlass(*to_cutlass(packed)), weight)
    assert torch.equal(
        from_cutlass(*theirs.sparse_semi_structured_from_dense_cutlass(weight)).to_levels(), weight
    )


def test_cutlass_refuses_what_it_has_no_layout_for() -> None:
    for weight in (
        weight_24(32, 64),
        weight_24(16, 64, torch.bfloat16),
        weight_24(32, 72, torch.float16),
    ):
        with pytest.raises(FormatError, match="CUTLASS"):
            to_cutlass(pack(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("empty", [0.0, 0.5])
def test_compressed_tensors_reads_and_writes_the_same_bytes(
    dtype: torch.dtype, empty: float
) -> None:
    name = "compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask"
    module = pytest.importorskip(name, reason="compressed-tensors 0.12 to 0.14 has the format")
    weight = weight_24(16, 72, dtype, empty)
    packed = pack(weight)
    values, mask = module.sparse24_bitmask_compress(weight)
    assert torch.equal(
        module.sparse24_bitmask_decompress(packed.values, packed.mask, weight.shape), weight
    )
    if not empty:  # where groups have fewer than two, each fills up in its own way
        assert torch.equal(bits(values), bits(packed.values)) and torch.equal(mask, packed.mask)
    read = Packed24.from_tensors({"values": values, "mask": mask}, packed.kind, packed.shape)
    assert torch.equal(read.to_dense(), weight)


def test_every_byte_of_a_mask_is_judged_by_its_two_halves() -> None:
    packed = pack(weight_24(1, 8))
    for byte in range(256):
        one = replace(packed, mask=torch.tensor([[byte]], dtype=torch.uint8))
        wrong = [half for half in range(2) if (byte >> 4 * half & 0xF).bit_count() != 2]
        if not wrong:
            check_packed(one)
            continue
        with pytest.raises(
            FormatError, match=f"row 0, columns {4 * wrong[0]}-{4 * wrong[0] + 3} do not keep"
        ):
            check_packed(one)
