"""Product for larger batches: y[B, N] = x[B, K] @ W[N, K]^T, W 2:4 in fragment order
(fragments.py), any B; bound by the tensor cores.

Formula: as in decode.py.  One program owns the 16 * MT * WM rows from pid0 * 16 * MT * WM, the 8 *
NT * WN batch rows from pid1 * 8 * NT * WN, and the k stages [pid2 * steps, pid2 * steps + steps):
with splits = num_programs(2) > 1 it writes plane pid2 of the output [splits, B, N]. WM x WN warps
share the tile.  A stage is KU blocks of k; a ring of STAGES stages in shared memory is filled by
cp.async, STAGES - 1 ahead: values and index words as the fragments they are (16-byte reads without
conflicts), x in rows, swizzled, read back by ldmatrix. Tensors are [MT, WM, NT, WN, 32 lanes, 4
registers].  Every conversion of layouts is asserted to move nothing.
"""

# mypy: ignore-errors
# The kernel language looks like Python, but its values have no Python types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy as cp

from secateur.kernels.sparse24.gpu.mma import (
    axis,
    log2,
    mma,
    scale_pair,
    unit_vectors,
    unpack_int4,
    unpack_int8,
)


def layouts(mt: int, nt: int, wm: int, wn: int) -> dict[str, gl.DistributedLinearLayout]:
    """Layouts by the name of the kernel's argument.

    L: accumulators [MT, WM, NT, WN, 32, 4]; LA, LE: a k tile's values [tiles, 128] and index words
    [tiles, 32]; LX: its x [batch rows, 16].
    """
    tiles, rows = mt * wm, 8 * nt * wn
    warps = unit_vectors(6, 1, wm) + unit_vectors(6, 3, wn)
    along_m = unit_vectors(2, 0, mt, start=wm)
    warps_m = unit_vectors(2, 0, wm) + [[0, 0]] * log2(wn)
    x_registers = [[0, 4], [0, 8], *unit_vectors(2, 0, nt, start=8 * wn)]
    x_lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    linear = gl.DistributedLinearLayout
    return {
        "L": linear(
            unit_vectors(6, 5, 4) + unit_vectors(6, 2, nt) + unit_vectors(6, 0, mt),
            unit_vectors(6, 4, 32),
            warps,
            [],
            [mt, wm, nt, wn, 32, 4],
        ),
        "LA": linear(
            [[0, 1], [0, 2], *along_m], unit_vectors(2, 1, 32, start=4), warps_m, [], [tiles, 128]
        ),
        "LE": linear(along_m, unit_vectors(2, 1, 32), warps_m, [], [tiles, 32]),
        "LX": linear(
            x_registers,
            x_lanes,
            [[0, 0]] * log2(wm) + unit_vectors(2, 0, wn, start=8),
            [],
            [rows, 16],
        ),
    }


@gluon.jit
def load_values(
    shared,
    TILE: gl.constexpr,
    MT: gl.constexpr,
    WM: gl.constexpr,
    LA: gl.constexpr,
    L: gl.constexpr,
):
    """Fragments [MT, WM, 1, 1, 32, 4] of row TILE of the stage."""
    a = gl.reshape(shared.slice(TILE * (MT * WM), MT * WM, 0).load(LA), [MT, WM, 32, 4])
    a = gl.convert_layout(a, gl.SliceLayout(2, gl.SliceLayout(3, L)), assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(a, 2), 3)


@gluon.jit
def load_indices(
    shared,
    WORD: gl.constexpr,
    MT: gl.constexpr,
    WM: gl.constexpr,
    LE: gl.constexpr,
    L: gl.constexpr,
):
    """Index words [MT, WM, 1, 1, 32, 1] of word WORD (64 columns) of the stage."""
    e = gl.reshape(shared.slice(WORD * (MT * WM), MT * WM, 0).load(LE), [MT, WM, 32])
    e = gl.convert_layout(
        e, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(5, L))), assert_trivial=True
    )
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(e, 2), 3), 5)


@gluon.jit
def load_x(
    shared,
    TILE: gl.constexpr,
    NT: gl.constexpr,
    WN: gl.constexpr,
    LX: gl.constexpr,
    L: gl.constexpr,
):
    """Fragments [1, 1, NT, WN, 32, 4] of k tile TILE of the stage."""
    x = gl.reshape(
        shared.slice(TILE * 16, 16, 1).load(LX), [NT, WN, 8, 4, 4]
    )  # rows of eight, register, lane in four
    x = gl.reshape(gl.permute(x, [0, 1, 2, 4, 3]), [NT, WN, 32, 4])
    x = gl.convert_layout(x, gl.SliceLayout(0, gl.SliceLayout(1, L)), assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(x, 0), 1)


@gluon.jit
def copy_stage(
    shared,
    sources,
    at,
    in_batch,
    stage,
    wanted,
    blocks,
    K,
    KU: gl.constexpr,
    R: gl.constexpr,
    H: gl.constexpr,
):
    """Start the copies of a stage into its place of the ring, as one group; nothing moves where it
    is not wanted.

    Blocks past the end read the last one again, against zeros of x: a padded index word would not
    be valid.
    """
    sa, se, sx = shared
    ap, ep, xp = sources
    a_at, e_at, x_at = at
    words: gl.constexpr = KU * H * 32  # of x in a row
    a_row = gl.minimum(stage * (KU * R) + a_at, blocks * R - 1)
    e_row = gl.minimum(stage * (KU * H) + e_at, blocks * H - 1)
    cp.async_copy_global_to_shared(
        sa, ap + (a_row * 128)[:, None], mask=(a_at >= 0)[:, None] & wanted
    )
    cp.async_copy_global_to_shared(
        se, ep + (e_row * 32)[:, None], mask=(e_at >= 0)[:, None] & wanted
    )
    live = in_batch & (stage * words + x_at < K // 2)[None, :]
    cp.async_copy_global_to_shared(sx, xp + stage * words, mask=live & wanted)
    cp.commit_group()


@gluon.jit
def gemm(
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
    MT: gl.constexpr,
    NT: gl.constexpr,
    WM: gl.constexpr,
    WN: gl.constexpr,
    KU: gl.constexpr,
    STAGES: gl.constexpr,
    L: gl.constexpr,
    LA: gl.constexpr,
    LE: gl.constexpr,
    LX: gl.constexpr,
):
    """A block of 16 MT WM outputs and 8 NT WN batch rows, x staged through shared memory."""
    BLOCK: gl.constexpr = 128 if KIND == "int4" else 64  # columns
    R: gl.constexpr = (
        2 if KIND == "float" else 1
    )  # rows of 128 words of values in a block of 16 rows
    H: gl.constexpr = BLOCK // 64  # index words of a lane in a block
    X: gl.constexpr = KU * BLOCK // 2  # words of x in a row of a stage
    WARPS: gl.constexpr = WM * WN
    gl.static_assert(KU == 1 or KIND != "int4", "int4 takes one block a stage")
    TILES: gl.constexpr = MT * WM
    ROWS: gl.constexpr = 8 * NT * WN
    blocks = K // BLOCK
    stages = (blocks + KU - 1) // KU
    steps = (stages + gl.num_programs(2) - 1) // gl.num_programs(2)
    first = gl.program_id(2) * steps
    tile0 = gl.program_id(0) * TILES
    last_tile = (N + 15) // 16 - 1
    # Copies: 16 bytes a thread.  A row of a stage is (place in the stage) * TILES + tile; row tiles
    # past the end
    # read the last one again: their rows are not stored.
    A_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    E_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [128 // X, X // 4], [WARPS, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    sa = gl.allocate_shared_memory(gl.int32, [STAGES, TILES * KU * R, 128], PLAIN)
    se = gl.allocate_shared_memory(gl.int32, [STAGES, TILES * KU * H, 32], PLAIN)
    sx = gl.allocate_shared_memory(
        gl.int32, [STAGES, ROWS, X], gl.SwizzledSharedLayout(4, 1, X // 4, [1, 0])
    )
    ar = gl.arange(0, TILES * KU * R, gl.SliceLayout(1, A_COPY))
    er = gl.arange(0, TILES * KU * H, gl.SliceLayout(1, E_COPY))
    xr = gl.arange(0, ROWS, gl.SliceLayout(1, X_COPY)) + gl.program_id(1) * ROWS
    ac = gl.arange(0, 128, gl.SliceLayout(0, A_COPY))
    ec = gl.arange(0, 32, gl.SliceLayout(0, E_COPY))
    xc = gl.arange(0, X, gl.SliceLayout(0, X_COPY))
    a_tile = gl.minimum(tile0 + ar % TILES, last_tile).to(gl.int64)
    e_tile = gl.minimum(tile0 + er % TILES, last_tile).to(gl.int64)
    ap = v_ptr + (a_tile[:, None] * (blocks * R * 128) + ac[None, :])
    ep = e_ptr + (e_tile[:, None] * (blocks * H * 32) + ec[None, :])
    xp = x_ptr + (gl.where(xr < B, xr, 0).to(gl.int64)[:, None] * (K // 2) + xc[None, :])
    in_batch = (xr < B)[:, None]
    mt, wm, nt, wn = axis(MT, 0, 6, L), axis(WM, 1, 6, L), axis(NT, 2, 6, L), axis(WN, 3, 6, L)
    lane, reg = axis(32, 4, 6, L), axis(4, 5, 6, L)
    s_tile = gl.minimum(tile0 + mt * WM + wm, last_tile).to(gl.int64)
    sp = s_ptr + (s_tile * (blocks * 8) + lane // 4)
    acc = gl.zeros([MT, WM, NT, WN, 32, 4], gl.float32, L)
    sources, at = (ap, ep, xp), (ar // TILES, er // TILES, xc)
    for i in gl.static_range(STAGES - 1):
        wanted = (i < steps) & (first + i < stages)
        places = (sa.index(i), se.index(i), sx.index(i))
        copy_stage(places, sources, at, in_batch, first + i, wanted, blocks, K, KU, R, H)
    for k in range(gl.minimum(steps, stages - first)):
        if KIND == "int4":  # one block a stage: its scales go straight to registers
            scale = gl.load(sp + (first + k) * 8)
        cp.wait_group(STAGES - 2)
        a_now, e_now, x_now = sa.index(k % STAGES), se.index(k % STAGES), sx.index(k % STAGES)
        ahead = k + STAGES - 1
        wanted = (ahead < steps) & (first + ahead < stages)
        places = (sa.index(ahead % STAGES), se.index(ahead % STAGES), sx.index(ahead % STAGES))
        copy_stage(places, sources, at, in_batch, first + ahead, wanted, blocks, K, KU, R, H)
        for u in gl.static_range(KU):
            if KIND == "float":
                e = load_indices(e_now, u, MT, WM, LE, L)
                a0, a1 = (
                    load_values(a_now, 2 * u, MT, WM, LA, L),
                    load_values(a_now, 2 * u + 1, MT, WM, LA, L),
                )
                acc = mma(a0, load_x(x_now, 2 * u, NT, WN, LX, L), acc, e, False, F16)
                acc = mma(a1, load_x(x_now, 2 * u + 1, NT, WN, LX, L), acc, e, True, F16)
            elif KIND == "int8":
                e = load_indices(e_now, u, MT, WM, LE, L)
                a0, a1 = unpack_int8(load_values(a_now, u, MT, WM, LA, L), F16)
                acc = mma(a0, load_x(x_now, 2 * u, NT, WN, LX, L), acc, e, False, F16)
                acc = mma(a1, load_x(x_now, 2 * u + 1, NT, WN, LX, L), acc, e, True, F16)
            else:
                e0, e1 = (
                    load_indices(e_now, 0, MT, WM, LE, L),
                    load_indices(e_now, 1, MT, WM, LE, L),
                )
                a0, a1, a2, a3 = unpack_int4(load_values(a_now, 0, MT, WM, LA, L), F16)
                part = mma(a0, load_x(x_now, 0, NT, WN, LX, L), gl.zeros_like(acc), e0, False, F16)
                part = mma(a1, load_x(x_now, 1, NT, WN, LX, L), part, e0, True, F16)
                part = mma(a2, load_x(x_now, 2, NT, WN, LX, L), part, e1, False, F16)
                part = mma(a3, load_x(x_now, 3, NT, WN, LX, L), part, e1, True, F16)
                acc += part * scale_pair(scale, reg)
    cp.wait_group(0)
    row = (tile0 + mt * WM + wm) * 16 + lane // 4 + (reg // 2) * 8
    col = gl.program_id(1) * ROWS + (nt * WN + wn) * 8 + (lane % 4) * 2 + reg % 2
    if KIND == "int8":
        acc = acc * gl.load(s_ptr + row, mask=row < N, other=0)
    out = (gl.program_id(2).to(gl.int64) * B + col) * N + row
    gl.store(o_ptr + out, acc.to(o_ptr.dtype.element_ty), mask=(col < B) & (row < N))
