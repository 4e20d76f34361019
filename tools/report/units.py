"""Numbers as people read them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
YEAR = 365 * 86400
BYTE_SUFFIXES = ((1024**4, "TiB"), (1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"))
STUDENT_T = {
    2: 12.71,
    3: 4.30,
    4: 3.18,
    5: 2.78,
    6: 2.57,
    7: 2.45,
    8: 2.36,
    9: 2.31,
}  # 97.5 %, by count of values


def format_count(value: float) -> str:
    """134515008 -> 134.5 M."""
    return next(
        (f"{value / size:.4g} {suffix}" for size, suffix in SUFFIXES if abs(value) >= size),
        f"{value:.4g}",
    )


def format_bytes(value: float) -> str:
    """538060032 -> 513.1 MiB."""
    return next(
        (f"{value / unit:.4g} {name}" for unit, name in BYTE_SUFFIXES if abs(value) >= unit),
        f"{value:.4g} B",
    )


def format_duration(seconds: float) -> str:
    """75.2 -> 1 min 15 s; days from two days on, years from two years on."""
    if seconds >= 2 * YEAR:
        return f"{seconds / YEAR:,.0f} years"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        days, hours = divmod(hours, 24)
        return f"{days} days" + f" {hours} h" * bool(hours)
    parts = (
        [f"{hours} h"] * bool(hours)
        + [f"{minutes} min"] * bool(minutes)
        + [f"{rest} s"] * (not hours)
    )
    return " ".join(parts)


def format_change(before: float, after: float) -> str:
    """100, 75 -> -25.0 %."""
    if not before:
        return ""
    return f"{100 * (after - before) / before:+.1f} %"


def format_spread(values: Sequence[float], shape: str) -> str:
    """Mean and half its 95 % interval over a few runs (Student's t); one run has no interval.

    Args:
        shape: format of both numbers, such as ``.2f``.
    """
    mean = statistics.mean(values)
    runs = len(values)
    if runs < 2:
        return f"{mean:{shape}}"
    half = STUDENT_T.get(runs, 2.26) * statistics.stdev(values) / runs**0.5
    return f"{mean:{shape}} ± {half:{shape.lstrip('+')}}"
