"""The GPU benchmark where there is no GPU: its plan, its refusals, its tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from versions import ROOT

from secateur.kernels.sparse24.gpu import configs
from secateur.kernels.sparse24.gpu.configs import KernelChoice

PROGRAM = ROOT / "benchmarks" / "kernels_gpu.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location("kernels_gpu", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels_gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_the_plan_is_printed_without_a_gpu(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels_gpu.py", "--dry-run"])
    assert benchmark.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "each is compared with the exact product before it is timed" in lines[-2]
    assert len(lines) == 4 * 9 * 3 + 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_nothing_is_measured(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels_gpu.py"])
    assert benchmark.main() == 2


def row(
    benchmark: ModuleType, kind: str, backend: str, samples: list[float], **rest: object
) -> object:
    return benchmark.Row("down", 4096, 14336, 8, kind, backend, samples=samples, **rest)


def test_a_wrong_kernel_is_not_timed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        benchmark,
        "launch_product",
        lambda x, *_: torch.full((len(x), 16), float("nan"), dtype=x.dtype),
    )
    packed = benchmark.health.random_weight(16, 64, "bfloat16")
    bad = row(benchmark, "bfloat16", "decode", [])
    found = benchmark.prepare(
        bad,
        KernelChoice("decode"),
        torch.zeros(2, 64).bfloat16(),
        packed,
        [benchmark.pack_fragments(packed)],
    )
    assert found is None and "32 of 32 results are wrong" in bad.red  # type: ignore[attr-defined]


def test_speed_ups_and_the_table_of_the_best(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import asdict

    fast = asdict(configs.DECODE["float"][1])
    rows = [
        row(benchmark, "dense", "cublas", [30.0, 32.0, 31.0]),
        row(
            benchmark,
            "bfloat16",
            "decode",
            [20.0, 21.0, 22.0],
            config=asdict(configs.DECODE["float"][0]),
        ),
        row(benchmark, "bfloat16", "decode", [15.5, 15.0, 16.0], config=fast, splits=2),
        row(benchmark, "bfloat16", "wgmma", [], red="not right"),
    ]
    benchmark.summarise(rows, 4e12)
    assert rows[2].speedup == 2.0 and rows[2].roofline == pytest.approx(
        1.125 * 4096 * 14336 / 4e12 / 15.5e-6, rel=0.01
    )
    table = tmp_path / "table.json"
    table.write_text(json.dumps(benchmark.tuned(rows, "chip")))
    monkeypatch.setenv("SECATEUR_GPU_TABLE", str(table))
    configs.load_table.cache_clear()
    chosen = configs.choose_config("bfloat16", 4096, 14336, 3, "chip", 90, 132)
    configs.load_table.cache_clear()
    assert chosen == KernelChoice("decode", configs.DECODE["float"][1], 2, "measured")
    facts = {"device": "chip", "torch": "t", "triton": "t", "gigabytes_per_second": 4000.0}
    text = benchmark.markdown({"machine": facts}, rows)
    assert "| 2.00 |" in text and "not right" in text
