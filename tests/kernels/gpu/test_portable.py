"""The plain-Triton kernels, and all that launches kernels, in a process where Triton interprets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from versions import VERSIONS, run

pytest.importorskip("triton", reason="needs the extra `kernels`")
FOLDER = Path(__file__).parent
CASES = {
    "installed": ("interpreted_cases.py", "interpreted_api.py"),
    "old": ("interpreted_cases.py",),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_interpreter_finds_every_kind_right_and_every_fault(version: str) -> None:
    files = [str(FOLDER / name) for name in CASES[version]]
    done = run(
        version, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d passed", done.stdout, re.M), done.stdout
