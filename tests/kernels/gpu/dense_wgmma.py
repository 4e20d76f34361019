"""A dense warpgroup product by Gluon's own operation on the tile of x that our sparse one reads.

It shows the descriptor that Triton writes for a K-major tile [128, 64] of 16-bit floats, 128-byte
swizzle.
"""

from __future__ import annotations

import re

from triton.backends.compiler import GPUTarget
from triton.compiler import compile as triton_compile
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.ampere import async_copy as cp
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma


@gluon.jit
def product(x_ptr, w_ptr, o_ptr, L: gl.constexpr):
    sx = gl.allocate_shared_memory(gl.bfloat16, [2, 128, 64], gl.NVMMASharedLayout(128, 16, 2))
    sw = gl.allocate_shared_memory(gl.bfloat16, [64, 64], gl.NVMMASharedLayout(128, 16, 2))
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 128, gl.SliceLayout(1, COPY))[:, None]
    small = gl.arange(0, 64, gl.SliceLayout(1, COPY))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, COPY))[None, :]
    cp.async_copy_global_to_shared(sx.index(1), x_ptr + row * 64 + column)
    cp.async_copy_global_to_shared(sw, w_ptr + small * 64 + column)
    cp.commit_group()
    cp.wait_group(0)
    fence_async_shared()
    acc = warpgroup_mma(sw, sx.index(1).permute((1, 0)), gl.zeros([64, 128], gl.float32, L))
    rows = gl.arange(0, 64, gl.SliceLayout(1, L))[:, None]
    columns = gl.arange(0, 128, gl.SliceLayout(0, L))[None, :]
    gl.store(o_ptr + rows * 128 + columns, acc)


def descriptor_words() -> list[int]:
    """64-bit constants that Triton ors into or adds to addresses for this product."""
    signature = {"x_ptr": "*bf16", "w_ptr": "*bf16", "o_ptr": "*fp32", "L": "constexpr"}
    layout = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = GluonASTSource(
        fn=product, signature=signature, constexprs={"L": layout}, attrs=aligned
    )
    ptx = triton_compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm[
        "ptx"
    ]
    found = re.findall(r"(?:or|add)\.[bs]64\s+%rd\d+, %rd\d+, (-?\d+);", ptx)
    return sorted({int(value) & (2**64 - 1) for value in found})
