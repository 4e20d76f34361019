"""A skip that no machine excuses fails a strict run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

def test_excused() -> None:
    pytest.skip('no CUDA device')

def test_lost() -> None:
    pytest.skip('needs the extra kernels')
"""


def test_a_lost_test_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "--rootdir", str(tmp_path), str(tmp_path)],
        env={**os.environ, "SECATEUR_STRICT_SKIPS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    _, _, told = done.stdout.partition("skipped for no good reason: ")
    assert told.splitlines()[0] == "Skipped: needs the extra kernels"
