"""Tables and guesses: every product finds a shape that takes it, tables are read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.kernels.sparse24.gpu import configs
from secateur.kernels.sparse24.gpu.configs import DecodeConfig, GemmConfig, KernelChoice

KIND = st.sampled_from(["bfloat16", "float16", "int8", "int4"])
SIZE = st.integers(1, 40_000)


@given(
    KIND,
    SIZE,
    SIZE,
    st.integers(1, 5000),
    st.sampled_from([70, 75, 80, 86, 89, 90, 100, 120]),
    st.integers(1, 200),
)
def test_every_product_is_given_a_shape_that_takes_it(
    kind: str, n: int, k: int, batch: int, chip: int, many: int
) -> None:
    choice = configs.guess_config(kind, n, k, batch, chip, many)
    assert 1 <= choice.splits <= 4096 and choice.splits & (choice.splits - 1) == 0
    if choice.backend == "decode":
        assert (
            isinstance(choice.config, DecodeConfig) and batch <= 8 * choice.config.nt and chip >= 80
        )
    if choice.backend == "gemm":
        assert isinstance(choice.config, GemmConfig) and chip >= 80
    assert choice.config is not None or choice.splits == 1


@pytest.mark.parametrize("kind", configs.GEMM)
def test_shapes_are_powers_of_two_and_both_batches_of_decoding_are_served(kind: str) -> None:
    sizes = [v for c in configs.DECODE[kind] for v in (c.p, c.mt, c.nt, c.warps)]
    sizes += [v for c in configs.GEMM[kind] for v in (c.mt, c.nt, c.wm, c.wn, c.ku)]
    assert all(v & (v - 1) == 0 for v in sizes)
    assert {c.nt for c in configs.DECODE[kind]} == {1, 2}
    assert len(set(configs.GEMM[kind])) == len(configs.GEMM[kind])


def test_a_small_grid_is_split_and_a_large_one_is_not() -> None:
    assert configs.guess_config("bfloat16", 28672, 4096, 1, 90, 132).splits == 1
    assert configs.guess_config("bfloat16", 1024, 14336, 1, 90, 132).splits > 1


ROW: dict[str, Any] = configs.row_of(
    KernelChoice("decode", configs.DECODE["float"][0], 2), "bfloat16", 64, 128, 8, 3.5
)


def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    monkeypatch.setenv("SECATEUR_GPU_TABLE", str(path))
    configs.load_table.cache_clear()


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    yield
    configs.load_table.cache_clear()


def test_a_measured_row_wins_over_the_guess_up_to_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = configs.row_of(KernelChoice("cusparselt"), "bfloat16", 64, 128, 4096, 9.0)
    table(tmp_path, monkeypatch, {"version": 1, "devices": {"chip": [larger, ROW]}})
    assert configs.choose_config("bfloat16", 64, 128, 5, "chip", 90, 132) == KernelChoice(
        "decode", configs.DECODE["float"][0], 2, "measured"
    )
    assert configs.choose_config("bfloat16", 64, 128, 900, "chip", 90, 132).backend == "cusparselt"
    for other in (
        ("int8", 64, 128, 5, "chip"),
        ("bfloat16", 64, 128, 5, "other"),
        ("bfloat16", 64, 128, 9999, "chip"),
    ):
        assert configs.choose_config(*other, 90, 132).reason == "guess"


@pytest.mark.parametrize(
    "content",
    [
        {"version": 9, "devices": {}},
        [],
        {"version": 1, "devices": {"chip": [{**ROW, "config": {"p": 1}}]}},
    ],
)
def test_a_table_that_is_none_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    table(tmp_path, monkeypatch, content)
    with pytest.raises(ValueError, match=r"--tune.*unset"):
        configs.load_table()
