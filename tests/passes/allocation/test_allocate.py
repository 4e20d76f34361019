"""Sizes under a shared budget: the levels, the choice, the evolution, and a run that goes on after
a kill."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.graph import Program, coupled_groups, keep, verify, with_parameters
from secateur.graph.errors import EditError
from secateur.passes import Context, PruneWidth, Score, samples
from secateur.passes.calibration.kl import kl
from secateur.passes.importance import Fisher, Random, Wanda
from secateur.passes.solvers.knapsack import SizeOption
from secateur.passes.storage.journal import Journal
from secateur.passes.width.allocate import Allocate
from secateur.passes.width.costs import KINDS, cost_of, sizes_of
from secateur.passes.width.evolve import mutate_mixture
from secateur.passes.width.supernet import Judge, Supernet

DATA = torch.randint(0, 128, (6, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def scored(llama: Program) -> Program:
    return Score(Wanda())(llama, context_of(llama))


def context_of(program: Program, **changes: Any) -> Context:
    return replace(Context(data=samples([DATA], program)), **changes)


def supernet_of(program: Program, *families: str) -> Supernet:
    groups = [g for g in coupled_groups(program) if g.family in families and g.locked is None]
    found = Supernet(program, groups, {g.name: sizes_of(g.units, 4, 1, 1) for g in groups})
    found.make_levels(context_of(program), Journal(None))
    return found


@pytest.mark.parametrize("family", ["mlp", "kv_heads"])
def test_a_mixture_is_the_pruned_and_refitted_program(scored: Program, family: str) -> None:
    supernet = supernet_of(scored, family)
    names = list(supernet.levels)
    mixture = {names[0]: 1, names[1]: len(supernet.levels[names[1]]) - 1}
    kept = {name: supernet.levels[name][at].kept for name, at in mixture.items()}
    columns = {
        p: v for name, at in mixture.items() for p, v in supernet.levels[name][at].columns.items()
    }
    pruned = with_parameters(keep(scored, dict(kept)), columns)
    data = context_of(scored).data or ()
    judge = Judge(supernet, data, Context())
    assert judge.measure_kl(mixture).mean == pytest.approx(kl(scored, pruned, data).mean, abs=1e-4)
    judge.advance_to(names[0])
    assert judge.measure_kl(mixture).mean == pytest.approx(kl(scored, pruned, data).mean, abs=1e-4)
    assert judge.measure_kl(mixture).mean > 1e-3 > judge.measure_kl({}).mean


def test_a_refit_leaves_less_error_than_the_columns_as_they_were(scored: Program) -> None:
    supernet = supernet_of(scored, "mlp")
    for levels in supernet.levels.values():
        errors = [level.error for level in levels]
        assert errors == sorted(errors) and errors[0] == 0 < errors[1]
    name, found = next(iter(supernet.consumers.items()))
    level, weight = supernet.levels[name][2], scored.gm.get_parameter(found[0].parameter)
    assert not torch.allclose(level.columns[found[0].parameter], weight[:, level.kept])


def test_scores_that_compare_are_a_global_ranking(llama: Program) -> None:
    scored = Score(Fisher())(llama, context_of(llama))
    chosen = Allocate(ratio=0.5, damage="scores", levels=96, least=0.0)(scored)
    ranked = PruneWidth(mlp=0.5, uniform=False, normalize="none")(scored)
    sizes = [
        {g.name: g.units for g in coupled_groups(p) if g.family == "mlp"} for p in (chosen, ranked)
    ]
    assert sizes[0] == sizes[1] and len(set(sizes[0].values())) > 1


@pytest.mark.parametrize("damage", ["error", "kl"])
def test_the_budget_is_kept_and_layers_differ(scored: Program, damage: Any) -> None:
    pruned = Allocate(ratio=0.4, families=("mlp", "kv_heads"), damage=damage, levels=6)(
        scored, context_of(scored)
    )
    verify(pruned)
    figures = pruned.history[-1].figures
    whole = sum(
        cost_of("parameters", scored, g)(g.units)
        for g in Allocate(families=("mlp", "kv_heads")).free_groups(scored)
    )
    assert scored.num_parameters - pruned.num_parameters == pytest.approx(whole - figures["cost"])
    assert 0.3 * whole < figures["cost"] <= 0.6 * whole
    assert len(set(figures["kept"].values())) > 1


def test_evolution_never_ends_worse_than_it_began(scored: Program) -> None:
    one = Allocate(ratio=0.5, damage="error", levels=5, generations=4, children=4, tokens=48)
    curve = one(scored, context_of(scored)).history[-1].figures["evolution"]
    assert len(curve) == 5 and curve == sorted(curve, reverse=True)


def test_a_killed_run_goes_on_and_ends_the_same(scored: Program, tmp_path: Path) -> None:
    one = Allocate(ratio=0.5, damage="kl", levels=4, generations=2, children=3, tokens=32)
    whole = one(scored, context_of(scored))
    steps = 0

    def dies(items: Any, description: str, total: int | None = None) -> Any:
        nonlocal steps
        for item in items:
            steps += 1
            if steps == 9:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        one(scored, context_of(scored, resume=tmp_path, progress=dies))
    assert any(name.startswith("levels") for name in Journal(tmp_path).names())
    resumed = one(scored, context_of(scored, resume=tmp_path))
    assert resumed.history[-1].figures["kept"] == whole.history[-1].figures["kept"]
    assert resumed.history[-1].figures["evolution"] == whole.history[-1].figures["evolution"]
    assert all(
        torch.equal(a, b)
        for (_, a), (_, b) in zip(*map(Program.named_parameters, (resumed, whole)), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_costs_grow_with_the_units(llama: Program, kind: Any) -> None:
    group = next(g for g in coupled_groups(llama) if g.family == "mlp")
    cost = cost_of(kind, llama, group)
    assert cost(group.units) > 0 and (
        kind == "latency" or cost(group.units // 2) * 2 == cost(group.units)
    )
    if kind == "parameters":
        assert cost(group.units) == 3 * 64 * 96


def test_a_mutation_stays_within_the_budget() -> None:
    menu = {name: [SizeOption(8 - i, 8.0 - i, 0) for i in range(7)] for name in "abcde"}
    parent = dict.fromkeys(menu, 3)
    draw, children = random.Random(0), []
    for _ in range(50):
        children.append(mutate_mixture(parent, menu, 25.0, draw))
        assert sum(menu[name][at].cost for name, at in children[-1].items()) <= 25.0
    assert len({tuple(child.values()) for child in children}) > 10


def test_refusals(scored: Program, program_of: Callable[[str], Program]) -> None:
    with pytest.raises(EditError, match="no group of family 'experts'"):
        Allocate(families=("experts",), damage="scores")(scored)
    with pytest.raises(EditError, match=r"hidden.* runs through the whole network"):
        Allocate(families=("hidden",), damage="error")(Score(Random())(scored), context_of(scored))
