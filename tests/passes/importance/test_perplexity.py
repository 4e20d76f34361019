"""Perplexity drop against running each pruned model whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secateur.graph import CoupledGroup, Program, coupled_groups, keep
from secateur.passes import Context, Pipeline, PruneWidth, Sample, Score, samples
from secateur.passes.calibration.kl import kl, next_token_losses
from secateur.passes.importance import Perplexity
from secateur.passes.importance.perplexity import find_affected_nodes, first_moved

ByKind = Callable[[str], Program]


def by_hand(
    program: Program, group: CoupledGroup, data: tuple[Sample, ...], measure: str
) -> list[float]:
    def loss(one: Program) -> float:
        return float(torch.cat([next_token_losses(one, sample) for sample in data]).double().mean())

    smaller = [
        keep(program, {group: [u for u in range(group.units) if u != unit]})
        for unit in range(group.units)
    ]
    if measure == "kl":
        return [kl(program, one, data).mean for one in smaller]
    return [loss(one) - loss(program) for one in smaller]


@pytest.mark.parametrize(
    ("kind", "measure"), [("llama", "kl"), ("gpt2", "loss"), ("mixtral", "loss")]
)
def test_it_is_what_the_pruned_model_loses(
    kind: str, measure: str, program_of: ByKind, ids: Tensor
) -> None:
    program = program_of(kind)
    data = samples([ids[:3]], program)
    scored = Score(Perplexity(measure=measure, sequences=2))(program, Context(data=data))  # type: ignore[arg-type]
    groups = [g for g in coupled_groups(program) if g.name in scored.scores]
    assert {g.family for g in groups} >= {"kv_heads"} and {g.family for g in groups} <= set(
        Perplexity().families
    )
    for group in groups:
        expected = by_hand(program, group, data[:2], measure)
        assert scored.scores[group.name].tolist() == pytest.approx(expected, rel=2e-2, abs=2e-6)
    unscored = scored.history[-1].figures["unscored"]
    assert {
        g.name for g in coupled_groups(program) if g.family == "mlp" and g.locked is None
    } <= set(unscored)


def test_only_what_stands_behind_the_unit_is_run_again(llama: Program) -> None:
    group = next(g for g in coupled_groups(llama) if g.family == "kv_heads" and ".1." in g.name)
    smaller = keep(llama, {group: [0]})
    start, moved = first_moved(llama, smaller), find_affected_nodes(llama, smaller)
    ops = [node.name for node in llama.gm.graph.nodes if node.op != "get_attr"]
    assert ops.index(start) > 0.45 * len(ops) and not set(ops[: ops.index(start)]) & moved
    assert find_affected_nodes(llama, keep(llama, {})) == set()


def test_batches_change_nothing_and_others_are_left_out(llama: Program, ids: Tensor) -> None:
    found = [
        Score(Perplexity(families=("kv_heads",), sequences=None))(
            llama, Context(data=samples(data, llama))
        ).scores
        for data in ([ids], ids.split(2))
    ]
    assert set(found[0]) == {g.name for g in coupled_groups(llama) if g.family == "kv_heads"}
    assert all(found[0][name].equal(found[1][name]) for name in found[0])
    assert (
        PruneWidth(kv_heads=1)(llama.replace(scores=found[0])).num_parameters < llama.num_parameters
    )


def test_it_is_named_in_a_pipeline() -> None:
    (score,) = Pipeline.parse(
        "score{metric=perplexity{measure=kl,families=[experts],sequences=null}}"
    ).passes
    assert score == Score(Perplexity("kl", ("experts",), None)) and score.cost.flops > 3
