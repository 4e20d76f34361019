"""What was freed between things in use goes back to the system."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from secateur.passes.storage.heap import trim_heap

PIECES, FLOATS = 800, 16_384


def resident() -> int:
    """Bytes of this process's memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_holes_go_back_and_what_is_in_use_stays() -> None:
    freed, kept = [], []
    for at in range(PIECES):
        freed.append(torch.ones(FLOATS))
        kept.append(torch.full((64,), float(at)))
    full = resident()
    freed.clear()
    trim_heap()
    assert full - resident() > 0.8 * PIECES * FLOATS * 4
    assert all(bool((one == at).all()) for at, one in enumerate(kept))
