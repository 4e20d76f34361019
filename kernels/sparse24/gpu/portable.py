"""The same products on the same fragment-order weights in plain Triton, without the sparse tensor
cores.

For devices that the Gluon kernels do not serve, for checks (Triton's interpreter runs these on
CPU), and, `expand`, for
prefill: a dense copy of the weight that a vendor's product then reads.  They are right, not fast:
selecting the columns costs more instructions than the memory that 2:4 saves on a chip with the
bandwidth of a Hopper.

A program looks at 16 rows x 64 * U columns as a flat array of U * 256 kept pairs, one of each group
of four columns, in the order (block of 64 columns, k tile of 32, lane, register) of the float
kinds.  x is read and dense weights are written as words of two 16-bit floats, widened by shifts:
Triton's interpreter is wrong on bf16 arithmetic.
"""

# mypy: ignore-errors
# The kernel language looks like Python, but its values have no Python types.

import triton
import triton.language as tl


@triton.jit
def widen(half, F16: tl.constexpr):
    """fp32 of the 16-bit float in the low half of each word."""
    if F16:
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (half << 16).to(tl.float32, bitcast=True)


@triton.jit
def narrow(value, F16: tl.constexpr):
    """The fp32 value as a 16-bit float, rounded to nearest even, in the low half of a word."""
    if F16:
        return value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    else:
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 32767 + ((bits >> 16) & 1)) >> 16) & 65535
        return tl.where(value == value, rounded, 32704)  # a NaN's bits could carry into its sign


@triton.jit
def store(pointers, value, mask, F16: tl.constexpr):
    """fp32 values to fp32, bf16 or fp16, rounded to nearest even."""
    if pointers.dtype.element_ty == tl.float32:
        tl.store(pointers, value, mask=mask)
    else:
        bits = narrow(value, F16).to(tl.int16)
        tl.store(pointers, bits.to(pointers.dtype.element_ty, bitcast=True), mask=mask)


@triton.jit
def load_pairs(
    v_ptr, e_ptr, s_ptr, tile, first, blocks, U: tl.constexpr, KIND: tl.constexpr, F16: tl.constexpr
):
    """Kept pairs in fp32, int4 scales applied, and their codes: U blocks from `first`, zeros past
    the end."""
    i = tl.arange(0, U * 256)
    register, lane, odd, block = i & 3, (i >> 2) & 31, (i >> 7) & 1, first + (i >> 8)
    live = block < blocks
    at = tile.to(tl.int64) * blocks + block
    code = tl.load(e_ptr + at * 32 + (lane & 28) + 2 * odd + (register >> 1), mask=live, other=0)
    code = code >> ((register & 1) * 16 + (lane & 3) * 4)
    if KIND == "float":
        word = tl.load(v_ptr + at * 256 + odd * 128 + lane * 4 + register, mask=live, other=0)
        return widen(word, F16), widen(word >> 16, F16), code
    elif KIND == "int8":
        word = tl.load(
            v_ptr + at * 128 + lane * 4 + 2 * odd + (register >> 1), mask=live, other=-2139062144
        )
        word = word >> ((register & 1) * 16)
        return ((word & 255) - 128).to(tl.float32), (((word >> 8) & 255) - 128).to(tl.float32), code
    else:
        # Two blocks of 64 columns share 128 words and a scale of each row.
        pair = tile.to(tl.int64) * (blocks // 2) + block // 2
        word = tl.load(
            v_ptr + pair * 128 + lane * 4 + 2 * (block & 1) + odd, mask=live, other=0
        ) >> (register * 4)
        scale = tl.load(s_ptr + pair * 8 + (lane >> 2), mask=live, other=0) >> ((register & 1) * 16)
        scale = (scale << 16).to(tl.float32, bitcast=True)
        return (
            ((word & 15) - 8).to(tl.float32) * scale,
            (((word >> 16) & 15) - 8).to(tl.float32) * scale,
            code,
        )


@triton.jit
def gemv(
    x_ptr,  # int32 [B, K/2]
    v_ptr,
    e_ptr,
    s_ptr,
    o_ptr,  # [B, N]
    N,
    K,
    KIND: tl.constexpr,
    F16: tl.constexpr,
    U: tl.constexpr,
):
    """o[b, n] = sum over k of x[b, k] * W[n, k], in fp32.  One program owns 16 n of one b: grid
    (tiles, B)."""
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, U * 256)
    register, lane = i & 3, (i >> 2) & 31
    word = (
        (i >> 7) * 16 + (register >> 1) * 8 + (lane & 3) * 2
    )  # of x: the first two columns of the group
    blocks = K // 64
    acc = tl.zeros((U * 256,), tl.float32)
    first = 0
    while first < blocks:
        low, high, code = load_pairs(v_ptr, e_ptr, s_ptr, tile, first, blocks, U, KIND, F16)
        xp = x_ptr + batch * (K // 2) + first * 32 + word
        x01 = tl.load(xp, mask=first + (i >> 8) < blocks, other=0)
        x23 = tl.load(xp + 1, mask=first + (i >> 8) < blocks, other=0)
        xa = tl.where((code & 2) == 0, x01, x23) >> ((code & 1) * 16)
        xb = tl.where((code & 8) == 0, x01, x23) >> (((code >> 2) & 1) * 16)
        acc += low * widen(xa, F16) + high * widen(xb, F16)
        first += U
    # (block, tile), row in eight, lane in four, half of the tile, row + 8: over all but the rows
    rows = tl.sum(tl.sum(tl.sum(tl.reshape(acc, (U * 2, 8, 4, 2, 2)), 3), 2), 0)
    row = tile * 16 + tl.arange(0, 8)[:, None] + 8 * tl.arange(0, 2)[None, :]
    if KIND == "int8":
        rows = rows * tl.load(s_ptr + row, mask=row < N, other=0)
    store(o_ptr + batch * N + row, rows, row < N, F16)


@triton.jit
def expand(
    v_ptr,
    e_ptr,
    s_ptr,
    o_ptr,  # int32 [N, K/2]
    N,
    K,
    KIND: tl.constexpr,
    F16: tl.constexpr,
    U: tl.constexpr,
):
    """o = W, dense, as pairs of 16-bit floats; levels times scales are rounded once.

    One program owns 16 rows x 64 * U columns: grid (tiles, ceil(K / (64 * U))).
    """
    tile, first, blocks = tl.program_id(0), tl.program_id(1) * U, K // 64
    i = tl.arange(0, U * 256)
    register, lane = i & 3, (i >> 2) & 31
    row = tile * 16 + (lane >> 2) + 8 * (register & 1)
    low, high, code = load_pairs(v_ptr, e_ptr, s_ptr, tile, first, blocks, U, KIND, F16)
    if KIND == "int8":
        scale = tl.load(s_ptr + row, mask=row < N, other=0)
        low, high = low * scale, high * scale
    a, b = narrow(low, F16), narrow(high, F16)
    i0, i1 = code & 3, (code >> 2) & 3
    d01 = tl.where(i0 < 2, a << ((i0 & 1) * 16), 0) | tl.where(i1 < 2, b << ((i1 & 1) * 16), 0)
    d23 = tl.where(i0 >= 2, a << ((i0 & 1) * 16), 0) | tl.where(i1 >= 2, b << ((i1 & 1) * 16), 0)
    word = first * 32 + (i >> 7) * 16 + (register >> 1) * 8 + (lane & 3) * 2
    inside = (row < N) & (first + (i >> 8) < blocks)
    out = o_ptr + row.to(tl.int64) * (K // 2) + word
    tl.store(out, d01, mask=inside)
    tl.store(out + 1, d23, mask=inside)


@triton.jit
def combine(
    p_ptr,  # fp32 [splits, B, N]
    b_ptr,  # [N]
    o_ptr,  # [B, N]
    splits,
    N,
    BIAS: tl.constexpr,
    F16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """o = sum of the planes, in order, + bias, rounded once.  One program owns BLOCK columns of a
    row: grid (.., B)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64) * N
    inside = n < N
    total = tl.zeros((BLOCK,), tl.float32)
    plane = p_ptr + row + n
    for _ in range(splits):
        total += tl.load(plane, mask=inside, other=0)
        plane += tl.num_programs(1).to(tl.int64) * N
    if BIAS:
        total += widen(
            tl.load(b_ptr + n, mask=inside, other=0).to(tl.int16, bitcast=True).to(tl.int32), F16
        )
    store(o_ptr + row + n, total, inside, F16)
