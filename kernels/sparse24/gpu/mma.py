"""The sparse tensor-core instruction and the unpacking of its operands, as inline assembly over
Gluon tensors [..., 32 lanes, 4 registers].

`mma`: d[16, 8] = a[16, 32] @ b[32, 8] + c[16, 8] by one warp; a is 2:4 (two kept values of each
four, plus index words), fp32 accumulation. `unpack_int8`, `unpack_int4`: packed words to 16-bit
operands, exact: int8 through the float 2^23 + (q + 128), int4 through the 16-bit float whose last
four bits are q + 8 (bf16 128 + n, fp16 1024 + n), each less its offset. Sources: PTX ISA, mma.sp;
int4: Kim et al. 2022, arXiv:2211.10017, section 3.3 (the fp16 form).
"""

# mypy: ignore-errors
# The kernel language looks like Python, but its values have no Python types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def mma_text(element: str, selector: int) -> str:
    """`element`: bf16 or f16.  "ordered_metadata" promises i0 < i1; newer chips are slow without
    it."""
    a, b, c = ("{" + ", ".join(f"${i}" for i in range(at, at + 4)) + "}" for at in (4, 8, 12))
    kind = f"m16n8k32.row.col.f32.{element}.{element}.f32"
    return (
        f"mma.sp::ordered_metadata.sync.aligned.{kind} {{$0, $1, $2, $3}}, {a}, {b}, {c}, $16, "
        f"{selector:#x};"
    )


def int8_text(element: str) -> str:
    """Four words of bytes q + 128 -> two fragments: word 2 * tile + p holds registers 2p and 2p +
    1."""
    lines = ["{ .reg .b32 p, q; .reg .f32 f, h;"]
    for out in range(8):
        word, low = 8 + out // 2, 2 * (out % 2)
        lines += [
            f"prmt.b32 p, ${word}, 0x4B000000, 0x744{low}; prmt.b32 q, ${word}, 0x4B000000, "
            f"0x744{low + 1};",
            "mov.b32 f, p; mov.b32 h, q; add.f32 f, f, 0fCB000080; add.f32 h, h, 0fCB000080;",
            f"cvt.rn.{element}x2.f32 ${out}, h, f;",
        ]
    return "\n".join([*lines, "}"])


def int4_text(element: str) -> str:
    """Four words of nibbles q + 8 -> four fragments: register r of word `tile` is its nibbles r and
    4 + r."""
    one, base, offset = {
        "bf16": (0x3F803F80, 0x43004300, 0xC308C308),
        "f16": (0x3C003C00, 0x64006400, 0xE408E408),
    }[element]
    lines = [f"{{ .reg .b32 p, one, off; mov.b32 one, {one:#010x}; mov.b32 off, {offset:#010x};"]
    for out in range(16):
        word, r = f"${16 + out // 4}", out % 4
        lines.append(f"shr.u32 p, {word}, {4 * r};" if r else f"mov.b32 p, {word};")
        lines.append(
            f"lop3.b32 p, p, 0x000f000f, {base:#010x}, 0xEA; fma.rn.{element}x2 ${out}, p, "
            "one, off;"
        )
    return "\n".join([*lines, "}"])


BF16_EVEN, BF16_ODD = gl.constexpr(mma_text("bf16", 0)), gl.constexpr(mma_text("bf16", 1))
F16_EVEN, F16_ODD = gl.constexpr(mma_text("f16", 0)), gl.constexpr(mma_text("f16", 1))
BF16_INT8, F16_INT8 = gl.constexpr(int8_text("bf16")), gl.constexpr(int8_text("f16"))
BF16_INT4, F16_INT4 = gl.constexpr(int4_text("bf16")), gl.constexpr(int4_text("f16"))
MMA_OPERANDS = gl.constexpr(",".join(["=f"] * 4 + ["r"] * 8 + ["f"] * 4 + ["r"] * 4))
INT8_OPERANDS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 4))
INT4_OPERANDS = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 4))


@gluon.jit
def mma(a, b, c, e, ODD: gl.constexpr, F16: gl.constexpr):
    """c + a @ b on the even (selector 0) or odd (selector 1) k tile of the index words e."""
    EVEN_TEXT: gl.constexpr = F16_EVEN if F16 else BF16_EVEN
    ODD_TEXT: gl.constexpr = F16_ODD if F16 else BF16_ODD
    TEXT: gl.constexpr = ODD_TEXT if ODD else EVEN_TEXT
    return gl.inline_asm_elementwise(
        TEXT, MMA_OPERANDS, [a, b, c, e], dtype=gl.float32, is_pure=True, pack=4
    )


@gluon.jit
def unpack_int8(words, F16: gl.constexpr):
    """Two A operands (k tiles 0, 1 of a block of 64) of a block's packed words."""
    TEXT: gl.constexpr = F16_INT8 if F16 else BF16_INT8
    return gl.inline_asm_elementwise(
        TEXT, INT8_OPERANDS, [words], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
    )


@gluon.jit
def unpack_int4(words, F16: gl.constexpr):
    """Four A operands (k tiles 0..3 of a block of 128) of a block's packed words."""
    TEXT: gl.constexpr = F16_INT4 if F16 else BF16_INT4
    return gl.inline_asm_elementwise(
        TEXT,
        INT4_OPERANDS,
        [words],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def scale_pair(word, reg):
    """fp32 scale of accumulator register `reg` out of two bf16: rows g (low half; registers 0, 1)
    and g + 8."""
    return gl.where(reg < 2, word << 16, word & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def axis(SIZE: gl.constexpr, D: gl.constexpr, RANK: gl.constexpr, L: gl.constexpr):
    """0 .. SIZE - 1 along axis D of a tensor of that rank and layout L, one along its other
    axes."""
    # What is left of the layout when the other axes are sliced away, the last one first.
    S5: gl.constexpr = gl.SliceLayout(5, L) if D != 5 and RANK > 5 else L
    S4: gl.constexpr = gl.SliceLayout(4, S5) if D != 4 and RANK > 4 else S5
    S3: gl.constexpr = gl.SliceLayout(3, S4) if D != 3 else S4
    S2: gl.constexpr = gl.SliceLayout(2, S3) if D != 2 else S3
    S1: gl.constexpr = gl.SliceLayout(1, S2) if D != 1 else S2
    S0: gl.constexpr = gl.SliceLayout(0, S1) if D != 0 else S1
    v = gl.arange(0, SIZE, S0)
    for d in gl.static_range(RANK):
        if d != D:
            v = gl.expand_dims(v, d)
    return v


def log2(n: int) -> int:
    """Exponent of a power of two.

    Raises:
        ValueError: n is none.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"{n} is not a power of two: tile sizes are")
    return n.bit_length() - 1


def unit_vectors(rank: int, axis: int, n: int, start: int = 1) -> list[list[int]]:
    """Bases of a linear layout that walk an axis of n: start, 2 * start, ... n / 2 * start along
    `axis`."""
    return [[start << i if d == axis else 0 for d in range(rank)] for i in range(log2(n))]
