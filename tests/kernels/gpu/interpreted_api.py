"""Choice, launch, self-test and fallback, end to end on CPU; test_portable.py runs this with
TRITON_INTERPRET=1.

The tensor-core kernels run under the stand-in, the plain ones in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gluon_standin import Kernels

from secateur.kernels.sparse24.gpu import api, configs, health, launch, portable
from secateur.kernels.sparse24.gpu.configs import KernelChoice
from secateur.kernels.sparse24.gpu.fragments import FLOATS, pack_fragments

CPU = torch.device("cpu")
KINDS = ("bfloat16", "float16", "int8", "int4")


class Launcher:
    """kernel[grid](...) as Triton spells it, under the stand-in."""

    def __init__(self, kernels: Kernels, kernel: Any) -> None:
        self.kernels, self.kernel = kernels, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, num_warps: int, **rest: Any) -> None:
            self.kernels.launch(self.kernel, grid, *args, **rest)

        return run


def modules(kernels: Kernels) -> SimpleNamespace:
    def module(name: str) -> SimpleNamespace:
        found = vars(getattr(kernels, name))
        return SimpleNamespace(**{**found, name: Launcher(kernels, found[name])})

    return SimpleNamespace(
        **{name: module(name) for name in ("decode", "gemm", "wgmma")}, portable=portable
    )


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The CPU as a Hopper of four multiprocessors."""
    monkeypatch.setattr(launch, "load_kernels", lambda: modules(Kernels()))
    monkeypatch.setattr(health, "find_chip", lambda device: health.Chip("emulated", 90, 4))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    yield monkeypatch
    launch.compile_time_layouts.cache_clear()


@pytest.fixture
def untested() -> Iterator[None]:
    """Self-tests are kept for the process, as a user's are; these tests want their own."""
    health.find_trouble.cache_clear()
    yield
    health.find_trouble.cache_clear()


def half(kind: str) -> torch.dtype:
    return FLOATS.get(kind, torch.bfloat16)


@pytest.mark.parametrize(("kind", "at"), [("float16", 3), ("int8", 3)])
def test_decode_and_gemm_pass_their_self_test(kind: str, at: int) -> None:
    values = configs.value_kind(kind)
    for choice in (
        KernelChoice("decode", configs.DECODE[values][at]),
        KernelChoice("gemm", configs.GEMM[values][at]),
    ):
        assert health.self_test(choice, kind, half(kind), CPU) == ""


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_wgmma_passes_its_self_test(kind: str) -> None:
    assert health.self_test(KernelChoice("wgmma", configs.WGMMA[1]), kind, half(kind), CPU) == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["portable", "expand"])
def test_the_others_pass_their_self_test(kind: str, backend: configs.Backend) -> None:
    assert health.self_test(KernelChoice(backend), kind, half(kind), CPU) == ""


@pytest.mark.parametrize(
    ("batch", "backend"), [(1, "decode"), (11, "decode"), (40, "gemm"), (300, "expand")]
)
@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_any_batch_is_served_by_the_kernel_chosen_for_it(
    kind: str, batch: int, backend: str
) -> None:
    packed = health.random_weight(40, 196, kind)
    weight = pack_fragments(packed)
    x, bias = torch.randn(batch, 196).to(torch.bfloat16), torch.randn(40).to(torch.bfloat16)
    y = api.linear_24_fragment(x[None], weight.values, weight.indices, weight.scale, bias, kind, 40)
    assert y.shape == (1, batch, 40)
    assert health.describe_difference(y[0], x, packed, bias, backend == "expand") == ""
    assert api.serving(weight, batch, torch.bfloat16, CPU).backend == backend


def test_a_faulty_kernel_does_not_serve_and_the_report_says_why(
    device: pytest.MonkeyPatch, untested: None, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Kernels(("decode", "(row < N))", "(row < N - 1))"))
    device.setattr(launch, "load_kernels", lambda: modules(broken))
    weight = pack_fragments(health.random_weight(40, 196, "int8"))
    chosen = [api.serving(weight, 2, torch.bfloat16, CPU) for _ in range(2)]
    assert [c.backend for c in chosen] == ["expand", "expand"]
    assert (
        "decode: self-test, K in 1: " in chosen[0].reason
        and "results are wrong" in chosen[0].reason
    )
    assert len([r for r in caplog.records if "does not serve" in r.message]) == 1
    asked = [a for a in api.report_asked() if a.backend == "decode" and a.kind == "int8"]
    assert "results are wrong" in asked[-1].trouble


def test_where_nothing_compiles_plain_torch_serves(
    device: pytest.MonkeyPatch, untested: None
) -> None:
    def missing() -> SimpleNamespace:
        raise RuntimeError("the GPU kernels need Triton: pip install 'secateur[kernels]'")

    device.setattr(launch, "load_kernels", missing)
    packed = health.random_weight(24, 64, "float16")
    weight, x = pack_fragments(packed), torch.randn(3, 64).half()
    y = api.linear_24_fragment(x, weight.values, weight.indices, None, None, "float16", 24)
    assert health.describe_difference(y, x, packed) == ""
    chosen = api.serving(weight, 3, torch.float16, CPU)
    assert chosen.backend == "torch" and "pip install 'secateur[kernels]'" in chosen.reason


def test_no_rows_give_no_rows_and_rows_that_are_not_aligned_are_copied() -> None:
    packed = health.random_weight(24, 64, "bfloat16")
    weight = pack_fragments(packed)
    arguments = (weight.values, weight.indices, None, None, "bfloat16", 24)
    assert api.linear_24_fragment(
        torch.zeros(2, 0, 64, dtype=torch.bfloat16), *arguments
    ).shape == (2, 0, 24)
    x = torch.randn(129).to(torch.bfloat16)[1:].view(2, 64)
    assert launch.align_input(x, 64).data_ptr() % 16 == 0
    assert health.describe_difference(api.linear_24_fragment(x, *arguments), x, packed) == ""


def test_warm_up_names_a_choice_for_each_weight_and_batch() -> None:
    weight = pack_fragments(health.random_weight(24, 64, "bfloat16"))
    assert [c.backend for c in api.warm_up([weight], [1, 20], torch.bfloat16)] == ["decode", "gemm"]
