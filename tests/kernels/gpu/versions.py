"""The Triton versions to check: the installed one and, in a folder that SECATEUR_TRITON_OLD names,
an older one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def old_folder() -> Path | None:
    """The folder that `pip install --no-deps --target FOLDER triton==VERSION` filled."""
    folder = Path(os.environ.get("SECATEUR_TRITON_OLD") or ROOT / ".cache" / "triton-old")
    return folder if (folder / "triton").is_dir() else None


VERSIONS = [
    "installed",
    pytest.param(
        "old",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(
                old_folder() is None, reason="no older Triton: `make triton-old` fetches one"
            ),
        ],
    ),
]


def run(version: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own that sees this version, and this folder's helpers."""
    folders = [str(old_folder())] * (version == "old") + [str(Path(__file__).parent)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(folders),
        "PYTHONSAFEPATH": "1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-P", *command], env=env, cwd=ROOT, capture_output=True, text=True
    )
