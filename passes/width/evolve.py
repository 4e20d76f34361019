"""Evolution of a mixture of sizes within a budget, by the KL of the whole model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from secateur.passes.base import Context
from secateur.passes.solvers.knapsack import SizeOption
from secateur.passes.storage.journal import Journal
from secateur.passes.width.supernet import Judge

Mixture = dict[str, int]
SURVIVORS = 2  # children that are measured on all sequences
TRIES = 200


def evolve_mixture(
    start: Mapping[str, int],
    menu: Mapping[str, Sequence[SizeOption]],
    budget: float,
    judge: Judge,
    context: Context,
    journal: Journal,
    *,
    generations: int,
    children: int,
) -> tuple[Mixture, list[float]]:
    """Better mixtures, generation after generation: one parent, children by level switches, the
    best one stays.

    A child moves a few groups one size up and others down, within the budget.  All children are
    measured on the first quarter of the judge's sequences, the two best of them and the parent on
    all.

    Args:
        start: index of a level by group name.
        menu: sizes with cost and damage by group name.
        budget: in the unit of the costs.
        judge: measures the KL of a mixture.
        context: its seed draws the children.
        journal: where finished generations are kept.
        generations: number of rounds after the first measurement.
        children: of each generation.

    Returns:
        the last parent, and the KL of the parent after each generation (the first: of ``start``).

    Source:
        Sieberling et al. 2024 (EvoPress), arXiv:2410.14649, algorithm 1; Li et al. 2025 (Týr),
        arXiv:2503.09657.
    """
    parent = dict(start)
    curve = list[float]()
    few = max(1, len(judge.samples) // 4)
    for generation in context.progress(range(generations + 1), "evolution", generations + 1):
        entry = journal.read(f"generation {generation}")
        if entry is not None:
            parent = entry.facts["parent"]
            curve = entry.facts["curve"]
            continue
        if generation == 0:
            curve.append(judge.measure_kl(parent).mean)
        else:
            draw = random.Random(f"{context.seed} {generation}")
            born = _distinct_children(parent, menu, budget, draw, children)
            best = sorted(born, key=lambda child: judge.measure_kl(child, few).mean)[:SURVIVORS]
            measured = [(judge.measure_kl(child).mean, child) for child in best]
            value, child = min(measured, key=lambda pair: pair[0], default=(curve[-1], parent))
            if value < curve[-1]:
                parent = child
                curve = [*curve, value]
            else:
                curve = [*curve, curve[-1]]
        journal.write(f"generation {generation}", facts={"parent": parent, "curve": curve})
    return parent, curve


def _distinct_children(
    parent: Mixture,
    menu: Mapping[str, Sequence[SizeOption]],
    budget: float,
    draw: random.Random,
    count: int,
) -> list[Mixture]:
    """Up to ``count`` different children."""
    born: dict[tuple[int, ...], Mixture] = {tuple(parent.values()): parent}
    for _ in range(TRIES):
        if len(born) > count:
            break
        child = mutate_mixture(parent, menu, budget, draw)
        born.setdefault(tuple(child.values()), child)
    return list(born.values())[1:]


def mutate_mixture(
    parent: Mapping[str, int],
    menu: Mapping[str, Sequence[SizeOption]],
    budget: float,
    draw: random.Random,
) -> Mixture:
    """The parent with one to three groups grown by a level and others shrunk until the budget holds
    again.

    Sizes of a group descend: index 0 is the whole group.

    Args:
        parent: index of a level by group name.
        menu: sizes with cost by group name.
        budget: in the unit of the costs.
        draw: source of randomness.

    Returns:
        the child, or a copy of the parent where nothing can shrink.
    """
    child = dict(parent)
    names = list(parent)
    grown = []
    for name in draw.sample(names, min(len(names), draw.randint(1, 3))):
        if child[name] > 0:
            grown.append(name)
    for name in grown:
        child[name] -= 1
    while sum(menu[name][index].cost for name, index in child.items()) > budget * (1 + 1e-12):
        smaller = []
        for name in names:
            if name not in grown and child[name] + 1 < len(menu[name]):
                smaller.append(name)
        if not smaller:
            return dict(parent)
        child[draw.choice(smaller)] += 1
    return child
