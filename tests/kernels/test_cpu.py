"""The compiled CPU kernels: right on every shape; built whole or not at all; a reason where they
are not used."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo.sparse24 import weight_24

from secateur.kernels.sparse24 import backend_report, cpu, pack
from secateur.kernels.sparse24.reference import linear as reference
from secateur.kernels.sparse24.selftest import find_failures, iterate_layouts, judge_case, make_case

CAN_RUN = all(flag in cpu.processor_flags() for flag in cpu.NEEDED)
needs_avx512 = pytest.mark.skipif(not CAN_RUN, reason="the CPU kernels need AVX-512 with VBMI2")


@pytest.fixture(scope="module")
def kernels() -> torch._ops._OpNamespace:
    found = cpu.backend()
    assert found.name == "avx512", found.reason
    return torch.ops.secateur_cpu


@needs_avx512
def test_the_self_test_is_green(kernels: torch._ops._OpNamespace) -> None:
    assert find_failures(kernels.linear_out) == []


@needs_avx512
@settings(max_examples=150, deadline=None)
@given(
    layout=st.sampled_from(list(iterate_layouts())),
    rows=st.one_of(st.sampled_from([1, 63, 1000]), st.integers(1, 90)),
    columns=st.integers(1, 400),
    batch=st.integers(1, 80),
    exact=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_type_agrees_with_the_reference(
    kernels: torch._ops._OpNamespace,
    layout: tuple[str, torch.dtype, bool],
    rows: int,
    columns: int,
    batch: int,
    exact: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    case = make_case(*layout, (rows, columns), batch, exact, generator)
    assert judge_case(case, kernels.linear_out) == ""


@needs_avx512
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_strides_and_leading_dims_change_nothing(
    kernels: torch._ops._OpNamespace, dtype: torch.dtype
) -> None:
    packed = pack(weight_24(1000, 520, dtype))
    x = torch.randn(520, 6, dtype=dtype).T
    wanted = torch.ops.secateur.linear_24(x.contiguous(), packed.values, packed.mask)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(torch.ops.secateur.linear_24(x, packed.values, packed.mask), wanted)
    finally:
        torch.set_num_threads(before)
    cut = torch.ops.secateur.linear_24(x.view(2, 3, 520), packed.values, packed.mask)
    assert torch.equal(cut, wanted.view(2, 3, 1000))
    assert torch.ops.secateur.linear_24(x[0], packed.values, packed.mask).shape == (1000,)
    assert torch.ops.secateur.linear_24(x[:0], packed.values, packed.mask).shape == (0, 1000)
    loose = packed.values.T.contiguous().T
    assert torch.equal(torch.ops.secateur.linear_24(x, loose, packed.mask), wanted)


@needs_avx512
def test_dense_floats_are_served_for_comparison(kernels: torch._ops._OpNamespace) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = weight_24(33, 200, dtype), torch.randn(3, 200, dtype=dtype)
        y = torch.full((3, 33), float("nan"), dtype=dtype)
        kernels.linear_out(x, weight, None, None, None, y)
        assert torch.allclose(y, reference(x, weight, None, None, None), rtol=8e-3, atol=1e-4)


@needs_avx512
def test_what_does_not_fit_is_refused(kernels: torch._ops._OpNamespace) -> None:
    packed = pack(weight_24(8, 64))
    x, values, mask = torch.randn(2, 64), packed.values, packed.mask
    op = torch.ops.secateur.linear_24
    for bad in (
        lambda: op(x[:, :40], values, mask),
        lambda: op(x.half(), values, mask),
        lambda: op(x.double(), values, mask),
        lambda: op(x, values, mask[:, :4]),
        lambda: op(x, values, mask, torch.ones(7)),
        lambda: op(x, values, mask, torch.ones(8).half()),
        lambda: torch.ops.secateur.linear_24_int8(x, values, mask, torch.ones(8)),
        lambda: torch.ops.secateur.linear_24_int8(x, values.to(torch.int8), mask, torch.ones(9)),
    ):
        with pytest.raises(ValueError, match="secateur"):
            bad()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process state in which no backend was chosen yet, with an empty cache; returns the
    cache."""
    monkeypatch.setattr(cpu, "_backend", None)
    monkeypatch.setenv("SECATEUR_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SECATEUR_CPU_KERNELS", raising=False)
    return tmp_path / "cache"


def script(folder: Path, text: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "compiler"
    file.write_text("#!/bin/sh\n" + text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


FAKE = """[ "$1" = --version ] && { echo fake 1; exit; }
while [ $# -gt 0 ]; do [ "$1" = -o ] && { sleep 0.2; echo built > "$2"; }; shift; done
"""


def test_without_the_instructions_the_reference_serves(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "processor_flags", lambda: frozenset({"avx512f"}))
    assert cpu.backend().name == "reference" and "avx512_vbmi2" in cpu.backend().reason


def test_switched_off_it_says_so_once_and_reports_every_kind(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SECATEUR_CPU_KERNELS", "0")
    with caplog.at_level(logging.WARNING):
        rows = [row for row in backend_report() if row.device == "cpu"]
        cpu.backend()
    assert len(caplog.records) == 1 and "SECATEUR_CPU_KERNELS=0" in caplog.text
    assert len(rows) == 7 and {row.backend for row in rows} == {"reference"}
    assert all("SECATEUR_CPU_KERNELS=0" in row.reason for row in rows)


@needs_avx512
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[ "$1" = --version ] && exit; echo no such header >&2; exit 1', "no such header"),
        (FAKE, "does not load"),
    ],
)
def test_a_compiler_that_fails_or_lies_is_a_reason(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, text))
    assert cpu.backend().name == "reference" and reason in cpu.backend().reason
    assert list(fresh.glob(".building-*")) == []


@needs_avx512
def test_without_a_compiler_it_says_how_to_name_one(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "name one in CXX" in cpu.backend().reason


@needs_avx512
def test_a_red_self_test_switches_the_kernels_off(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        @staticmethod
        def linear_out(
            x: Tensor, values: Tensor, mask: None, scale: None, bias: None, y: Tensor
        ) -> None:
            y.zero_()

        @staticmethod
        def activate() -> None:
            raise AssertionError("a broken kernel was registered")

    monkeypatch.setattr(cpu, "build_library", lambda: Path("kernels.so"))
    monkeypatch.setattr(cpu, "load_library", lambda library: Broken)
    assert (
        cpu.backend().name == "reference"
        and "self-test of kernels.so failed" in cpu.backend().reason
    )


def test_builds_at_the_same_time_leave_one_whole_library(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, FAKE))
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: cpu.build_library(), range(4)))
    assert len(found) == 1 and found.pop().read_text() == "built\n"
    assert sorted(p.name for p in next(fresh.iterdir()).iterdir()) == ["kernels.cpp", "kernels.so"]
    assert len(list(fresh.iterdir())) == 1


def test_a_killed_build_leaves_nothing_that_is_used(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, FAKE.replace("sleep 0.2", "kill -9 $PPID")))
    code = "from secateur.kernels.sparse24 import cpu; cpu.build_library()"
    killed = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert killed.returncode == -9 and all(p.name.startswith(".building-") for p in fresh.iterdir())
    monkeypatch.setenv("CXX", script(tmp_path, FAKE))
    assert cpu.build_library().read_text() == "built\n"


def test_another_source_or_compiler_is_another_library(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, FAKE))
    other = tmp_path / "other.cpp"
    other.write_text(cpu.SOURCE.read_text() + "// changed\n")
    libraries = {
        cpu.build_library(),
        cpu.build_library(),
        cpu.build_library(other),
        cpu.build_library(namespace="secateur_other"),
    }
    monkeypatch.setenv("CXX", script(tmp_path, FAKE.replace("fake 1", "fake 2")))
    assert len(libraries | {cpu.build_library()}) == 4


# Each fault: what is replaced in the kernels' source, and by what.
MUTANTS = {
    "mask_off_by_one": ("std::memcpy(&word, mask + block * "
                        "8 +", "std::memcpy(&word, mask + (block ^ 1) * 8 +"),
    "swapped_halves": ("half(levels, 0), half(levels, "
                       "1), *this", "half(levels, 1), half(levels, 0), *this"),
    "wrong_scale_row": ("static_cast<const "
                        "float*>(scale)[n] :", "static_cast<const float*>(scale)[n ? n - 1 : 0] :"),
    "wrong_scale_group": ("group_scale(std::min(first + r, last), i "
                          "/ 2)", "group_scale(std::min(first + r, last), 0)"),
    "wrong_panel_scale": ("w.group_scale(n, column / SCALE_COLUMNS)", "w.group_scale(n, 0)"),
    "unwritten_tail": ("r < std::min<int64_t>(ROWS, end - n)", "r < (end - n < ROWS ? 0 : ROWS)"),
    "short_block_dropped": ("if (w.stored % "
                            "BLOCK) sums.tail", "if (w.stored % BLOCK == 1) sums.tail"),
    "stale_batch_row": ("w.template dot<CHAINS, FIRST>(acc[r][b], x + b * BLOCK)",
                        "w.template dot<CHAINS, FIRST>(acc[r][b], x + (b / 2 * 2) * BLOCK)"),
    "wrong_level": ("0x3F80, 0x4000, 0x4040, 0x4080", "0x3F80, 0x4000, 0x4000, 0x4080"),
}  # fmt: skip


def check_mutant(name: str, folder: Path) -> list[str]:
    old, new = MUTANTS[name]
    text = cpu.SOURCE.read_text()
    assert old in text, f"{name}: the source no longer holds {old!r}"
    source = folder / f"{name}.cpp"
    source.write_text(text.replace(old, new))
    namespace = f"secateur_mutant_{name}"
    return find_failures(
        cpu.load_library(cpu.build_library(source, namespace), namespace).linear_out
    )


@needs_avx512
@pytest.mark.parametrize("name", MUTANTS)
def test_the_planted_faults_still_meet_the_source(name: str) -> None:
    assert MUTANTS[name][0] in cpu.SOURCE.read_text()


@needs_avx512
@pytest.mark.slow
def test_every_planted_fault_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_KERNEL_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor(2) as pool:
        found = dict(
            zip(MUTANTS, pool.map(lambda name: check_mutant(name, tmp_path), MUTANTS), strict=True)
        )
    assert [name for name, red in found.items() if not red] == []
