"""A distillation that is killed goes on from its last kept step and ends with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from secateur.passes.training.distill import Distill
from secateur.passes.training.trainer import TrainingError

sys.path.insert(0, str(Path(__file__).parent / "training"))
from worker import SMALL, pruned

WORKER = Path(__file__).parent / "training" / "worker.py"
ROOT = Path(__file__).parents[2]


def worker(out: Path, *given: str, processes: int = 1) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable,
        "-P",
        *(launch if processes > 1 else []),
        str(WORKER),
        str(out),
        *given,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


def outcome(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(out / "weights.safetensors"), json.loads((out / "figures.json").read_text())


def assert_same(one: Path, other: Path) -> None:
    (weights, figures), (others, other_figures) = outcome(one), outcome(other)
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    for key in ("curve", "held_out", "tokens", "steps"):
        assert figures[key] == other_figures[key]


def test_kills_between_kept_steps_change_nothing(tmp_path: Path) -> None:
    """Two micro-batches a step, dropout on, a step kept every second one; killed after 5, 0, 3 and
    1 steps."""
    worker(tmp_path / "straight", "kind=gpt2")
    worker(tmp_path / "killed", "kind=gpt2", f"resume={tmp_path / 'kept'}", "kills=5,0,3,1")
    assert_same(tmp_path / "straight", tmp_path / "killed")
    kept = [file for file in (tmp_path / "kept").rglob("*") if file.is_file()]
    assert kept and all(file.suffix == ".safetensors" for file in kept), (
        "no pickle, nothing half written"
    )


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(tmp_path: Path) -> None:
    worker(tmp_path / "straight", "kind=gpt2", "tokens=9600")
    worker(
        tmp_path / "killed",
        "kind=gpt2",
        "tokens=9600",
        f"resume={tmp_path / 'kept'}",
        "random=12",
        "save_every=1",
    )
    assert_same(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_that_share_the_student_learn_what_one_learns(tmp_path: Path) -> None:
    """FSDP2 on two CPU processes; then again, killed on the way."""
    worker(tmp_path / "one")
    worker(tmp_path / "two", processes=2)
    (weights, figures), (others, other_figures) = (
        outcome(tmp_path / "one"),
        outcome(tmp_path / "two"),
    )
    assert (figures["processes"], figures["sharded"]) == (1, False)
    assert (other_figures["processes"], other_figures["sharded"]) == (2, True)
    for one, two in zip(figures["curve"], other_figures["curve"], strict=True):
        assert one["kl"] == pytest.approx(two["kl"], rel=1e-5)
    assert figures["held_out"][-1]["kl"] == pytest.approx(
        other_figures["held_out"][-1]["kl"], rel=1e-5
    )
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-5)
    worker(tmp_path / "half", f"resume={tmp_path / 'kept'}", "stop_at=7", processes=2)
    worker(tmp_path / "again", f"resume={tmp_path / 'kept'}", processes=2)
    assert_same(tmp_path / "two", tmp_path / "again")


def test_steps_of_another_run_are_refused(tmp_path: Path) -> None:
    small, context = pruned()
    context = replace(context, resume=tmp_path)
    options = {**SMALL, "tokens": 96, "held_out": 0}
    first = Distill(**options)(small, context)
    again = Distill(**options)(small, context)
    for (name, one), (_, two) in zip(
        first.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    with pytest.raises(TrainingError, match=r"option lr .kept 0\.001, now 0\.002"):
        Distill(**{**options, "lr": 2e-3})(small, context)
    with pytest.raises(TrainingError, match=r"seed .kept 0, now 1"):
        Distill(**options)(small, replace(context, seed=1))
