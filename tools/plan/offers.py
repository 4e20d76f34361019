"""Counts that a stock class takes, near those that were asked for: tried on the first layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from secateur.graph import CoupledGroup, Program, SecateurError, blocks, coupled_groups, drop, keep
from secateur.passes import PlannedEdit
from secateur.passes.width.prune_width import WHOLE
from secateur.passes.width.shares import heads_multiple
from secateur.runtime import ConfigPlan

Stock = Callable[[Program], ConfigPlan | None]
Counts = Mapping[str, int]
LAYERS, TRIES, PATIENCE_SECONDS = 2, 8, 30.0
"""Layers of the trial, counts tried in each direction, and how long it may take."""


def offer_counts(program: Program, edits: Sequence[PlannedEdit], stock: Stock) -> str:
    """Counts near the planned ones that the stock class holds, as a sentence; empty where there
    are none to offer.

    Args:
        program: before the first pass, on the meta device.
        edits: planned on it; those whose counts scores decide are not varied.
        stock: see ``make_plan``.
    """
    trial = _Trial(program, edits, stock)
    if not trial.kept:
        return ""
    offers = []
    for family in trial.kept:
        if family in WHOLE:
            offers += trial.find_neighbours(family)
    if "hidden" in trial.units:
        offers += trial.find_hidden()
    if not offers:
        return ""
    return f"Near it the class takes {', or '.join(dict.fromkeys(offers))}."


class _Trial:
    """The first layers of a program, cut to counts by family.

    units, kept: units of each family, and how many the plan keeps; families with one size alone.
    """

    def __init__(self, program: Program, edits: Sequence[PlannedEdit], stock: Stock) -> None:
        self.stock = stock
        self.ends = time.monotonic() + PATIENCE_SECONDS
        self.short = first_layers(program)
        self.groups = [group for group in coupled_groups(self.short) if group.locked is None]
        self.units = _single_sizes((group.family, group.units) for group in self.groups)
        exact = [edit for edit in edits if edit.exact and edit.family in self.units]
        planned = _single_sizes((edit.family, edit.kept) for edit in exact)
        self.kept = {
            family: count for family, count in planned.items() if count < self.units[family]
        }

    def takes(self, counts: Counts) -> bool:
        """Whether the class holds these counts, and computes the same with them."""
        if time.monotonic() > self.ends:
            return False
        edit: dict[CoupledGroup | str, torch.Tensor] = {}
        for group in self.groups:
            count = counts.get(group.family, group.units)
            if count < group.units:
                edit[group.name] = torch.arange(count)
        try:
            plan = self.stock(keep(self.short, edit) if edit else self.short)
        except SecateurError:
            return False
        return plan is None or not plan.constants

    def find_neighbours(self, family: str) -> list[str]:
        """The nearest counts of a family below and above the planned one."""
        units = self.units[family]
        planned = self.kept[family]
        offers = []
        below = range(planned - 1, max(0, planned - 1 - TRIES), -1)
        for candidates in (below, [*range(planned + 1, min(units, planned + TRIES)), units]):
            for count in candidates:
                if self.takes({**self.kept, family: count}):
                    all_of_them = " (all of them)" if count == units else ""
                    offers.append(f"{family}={count}{all_of_them}")
                    break
        return offers

    def find_hidden(self) -> list[str]:
        """The planned counts with a hidden size that the heads divide."""
        multiple = heads_multiple(
            self.groups,
            {
                group.name: PlannedEdit(
                    group.name,
                    group.family,
                    group.units,
                    self.kept.get(group.family, group.units),
                )
                for group in self.groups
            },
        )
        planned = self.kept.get("hidden", self.units["hidden"])
        offers = []
        below = planned - planned % multiple
        for count in sorted((below, below + multiple), key=lambda size: abs(size - planned)):
            fits = 0 < count <= self.units["hidden"] and count != planned
            if fits and self.takes({**self.kept, "hidden": count}):
                beside = " with the other counts as they are" if len(self.kept) > 1 else ""
                offers.append(f"hidden={count}{beside} (round_to={{hidden=heads}} gives such)")
                break
        return offers


def first_layers(program: Program, layers: int = LAYERS) -> Program:
    """A program with its first layers alone, or the whole one where layers cannot go.

    Args:
        program: on the meta device.
        layers: how many stay.
    """
    names = [block.name for block in blocks(program)]
    locked = any(block.locked for block in blocks(program))
    if len(names) <= layers or locked:
        return program
    try:
        return drop(program, names[layers:]).replace(cut=None)
    except SecateurError:
        return program


def _single_sizes(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Sizes by family, of the families in which there is one alone."""
    sizes = dict[str, set[int]]()
    for family, size in pairs:
        sizes.setdefault(family, set()).add(size)
    return {family: next(iter(found)) for family, found in sizes.items() if len(found) == 1}
