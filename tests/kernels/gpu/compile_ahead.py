"""Compiles every variant of the GPU kernels for every chip, without a GPU, and writes what the
machine code is as JSON.

Run by test_ahead_of_time.py, once a Triton version:  python compile_ahead.py OUT.json [--workers 2]
[--only TEXT]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dense_wgmma import descriptor_words
from launch_ahead import launched

from secateur.kernels.sparse24.gpu import configs

HALVES = {"bf16": False, "fp16": True}
REST = {"B": "i32", "N": "i32", "K": "i32"}


@dataclass(frozen=True)
class Variant:
    """One kernel for one chip: arguments are types (text) or constants; `sparse`: the expected
    instruction."""

    name: str
    kernel: str
    capability: int
    arguments: dict[str, Any]
    warps: int
    registers: int
    sparse: str = ""
    divisible: tuple[str, ...] = ("N", "K")
    shared: int | None = None  # exact bytes
    options: dict[str, Any] = field(default_factory=dict)


def scale_type(kind: str) -> str:
    return "*fp32" if kind == "int8" else "*i32"


def pointers(kind: str, out: str) -> dict[str, Any]:
    return {
        "x_ptr": "*i32",
        "v_ptr": "*i32",
        "e_ptr": "*i32",
        "s_ptr": scale_type(kind),
        "o_ptr": out,
        **REST,
    }


def outputs(first: bool, half: str) -> list[tuple[str, tuple[str, ...]]]:
    """Types of the output and the sizes that 16 divides: for the first configuration also fp32
    planes and any N."""
    return [(f"*{half}", ("N", "K")), *([("*fp32", ("K",))] if first and half == "bf16" else [])]


def decode_variants(capability: int) -> list[Variant]:
    found = []
    for kind, table in configs.DECODE.items():
        for at, c in enumerate(table):
            shape = {"P": c.p, "MT": c.mt, "NT": c.nt, "WARPS": c.warps}
            for half, f16 in HALVES.items():
                for out, divisible in outputs(at == 0, half):
                    name = f"decode {kind} {half} P{c.p} MT{c.mt} NT{c.nt} out{out} sm_{capability}"
                    arguments = {**pointers(kind, out), "KIND": kind, "F16": f16, **shape}
                    found.append(
                        Variant(
                            name,
                            "decode",
                            capability,
                            arguments,
                            c.warps,
                            c.registers,
                            "HMMA.SP",
                            divisible,
                        )
                    )
        # What the just-in-time compiler makes of a batch of one: a compile-time value.
        one = {**pointers(kind, "*bf16"), "B": 1, "KIND": kind, "F16": False}
        c = table[0]
        arguments = {**one, "P": c.p, "MT": c.mt, "NT": c.nt, "WARPS": c.warps}
        found.append(
            Variant(
                f"decode {kind} batch 1 sm_{capability}",
                "decode",
                capability,
                arguments,
                c.warps,
                c.registers,
                "HMMA.SP",
            )
        )
    return found


def gemm_variants(capability: int) -> list[Variant]:
    found = []
    for kind, table in configs.GEMM.items():
        for at, c in enumerate(table):
            shape = {"MT": c.mt, "NT": c.nt, "WM": c.wm, "WN": c.wn, "KU": c.ku, "STAGES": c.stages}
            for half, f16 in HALVES.items():
                for out, divisible in outputs(at == 0, half):
                    name = (
                        f"gemm {kind} {half} {c.rows}x{c.batch} KU{c.ku} out{out} sm_{capability}"
                    )
                    arguments = {**pointers(kind, out), "KIND": kind, "F16": f16, **shape}
                    found.append(
                        Variant(
                            name,
                            "gemm",
                            capability,
                            arguments,
                            c.wm * c.wn,
                            c.registers,
                            "HMMA.SP",
                            divisible,
                        )
                    )
    return found


def wgmma_variants(capability: int) -> list[Variant]:
    if capability != 90:
        return []
    found = []
    for c in configs.WGMMA:
        for half, f16 in HALVES.items():
            types = {
                "x_ptr": f"*{half}",
                "v_ptr": "*i32",
                "e_ptr": "*i32",
                "o_ptr": f"*{half}",
                **REST,
            }
            arguments = {**types, "F16": f16, "WG": c.wg, "STAGES": c.stages}
            # The ring is all of shared memory: so it starts where the kernel's descriptor says, at
            # its first byte.
            ring = c.stages * 128 * 64 * 2
            name = f"wgmma {half} WG{c.wg} sm_90"
            found.append(
                Variant(
                    name, "wgmma", 90, arguments, 4 * c.wg, c.registers, "HGMMA.SP", shared=ring
                )
            )
    return found


def portable_variants(capability: int) -> list[Variant]:
    found = []
    for kind in configs.DECODE:
        for half, f16 in HALVES.items():
            common = {"KIND": kind, "F16": f16, "U": configs.EXPAND_BLOCKS}
            weight = {
                "v_ptr": "*i32",
                "e_ptr": "*i32",
                "s_ptr": scale_type(kind),
                "N": "i32",
                "K": "i32",
            }
            gemv, expand = (
                {"x_ptr": "*i32", "o_ptr": f"*{half}", **weight},
                {"o_ptr": "*i32", **weight},
            )
            found.append(
                Variant(
                    f"gemv {kind} {half} sm_{capability}",
                    "gemv",
                    capability,
                    {**gemv, **common},
                    4,
                    128,
                )
            )
            found.append(
                Variant(
                    f"expand {kind} {half} sm_{capability}",
                    "expand",
                    capability,
                    {**expand, **common},
                    4,
                    128,
                )
            )
    combine = {
        "p_ptr": "*fp32",
        "b_ptr": "*bf16",
        "o_ptr": "*bf16",
        "splits": "i32",
        "N": "i32",
        "BIAS": True,
        "F16": False,
        "BLOCK": 1024,
    }
    return [*found, Variant(f"combine sm_{capability}", "combine", capability, combine, 4, 64)]


def variants() -> list[Variant]:
    makers = (decode_variants, gemm_variants, wgmma_variants, portable_variants)
    return [v for capability in configs.CAPABILITIES for make in makers for v in make(capability)]


def starved() -> Variant:
    """A variant that cannot but spill: what is asserted of the others must fail for it."""
    heavy = max(decode_variants(90), key=lambda v: v.registers)
    return Variant(
        "starved of registers",
        heavy.kernel,
        90,
        heavy.arguments,
        heavy.warps,
        255,
        "HMMA.SP",
        options={"maxnreg": 40},
    )


def compiled(variant: Variant) -> dict[str, Any]:
    """Facts of one variant's machine code, or the error of its compiler."""
    start = time.perf_counter()
    try:
        kernel = compile_variant(variant)
        return {**facts(kernel), "seconds": time.perf_counter() - start}
    except Exception as error:  # reported with the variant's name by the test
        cause = error.__cause__ or error
        return {"error": f"{type(cause).__name__}: {str(cause)[-1500:]}"}


def compile_variant(variant: Variant) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    from secateur.kernels.sparse24.gpu import decode, gemm, portable, wgmma

    kernels = {"decode": decode.decode, "gemm": gemm.gemm, "wgmma": wgmma.wgmma}
    function = kernels.get(variant.kernel) or getattr(portable, variant.kernel)
    arguments = dict(variant.arguments)
    at = arguments.get
    layouts = {
        "decode": lambda: {"L": decode.layout(at("P"), at("MT"), at("NT"), at("WARPS"))},
        "gemm": lambda: gemm.layouts(at("MT"), at("NT"), at("WM"), at("WN")),
        "wgmma": lambda: {"L": wgmma.layout(at("WG"))},
    }
    arguments |= layouts.get(variant.kernel, dict)()
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        value = arguments[name]
        is_type = isinstance(value, str) and (value.startswith("*") or value == "i32")
        signature[name] = value if is_type else "constexpr"
        if not is_type:
            constants[name] = value
        elif value.startswith("*") or name in variant.divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if variant.kernel in kernels else ASTSource
    return triton.compile(
        source(fn=function, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", variant.capability, 32),
        options={"num_warps": variant.warps, **variant.options},
    )


def facts(kernel: Any) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        env = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        command = [str(tools / "cuobjdump"), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    usage = re.search(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)", text)
    assert usage is not None, text[:500]
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    registers, stack, local = map(int, usage.groups())
    return {
        "registers": registers,
        "stack": stack + local,
        "spills": sum(op.split(".")[0] in ("LDL", "STL") for op in opcodes),
        "sparse": sorted(
            {re.match(r"H\w*MMA\.SP", op).group() for op in opcodes if re.match(r"H\w*MMA\.SP", op)}
        ),  # type: ignore[union-attr]
        "instructions": len(opcodes),
        "shared": kernel.metadata.shared,
        "unguarded": unguarded(kernel.asm["ptx"]),
    }


def unguarded(ptx: str) -> int:
    """Accesses to shared memory between a wait for copies and its barrier: another warp may still
    copy or read."""
    waited, found = False, 0
    for line in ptx.splitlines():
        if "cp.async.wait_group" in line:
            waited = True
        elif "bar.sync" in line or "barrier.sync" in line:
            waited = False
        elif waited and re.search(
            r"\b(ld\.shared|ldmatrix|wgmma\.mma_async|cp\.async\.c[ag])", line
        ):
            found += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="variants whose name holds this text")
    options = parser.parse_args()
    import triton

    todo = [v for v in [*variants(), starved()] if options.only in v.name]
    start = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        launches, descriptors = pool.submit(launched, 90), pool.submit(descriptor_words)
        found = dict(
            zip((v.name for v in todo), pool.map(compiled, todo, chunksize=4), strict=True)
        )
    wanted = {
        v.name: {key: value for key, value in asdict(v).items() if key != "arguments"} for v in todo
    }
    report = {
        "triton": triton.__version__,
        "launches": launches.result(),
        "descriptors": descriptors.result(),
        "seconds": time.perf_counter() - start,
        "wanted": wanted,
        "found": found,
    }
    options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
