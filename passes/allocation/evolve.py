"""Evolution of a mixture of sizes within a budget, by the KL of the whole model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from secateur.passes.allocation.solve import Size
from secateur.passes.allocation.supernet import Judge
from secateur.passes.base import Context
from secateur.passes.journal import Journal

Mixture = dict[str, int]
SURVIVORS = 2  # children that are measured on all sequences
TRIES = 200


def evolve(
    start: Mapping[str, int],
    menu: Mapping[str, Sequence[Size]],
    budget: float,
    judge: Judge,
    context: Context,
    journal: Journal,
    *,
    generations: int,
    children: int,
) -> tuple[Mixture, list[float]]:
    """Better mixtures, generation after generation: one parent, children by level switches, the best one stays.

    A child moves a few groups one size up and others down, within the budget.  All children are measured on the first
    quarter of the judge's sequences, the two best of them and the parent on all.
    Returns: the last parent, and the KL of the parent after each generation (the first: of ``start``).
    Source: Sieberling et al. 2024 (EvoPress), arXiv:2410.14649, algorithm 1; Li et al. 2025 (Týr), arXiv:2503.09657.
    """
    parent, curve = dict(start), list[float]()
    few = max(1, len(judge.samples) // 4)
    for generation in context.progress(range(generations + 1), "evolution", generations + 1):
        kept = journal.read(f"generation {generation}")
        if kept is not None:
            parent, curve = kept.facts["parent"], kept.facts["curve"]
            continue
        if generation == 0:
            curve.append(judge.kl(parent).mean)
        else:
            draw = random.Random(f"{context.seed} {generation}")
            born = _distinct(parent, menu, budget, draw, children)
            best = sorted(born, key=lambda child: judge.kl(child, few).mean)[:SURVIVORS]
            measured = [(judge.kl(child).mean, child) for child in best]
            value, child = min(measured, key=lambda pair: pair[0], default=(curve[-1], parent))
            parent, curve = (child, [*curve, value]) if value < curve[-1] else (parent, [*curve, curve[-1]])
        journal.write(f"generation {generation}", facts={"parent": parent, "curve": curve})
    return parent, curve


def _distinct(
    parent: Mixture, menu: Mapping[str, Sequence[Size]], budget: float, draw: random.Random, count: int
) -> list[Mixture]:
    """Up to ``count`` different children."""
    born: dict[tuple[int, ...], Mixture] = {tuple(parent.values()): parent}
    for _ in range(TRIES):
        if len(born) > count:
            break
        child = mutate(parent, menu, budget, draw)
        born.setdefault(tuple(child.values()), child)
    return list(born.values())[1:]


def mutate(
    parent: Mapping[str, int], menu: Mapping[str, Sequence[Size]], budget: float, draw: random.Random
) -> Mixture:
    """The parent with one to three groups grown by a level and others shrunk until the budget holds again.

    Sizes of a group descend: index 0 is the whole group.
    """
    child, names = dict(parent), list(parent)
    grown = [name for name in draw.sample(names, min(len(names), draw.randint(1, 3))) if child[name] > 0]
    for name in grown:
        child[name] -= 1
    while sum(menu[name][index].cost for name, index in child.items()) > budget * (1 + 1e-12):
        smaller = [name for name in names if name not in grown and child[name] + 1 < len(menu[name])]
        if not smaller:
            return dict(parent)
        child[draw.choice(smaller)] += 1
    return child
