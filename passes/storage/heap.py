"""Heap trimming: freed memory that the C library still holds goes back to the system."""

from __future__ import annotations

import ctypes
import os

_C_LIBRARY = ctypes.CDLL(None) if os.name == "posix" else None


def trim_heap() -> None:
    """Give freed memory between what is in use back to the system, where the C library can (glibc).

    Work on one layer or block takes and frees far more than it leaves; over a whole model the holes
    add up to more than all that is held.
    """
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)
