"""The bench: what is wrong is not timed, what is timed is told with its protocol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.passes.lowering import cost as lower_cost
from secateur.passes.lowering.cost import KINDS, read_timings
from secateur.passes.solvers.integer_grid import find_grid
from secateur.tools.bench import kernels as bench_kernels_module
from secateur.tools.bench.kernels import (
    FORMS,
    Form,
    bench_kernels,
    numbers_of,
    relative_error,
    timings_of,
    two_of_four,
)
from secateur.tools.bench.models import compare_tokens
from secateur.tools.bench.timing import Spread, copies_needed, time_in_turns
from secateur.tools.cli import run_command

CPU = torch.device("cpu")
Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of a weight, and a shorter look at the memory: what is timed means nothing
    here."""
    monkeypatch.setattr(bench_kernels_module, "copies_needed", lambda nbytes, device: 2)
    monkeypatch.setattr(lower_cost, "STREAM_BYTES", 1 << 20)


def test_a_spread_is_the_median_and_the_middle_of_the_times() -> None:
    spread = Spread.from_seconds([float(i) for i in range(1, 22)])
    assert (spread.median, spread.low, spread.high, spread.rounds) == (11.0, 3.0, 19.0, 21)
    assert spread.rate(22.0).median == 2.0 and spread.rate(22.0).high == 22 / 3


def test_works_take_turns_and_the_first_round_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from secateur.tools.bench import timing as bench

    calls: list[str] = []
    now = iter(range(1000))
    monkeypatch.setattr(bench, "read_clock", lambda device: float(next(now)))
    works = {name: (lambda name=name: calls.append(name) or 2) for name in "ab"}
    found = time_in_turns(works, CPU, rounds=2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert found["a"].rounds == 2 and found["a"].median == 1.0


def test_weights_are_cycled_past_the_caches() -> None:
    assert [copies_needed(1 << power, CPU) for power in (10, 20, 30)] == [512, 128, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_have_the_kind_s_zeros_and_grid(kind: str) -> None:
    weight = torch.randn(8, 132)
    numbers = numbers_of(kind, weight)
    kept = (numbers.reshape(8, -1, 4) != 0).sum(-1)
    assert (int(kept.max()) <= 2) == kind.startswith("2:4")
    assert (find_grid(numbers) is not None) == ("int" in kind)
    assert torch.equal(numbers, weight) == (kind == "dense")


def test_two_of_four_takes_the_largest_of_any_width() -> None:
    assert two_of_four(torch.tensor([[1.0, -3, 2, 0.5, 4, 5]])).tolist() == [[0, -3, 2, 0, 4, 5]]


def test_every_form_of_the_machine_is_right_and_timed() -> None:
    rows = bench_kernels([(64, 256)], [1, 3], CPU, 1e10, rounds=1)
    assert [row.form for row in rows] == 2 * [form.name for form in FORMS["cpu"]]
    for row in rows:
        assert (
            row.fault == ""
            and row.seconds is not None
            and row.error is not None
            and row.share is not None
        )
        assert row.share == pytest.approx(row.nbytes / row.seconds.median / 1e10)
    kinds = {(t.kind, t.dtype) for t in timings_of(rows)}
    assert {("2:4", "bfloat16"), ("dense", "float32"), ("2:4+int4", "bfloat16")} <= kinds


def wrong(weight: Tensor) -> object:
    return lambda x: torch.nn.functional.linear(x, weight * 1.1)


def unwritten(weight: Tensor) -> object:
    def product(x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, weight)
        y[:, -1] = float("nan")
        return y

    return product


def missing(weight: Tensor) -> object:
    raise RuntimeError("no such kernel\nlong story")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (wrong, "wrong: relative error 0.1"),
        (unwritten, "inf"),
        (missing, "does not run: no such kernel"),
    ],
)
def test_what_is_wrong_is_not_timed(make: object, complaint: str) -> None:
    form = Form("broken", "dense", torch.float32, make)  # type: ignore[arg-type]
    (row,) = bench_kernels([(16, 32)], [1], CPU, 1e10, rounds=1, forms=[form])
    assert row.seconds is None and row.share is None and complaint in row.fault
    assert timings_of([row]) == []


def test_errors_are_relative_to_the_largest_number() -> None:
    weight, x = torch.eye(4), torch.tensor([[100.0, 0, 0, 0]])
    assert relative_error(torch.tensor([[100.0, 1, 0, 0]]), x, weight) == pytest.approx(0.01)


class Says:
    """Steps that give prepared logits."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.at = logits, 0

    def prefill(self, ids: Tensor) -> Tensor:
        self.at = 0
        return self.logits[None, 0]

    def decode(self, ids: Tensor) -> Tensor:
        self.at += 1
        return self.logits[None, self.at]


def test_tokens_must_be_those_of_the_base_but_for_ties() -> None:
    base = torch.randn(6, 9)
    base[torch.arange(6), torch.arange(6)] += 9
    tie, off = base.clone(), base.clone()
    base[2, 7] = base[2, 2] - 1e-4
    tie[2, 7] = tie[2, 2] + 1e-4
    off[3, 7] = 99
    prompt = torch.zeros(1, 1, dtype=torch.int64)

    def compared(other: Tensor, rounded: Tensor = base) -> dict[str, str]:
        return compare_tokens(Says(base), Says(rounded), Says(other), prompt, 5)

    assert compared(base.clone()) == {"tokens_equal": "5 of 5"}
    assert compared(tie) == {"tokens_equal": "5 of 5 (1 ties)"}
    assert compared(off)["tokens_equal"] == "4 of 5" and "other tokens" in compared(off)["fault"]
    assert (
        compared(base * 1.5)["tokens_equal"] == "5 of 5"
        and "average 0.5 off" in compared(base * 1.5)["fault"]
    )
    assert "average inf off" in compared(torch.full_like(base, float("nan")))["fault"]
    assert "fault" not in compared(base * 1.5, rounded=base * 1.3), "the base itself is as far off"
    once, other = base.clone(), base.clone()
    once[4] *= 1.3
    other[1] *= 1.5
    assert "fault" not in compared(other, rounded=once), (
        "where the largest distance falls is chance"
    )


@pytest.fixture
def own_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_TIMINGS", str(tmp_path / "timings.json"))
    return tmp_path


def test_products_and_models_in_one_run(
    model_folder: Path, own_timings: Path, capsys: Output
) -> None:
    out, work = own_timings / "out", own_timings / "work"
    command = [
        "bench",
        str(model_folder),
        "--variants",
        "2:4,int8,pruned",
        "--shapes",
        "64x128",
        "--rounds",
        "1",
    ]
    command += [
        "--new-tokens",
        "4",
        "--prompt-tokens",
        "6",
        "--work",
        str(work),
        "-o",
        str(out),
        "--keep",
        "--json",
    ]
    assert (
        run_command(
            [*command, "--packed-dtype", "float32", "--dtype", "float32", "--device", "cpu"]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (
        told["stream_gb_per_s"] > 0
        and "in turns" in told["protocol"]
        and told["machine"]["processor"]
    )
    models = {row["name"]: row for row in told["models"]}
    assert set(models) == {
        "tiny float32 eager",
        "2:4 packed eager",
        "int8 packed eager",
        "pruned float32 eager",
    }
    for row in models.values():
        assert row["fault"] == "" and row["decode"]["median"] > 0 and row["prefill"]["median"] > 0
    assert models["2:4 packed eager"]["tokens_equal"].startswith("4 of 4")
    assert models["2:4 packed eager"]["forms"] == {"dense": 1, "2:4": 14}
    assert models["2:4 packed eager"]["body_bytes"] == pytest.approx(
        0.5625 * 2 * models["2:4 packed eager"]["dense_bytes"], rel=0.1
    )
    assert (
        models["pruned float32 eager"]["weight_bytes"]
        < models["tiny float32 eager"]["weight_bytes"]
    )
    assert {file.name for file in out.iterdir()} == {"speed.json", "speed.md", "speed.png"}
    assert "| tiny float32 eager |" in (out / "speed.md").read_text()
    assert any(t.kind == "2:4" for t in read_timings())


def test_a_dry_run_tells_and_writes_nothing(
    model_folder: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        run_command(
            ["bench", str(model_folder), "--variants", "2:4", "--compiled", "--dry-run", "--json"]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (
        told["models"][:2] == ["tiny float32 eager", "tiny float32 compiled"]
        and told["seconds"] > 0
    )
    assert (
        len(told["models"]) == 6
        and "ours 2:4 bf16" in told["forms"]
        and list(tmp_path.iterdir()) == []
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shapes", "4096"], "expected pairs"),
        (["--batch", "0"], "numbers from 1"),
        (["--variants", "2:4"], "give its folder"),
        (["{model}", "--variants", "3:4"], "'3:4' is unknown"),
        (["{empty}"], "holds no model"),
        (["--dtype", "float8"], "'float8' is unknown"),
    ],
)
def test_bad_requests(
    arguments: list[str], complaint: str, model_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    given = [one.format(model=model_folder, empty=tmp_path) for one in arguments]
    assert run_command(["bench", *given]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
