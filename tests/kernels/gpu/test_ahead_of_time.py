"""The machine code of every variant, for both chips and Triton versions: sparse instructions, no
spills, in bounds."""

from __future__ import annotations

import json
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import pytest
from versions import ROOT, VERSIONS, run

from secateur.kernels.sparse24.gpu import configs

pytest.importorskip("triton", reason="needs the extra `kernels`")
STARVED = "starved of registers"
DESCRIPTOR = 0x40000040 << 32  # as kernels/sparse24/gpu/wgmma.py writes it; 4: the next 32 columns


def report(version: str, folder: Path) -> dict[str, Any]:
    """Facts by variant.  Triton's own cache, keyed by the sources, lies in .cache: unchanged
    kernels compile once."""
    out = folder / "report.json"
    program = str(Path(__file__).parent / "compile_ahead.py")
    done = run(
        version, program, str(out), TRITON_CACHE_DIR=str(ROOT / ".cache" / "triton-compiled")
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def complaints(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is wrong with a variant's machine code."""
    if "error" in found:
        return [f"does not compile: {found['error']}"]
    limit, exact = configs.SHARED_BYTES[wanted["capability"]], wanted["shared"]
    instruction = [wanted["sparse"]] if wanted["sparse"] else []
    troubles = [
        (
            found["registers"] > wanted["registers"],
            f"{found['registers']} registers, limit {wanted['registers']}",
        ),
        (
            found["spills"] or found["stack"],
            f"{found['spills']} spills, {found['stack']} bytes of stack",
        ),
        (found["shared"] > limit, f"{found['shared']} bytes of shared memory, limit {limit}"),
        (
            exact not in (None, found["shared"]),
            f"{found['shared']} bytes of shared memory, not the ring's {exact}",
        ),
        (
            found["sparse"] != instruction,
            f"sparse instructions {found['sparse']}, not {instruction}",
        ),
        (found["unguarded"], f"{found['unguarded']} accesses between a wait and its barrier"),
    ]
    return [text for wrong, text in troubles if wrong]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_variant_is_what_its_configuration_says(version: str, tmp_path: Path) -> None:
    facts = report(version, tmp_path)
    assert (facts["triton"] == installed_version("triton")) == (version == "installed")
    wrong = {
        name: complaints(facts["wanted"][name], found) for name, found in facts["found"].items()
    }
    # One variant is given too few registers: what is asked of the others must fail for it.
    assert any("spills" in text for text in wrong.pop(STARVED))
    assert {name: texts for name, texts in wrong.items() if texts} == {}
    assert {name: text for name, text in facts["launches"].items() if text} == {}
    assert len(facts["launches"]) == 26
    assert {DESCRIPTOR, DESCRIPTOR + 4} <= set(facts["descriptors"])
    for kind in configs.DECODE:
        assert (
            sum(name.startswith(f"decode {kind} ") for name in wrong)
            == 4 * len(configs.DECODE[kind]) + 4
        )
        assert (
            sum(name.startswith(f"gemm {kind} ") for name in wrong)
            == 4 * len(configs.GEMM[kind]) + 2
        )
    assert sum(name.startswith("wgmma") for name in wrong) == 2 * len(configs.WGMMA)


def test_the_warpgroup_kernel_writes_that_descriptor() -> None:
    source = (ROOT / "kernels" / "sparse24" / "gpu" / "wgmma.py").read_text()
    assert f"{{{{p, {DESCRIPTOR >> 32:#x}}}}}; " in source and '"add.s64 q1, q0, 4;"' in source


def test_an_access_before_the_barrier_is_found() -> None:
    from compile_ahead import unguarded

    wait, barrier, read = (
        "cp.async.wait_group 0x2;",
        "bar.sync 0;",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1};",
    )
    assert unguarded("\n".join([wait, barrier, read])) == 0
    assert unguarded("\n".join([wait, read, barrier, read])) == 1
    assert (
        unguarded(
            "\n".join([wait, "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;", barrier])
        )
        == 1
    )
