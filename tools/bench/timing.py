"""Timing things against each other: in turns, past the caches, and only what was checked to be
right."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from secateur.passes.base import Progress, no_progress

CACHE_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
"""Weights are cycled until so many bytes were read, so that none is still in a cache when its turn
comes again."""
LEAST_SECONDS = 0.02
MOST_COPIES = 512


@dataclass(frozen=True)
class Spread:
    """Seconds of one thing over the rounds: the median, and the span of the middle 80 %."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def from_seconds(cls, seconds: list[float]) -> Spread:
        """The spread of some times."""
        ordered = sorted(seconds)
        edge = len(ordered) // 10
        return cls(statistics.median(ordered), ordered[edge], ordered[-1 - edge], len(ordered))

    def rate(self, amount: float) -> Spread:
        """The spread of amount over seconds."""
        return Spread(amount / self.median, amount / self.high, amount / self.low, self.rounds)


def read_clock(device: torch.device) -> float:
    """Seconds, after all work on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_in_turns(
    works: Mapping[str, Callable[[], int]],
    device: torch.device,
    *,
    rounds: int,
    progress: Progress = no_progress,
    description: str = "timing",
) -> dict[str, Spread]:
    """Seconds of a unit of each work, the works taking turns so that a busy machine hits all alike.

    Args:
        works: by name; each does some units and says how many.
        rounds: counted; one before them warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in progress(range(rounds + 1), description, rounds + 1):
        if turn % 2:
            names = list(works)
        else:
            names = list(works)[::-1]
        for name in names:
            done = 0
            started = read_clock(device)
            while not done or (read_clock(device) - started < LEAST_SECONDS):
                done += works[name]()
            if turn:
                seconds[name].append((read_clock(device) - started) / done)
    return {name: Spread.from_seconds(times) for name, times in seconds.items()}


def copies_needed(nbytes: int, device: torch.device) -> int:
    """How many copies of a weight have to be cycled through; small ones stay in a cache all the
    same."""
    return min(MOST_COPIES, max(2, -(-CACHE_BYTES[device.type] // max(nbytes, 1))))
