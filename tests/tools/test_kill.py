"""``secateur compress``, killed at any moment and started again, ends with the same weights, bit
for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PIPELINE = (
    "prune-depth{drop=1},score{metric=wanda},prune-width{mlp=0.25,kv_heads=1,hidden=48},repair,"
    "distill{tokens=1536,batch_tokens=256,save_every=2,evaluations=2}"
)


def runs(
    folder: Path, arguments: list[str], kills: list[list[float | int]], seed: int
) -> list[dict[str, Any]]:
    """What became of series of killed runs, see killed_runs.py, in a process of its own."""
    told = json.dumps({"arguments": arguments, "folder": str(folder), "kills": kills})
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": str(seed),
        "PYTHONSAFEPATH": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), told]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def arguments(model_folder: Path, text_file: Path) -> list[str]:
    return [
        str(model_folder),
        "-p",
        PIPELINE,
        "--data",
        str(text_file),
        "--tokens",
        "512",
        "--window",
        "64",
    ]


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that nobody killed."""
    (found,) = runs(tmp_path_factory.mktemp("whole"), arguments, [[]], seed=2)
    assert found["codes"] == [0] and found["left"] == ["out"], found
    return found


def check(found: dict[str, Any], whole: dict[str, Any], killed: int) -> None:
    assert found["codes"] == [-9] * killed + [0], found
    assert found["sha256"] == whole["sha256"], found
    assert found["left"] == ["out"], found


def test_killed_before_some_disk_operations(arguments: list[str], tmp_path: Path) -> None:
    whole, killed = runs(tmp_path, arguments, [[], [14, 18]], seed=1)
    assert whole["codes"] == [0] and whole["left"] == ["out"], whole
    check(killed, whole, 2)
    assert killed["told"].count("going on after pass") == 2


@pytest.mark.slow
def test_killed_before_every_disk_operation(
    arguments: list[str], whole: dict[str, Any], tmp_path: Path
) -> None:
    kills: list[list[float | int]] = [
        [operation] for operation in range(1, whole["operations"] + 1)
    ]
    for one in runs(tmp_path, arguments, kills, seed=3):
        check(one, whole, 1)


@pytest.mark.slow
def test_thirty_kills_at_random_moments(
    arguments: list[str], whole: dict[str, Any], tmp_path: Path
) -> None:
    moments = random.Random(0)
    kills: list[list[float | int]] = [
        [moments.uniform(0.05, 0.9) * whole["seconds"] for _ in range(5)] for _ in range(6)
    ]
    found = runs(tmp_path, arguments, kills, seed=4)
    for one in found:  # a run that went on may end before its moment comes
        assert set(one["codes"]) <= {-9, 0}, one
        check({**one, "codes": one["codes"][-1:]}, whole, 0)
    assert sum(one["codes"].count(-9) for one in found) >= 15
