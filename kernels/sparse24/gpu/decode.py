"""Decode kernel: y[B, N] = x[B, K] @ W[N, K]^T for B <= 8 * NT, W 2:4 in fragment order
(fragments.py); meant to be bound by memory.

Formula: the weight is the sparse left operand of mma.sp (16 rows x 32 columns a warp), x^T the
right one (8 batch rows).  int8: the sum is multiplied by the row's scale at the end.  int4: the sum
of every 128 columns is multiplied by its scale, in fp32.

One program owns the 16 * MT rows of weight tiles pid0 * MT .., all B batch rows, and every
splits-th chunk of WARPS *
P k blocks: each warp takes P blocks of a chunk, so that a program reads consecutive memory.  With
splits = num_programs(1) > 1, program (i, s) writes plane s of the output [splits, B, N], which the
caller adds up in a fixed
order: equal inputs give equal bits. Weights go from global memory to registers, one step ahead of
the instruction that uses them. Tensors are [P, MT, NT, WARPS, 32 lanes, 4 registers]: the last axis
is a fragment, WARPS the warps, the rest registers of a lane.
"""

# mypy: ignore-errors
# The kernel language looks like Python, but its values have no Python types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from secateur.kernels.sparse24.gpu.mma import (
    axis,
    mma,
    scale_pair,
    unit_vectors,
    unpack_int4,
    unpack_int8,
)

E_PAD = gl.constexpr(0x44444444)  # index word past the last column: positions 0 and 1 of each group


def layout(p: int, mt: int, nt: int, warps: int) -> gl.DistributedLinearLayout:
    """Where the tensors [P, MT, NT, WARPS, 32, 4] lie: registers, lanes, warps."""
    registers = (
        unit_vectors(6, 5, 4)
        + unit_vectors(6, 2, nt)
        + unit_vectors(6, 1, mt)
        + unit_vectors(6, 0, p)
    )
    return gl.DistributedLinearLayout(
        registers, unit_vectors(6, 4, 32), unit_vectors(6, 3, warps), [], [p, mt, nt, warps, 32, 4]
    )


@gluon.jit
def load(pointers, live, OTHER: gl.constexpr, MASKED: gl.constexpr):
    """The words, or OTHER where they are not live; without a mask all are."""
    if MASKED:
        return gl.load(pointers, mask=live, other=OTHER)
    else:
        return gl.load(pointers)


@gluon.jit
def fetch(vp, ep, sp, xp, live, KIND: gl.constexpr, MASKED: gl.constexpr):
    """One step's operands: packed values, index words, scales, x of each k tile (two, int4:
    four)."""
    w0 = load(vp, live, 0, MASKED)
    e0 = load(ep, live, E_PAD, MASKED)
    x0 = load(xp, live, 0, MASKED)
    x1 = load(xp + 16, live, 0, MASKED)
    if KIND == "float":
        return w0, load(vp + 128, live, 0, MASKED), e0, x0, x1
    elif KIND == "int8":
        return w0, e0, x0, x1
    else:
        e1 = load(ep + 32, live, E_PAD, MASKED)
        x2 = load(xp + 32, live, 0, MASKED)
        x3 = load(xp + 48, live, 0, MASKED)
        return w0, e0, e1, load(sp, live, 0, MASKED), x0, x1, x2, x3


@gluon.jit
def multiply(acc, step, reg, KIND: gl.constexpr, F16: gl.constexpr):
    """acc + this step's product."""
    if KIND == "float":
        a0, a1, e, x0, x1 = step
        return mma(a1, x1, mma(a0, x0, acc, e, False, F16), e, True, F16)
    elif KIND == "int8":
        w, e, x0, x1 = step
        a0, a1 = unpack_int8(w, F16)
        return mma(a1, x1, mma(a0, x0, acc, e, False, F16), e, True, F16)
    else:
        w, e0, e1, s, x0, x1, x2, x3 = step
        a0, a1, a2, a3 = unpack_int4(w, F16)
        part = mma(a1, x1, mma(a0, x0, gl.zeros_like(acc), e0, False, F16), e0, True, F16)
        part = mma(a3, x3, mma(a2, x2, part, e1, False, F16), e1, True, F16)
        return acc + part * scale_pair(s, reg)


@gluon.jit
def decode(
    x_ptr,  # int32 [B, K/2], pairs of 16-bit floats
    v_ptr,  # int32 [tiles, blocks, V words]
    e_ptr,  # int32 [tiles, K/64, 32]
    s_ptr,  # float32 [N] (int8), int32 [tiles, blocks, 8] (int4), not read (float)
    o_ptr,  # [splits, B, N]
    B,
    N,
    K,
    KIND: gl.constexpr,
    F16: gl.constexpr,
    P: gl.constexpr,
    MT: gl.constexpr,
    NT: gl.constexpr,
    WARPS: gl.constexpr,
    L: gl.constexpr,
):
    """A block of 16 MT outputs and 8 NT batch rows over one share of the columns."""
    BLOCK: gl.constexpr = 128 if KIND == "int4" else 64  # columns
    V: gl.constexpr = 256 if KIND == "float" else 128  # words of values in a block of 16 rows
    E: gl.constexpr = BLOCK // 2  # words of indices
    p, mt, nt, warp = axis(P, 0, 6, L), axis(MT, 1, 6, L), axis(NT, 2, 6, L), axis(WARPS, 3, 6, L)
    lane, reg = axis(32, 4, 6, L), axis(4, 5, 6, L)
    blocks = K // BLOCK
    stride = gl.num_programs(1) * (WARPS * P)
    block = (gl.program_id(1) * WARPS + warp) * P + p
    # Row tiles and batch rows past the end read the last one again: what they give is not stored.
    tile = gl.minimum(gl.program_id(0) * MT + mt, (N + 15) // 16 - 1)
    col = gl.minimum(nt * 8 + lane // 4, B - 1)
    at = tile.to(gl.int64) * blocks + block
    vp = v_ptr + (at * V + lane * 4 + reg)
    ep = e_ptr + (at * E + lane)
    sp = s_ptr + (at * 8 + lane // 4)
    xp = x_ptr + (col.to(gl.int64) * (K // 2) + block * (BLOCK // 2) + lane % 4 + reg * 4)
    acc = gl.zeros([P, MT, NT, WARPS, 32, 4], gl.float32, L)
    # Only the last of the steps may reach past the last block; where the first is the last, one
    # more of zeros follows.
    step = fetch(vp, ep, sp, xp, block < blocks, KIND, True)
    for _ in range(stride, blocks - stride, stride):
        vp += stride * V
        ep += stride * E
        sp += stride * 8
        xp += stride * (BLOCK // 2)
        block += stride
        following = fetch(vp, ep, sp, xp, True, KIND, False)
        acc = multiply(acc, step, reg, KIND, F16)
        step = following
    acc = multiply(acc, step, reg, KIND, F16)
    live = block + stride < blocks
    vp += stride * V
    ep += stride * E
    sp += stride * 8
    xp += stride * (BLOCK // 2)
    acc = multiply(acc, fetch(vp, ep, sp, xp, live, KIND, True), reg, KIND, F16)
    total = gl.sum(
        gl.sum(acc, 3), 0
    )  # over warps, through shared memory, and over P, in registers: [MT, NT, 32, 4]
    LT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, L))
    mt, nt, lane, reg = (
        axis(MT, 0, 4, LT),
        axis(NT, 1, 4, LT),
        axis(32, 2, 4, LT),
        axis(4, 3, 4, LT),
    )
    row = (gl.program_id(0) * MT + mt) * 16 + lane // 4 + (reg // 2) * 8
    col = nt * 8 + (lane % 4) * 2 + reg % 2
    if KIND == "int8":
        total = total * gl.load(s_ptr + row, mask=row < N, other=0)
    out = (gl.program_id(1) * B + col).to(gl.int64) * N + row
    gl.store(o_ptr + out, total.to(o_ptr.dtype.element_ty), mask=(col < B) & (row < N))
