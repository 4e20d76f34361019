"""Product on Hopper's warpgroup instruction: y[B, N] = x[B, K] @ W[N, K]^T, W 2:4 in fragment
order, bf16 or fp16.
EXPERIMENTAL: used only where the self-test on the device at hand has passed (api.py).

Formula: as in decode.py.  One program owns the 64 * WG rows from pid0 * 64 * WG and the 128 batch
rows from pid1 * 128, over all of K; each of WG warpgroups multiplies its 64 rows by
wgmma.mma_async.sp m64n128k32, weights and index words in registers (those of mma.sp, one step
ahead), x^T in shared memory: a ring of STAGES stages [128 rows, 64 columns] filled by cp.async,
128-byte swizzle.

The instruction takes x through a descriptor that Gluon does not offer to inline assembly.  It is
built here: the address is that of the symbol `global_smem`, where Triton puts shared memory, plus
the stage's offset; so the ring must be the first thing allocated (the ahead-of-time suite asserts
it), and the fields are those that Triton itself writes for such a tile.  Source: PTX ISA,
"Asynchronous warpgroup level matrix instructions: matrix descriptor format", and
wgmma.mma_async.sp. Tensors are [4 * WG warps (16 rows each), 16 tiles of 8 batch rows, 32 lanes, 4
registers].
"""

# mypy: ignore-errors
# The kernel language looks like Python, but its values have no Python types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy as cp
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from secateur.kernels.sparse24.gpu.mma import axis, unit_vectors

BATCH = 128
REGISTERS = BATCH // 2  # accumulators of a lane: 64 x 128 over 128 lanes
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name in Triton 3.8, and in 3.6


def wgmma_text(element: str) -> str:
    """acc += a0 @ x[:, :32]^T + a1 @ x[:, 32:]^T.

    Operands: 64 accumulators out, the same in, then 64 times each of a0, a1, e, the address.
    Descriptor: address / 16 in bits 0-13, 64 in bits 32-45 (the next eight rows lie 64 * 16 bytes
        on), 1 in bits 62-63 (128-byte swizzle).
    """

    def operands(block: int, n: int) -> str:
        """The registers of one operand, by number."""
        return "{" + ", ".join(f"${block * REGISTERS + i}" for i in range(n)) + "}"

    lines = [
        "{ .reg .b64 q0, q1; .reg .b32 p; .reg .pred yes; setp.eq.u32 yes, 1, 1;",
        f"shr.u32 p, ${5 * REGISTERS}, 4; and.b32 p, p, 0x3FFF; mov.b64 q0, {{p, 0x40000040}}; "
        "add.s64 q1, q0, 4;",
        "wgmma.fence.sync.aligned;",
    ]
    for selector, (a, q) in enumerate(((2, "q0"), (3, "q1"))):
        name = f"wgmma.mma_async.sp.sync.aligned.m64n{BATCH}k32.f32.{element}.{element}"
        out = operands(0, REGISTERS)
        lines.append(
            f"{name} {out}, {operands(a, 4)}, {q}, ${4 * REGISTERS}, {selector}, yes, 1, 1, 0;"
        )
    return "\n".join(
        [*lines, "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }"]
    )


BF16 = gl.constexpr(wgmma_text("bf16"))
F16_TEXT = gl.constexpr(wgmma_text("f16"))
TIED = ["=f"] * REGISTERS + [str(i) for i in range(REGISTERS)]
OPERANDS = gl.constexpr(",".join(TIED + ["r"] * (4 * REGISTERS)))
PACK = gl.constexpr(REGISTERS)
ADDRESS = gl.constexpr("mov.u32 $0, global_smem; add.u32 $0, $0, $1;")


def layout(wg: int) -> gl.DistributedLinearLayout:
    """Where the tensors [4 * WG, 16, 32, 4] lie."""
    registers = unit_vectors(4, 3, 4) + unit_vectors(4, 1, BATCH // 8)
    return gl.DistributedLinearLayout(
        registers,
        unit_vectors(4, 2, 32),
        unit_vectors(4, 0, 4 * wg),
        [],
        [4 * wg, BATCH // 8, 32, 4],
    )


@gluon.jit
def wgmma(
    x_ptr,  # bf16 or fp16 [B, K]
    v_ptr,  # int32 [tiles, K/32, 128]
    e_ptr,  # int32 [tiles, K/64, 32]
    o_ptr,  # [B, N]
    B,
    N,
    K,
    F16: gl.constexpr,
    WG: gl.constexpr,
    STAGES: gl.constexpr,
    L: gl.constexpr,
):
    """A block of 64 WG outputs and 128 batch rows, x staged through shared memory."""
    WARPS: gl.constexpr = 4 * WG
    ROWS: gl.constexpr = 128
    TEXT: gl.constexpr = F16_TEXT if F16 else BF16
    element: gl.constexpr = x_ptr.dtype.element_ty
    sx = gl.allocate_shared_memory(element, [STAGES, ROWS, 64], gl.NVMMASharedLayout(128, 16, 2))
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    xr = gl.arange(0, ROWS, gl.SliceLayout(1, COPY)) + gl.program_id(1) * ROWS
    xc = gl.arange(0, 64, gl.SliceLayout(0, COPY))
    xp = x_ptr + (gl.where(xr < B, xr, 0).to(gl.int64)[:, None] * K + xc[None, :])
    in_batch = (xr < B)[:, None] & (xc >= 0)[None, :]
    steps = K // 64
    warp, nt = axis(WARPS, 0, 4, L), axis(ROWS // 8, 1, 4, L)
    lane, reg = axis(32, 2, 4, L), axis(4, 3, 4, L)
    tile = gl.program_id(0) * WARPS + warp
    # Row tiles past the end read the last one again; their rows are not stored.
    at = gl.minimum(tile, (N + 15) // 16 - 1).to(gl.int64) * steps
    vp = v_ptr + (at * 256 + lane * 4 + reg)
    ep = e_ptr + (at * 32 + lane + reg * 0)
    acc = gl.zeros([WARPS, ROWS // 8, 32, 4], gl.float32, L)
    for i in gl.static_range(STAGES - 1):
        cp.async_copy_global_to_shared(sx.index(i), xp + i * 64, mask=in_batch & (i < steps))
        cp.commit_group()
    a0, a1, e = gl.load(vp), gl.load(vp + 128), gl.load(ep)
    for k in range(steps):
        cp.wait_group(STAGES - 2)
        # what this thread copied is made visible to the instruction, then all threads meet
        fence_async_shared()
        barrier()
        vp += 256
        ep += 32
        more = k + 1 < steps
        b0, b1 = gl.load(vp, mask=more, other=0), gl.load(vp + 128, mask=more, other=0)
        f = gl.load(ep, mask=more, other=0x44444444)
        offset = (k % STAGES) * (ROWS * 64 * 2) + lane * 0 + reg * 0 + warp * 0
        address = gl.inline_asm_elementwise(
            ADDRESS, "=r,r", [offset], dtype=gl.int32, is_pure=True, pack=1
        )
        operands = [acc, a0, a1, e, address]
        acc = gl.inline_asm_elementwise(
            TEXT, OPERANDS, operands, dtype=gl.float32, is_pure=False, pack=PACK
        )
        ahead = k + STAGES - 1
        cp.async_copy_global_to_shared(
            sx.index(ahead % STAGES), xp + ahead * 64, mask=in_batch & (ahead < steps)
        )
        cp.commit_group()
        a0, a1, e = b0, b1, f
    cp.wait_group(0)
    row = tile * 16 + lane // 4 + (reg // 2) * 8
    col = gl.program_id(1) * ROWS + nt * 8 + (lane % 4) * 2 + reg % 2
    gl.store(
        o_ptr + (col.to(gl.int64) * N + row),
        acc.to(o_ptr.dtype.element_ty),
        mask=(col < B) & (row < N),
    )
