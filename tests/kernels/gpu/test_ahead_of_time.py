"""The machine code of every variant, for both chips and Triton versions: sparse instructions, no spills, in bounds."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from versions import ROOT, VERSIONS, run

from secateur.kernels.sparse24.gpu import configs

pytest.importorskip("triton", reason="needs the extra `kernels`")
STARVED = "starved of registers"


@functools.cache
def report(version: str) -> dict[str, Any]:
    """Facts by variant.  Triton's own cache, keyed by the sources, lies in .cache: unchanged kernels compile once."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        program = str(Path(__file__).parent / "compile_ahead.py")
        done = run(version, program, str(out), TRITON_CACHE_DIR=str(ROOT / ".cache" / "triton-compiled"))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def complaints(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is wrong with a variant's machine code."""
    if "error" in found:
        return [f"does not compile: {found['error']}"]
    shared = configs.SHARED_BYTES[wanted["capability"]]
    instruction = [wanted["sparse"]] if wanted["sparse"] else []
    troubles = {
        f"{found['registers']} registers, at most {wanted['registers']}": found["registers"] > wanted["registers"],
        f"{found['spills']} spilling instructions, {found['stack']} bytes of stack": found["spills"] or found["stack"],
        f"{found['shared']} bytes of shared memory, at most {shared}": found["shared"] > shared,
        f"{found['shared']} bytes of shared memory, not {wanted['shared']}": wanted["shared"]
        not in (None, found["shared"]),
        f"sparse instructions {found['sparse']}, not {instruction}": found["sparse"] != instruction,
        f"{found['unguarded_reads']} reads between a wait and its barrier": found["unguarded_reads"],
    }
    return [text for text, wrong in troubles.items() if wrong]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_variant_is_what_its_configuration_says(version: str) -> None:
    facts = report(version)
    assert len(facts["found"]) > 100
    wrong = {
        name: complaints(facts["wanted"][name], found) for name, found in facts["found"].items() if name != STARVED
    }
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_variant_without_registers_is_found_to_spill(version: str) -> None:
    facts = report(version)
    assert any("spill" in text for text in complaints(facts["wanted"][STARVED], facts["found"][STARVED]))


def test_the_two_versions_are_two() -> None:
    if len(VERSIONS) > 1 and VERSIONS[1].marks[0].args == (False,):  # type: ignore[union-attr]
        assert report("installed")["triton"] != report("old")["triton"]


def test_all_kernels_and_configurations_are_compiled() -> None:
    names = [name for name in report("installed")["found"] if name != STARVED]
    for kind in configs.DECODE:
        assert sum(name.startswith(f"decode {kind} ") for name in names) >= 4 * len(configs.DECODE[kind])
        assert sum(name.startswith(f"gemm {kind} ") for name in names) >= 4 * len(configs.GEMM[kind])
    assert sum(name.startswith("wgmma") for name in names) == 2 * len(configs.WGMMA)
