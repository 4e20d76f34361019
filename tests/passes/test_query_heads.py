"""Query heads ranked under each key/value head: scores, kept heads, folding, repair, what is
stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo.models import tiny_model

from secateur.graph import CoupledGroup, Program, capture, coupled_groups
from secateur.passes import Context, Pipeline, PruneWidth, Repair, Score, samples
from secateur.passes.importance import Activation, Magnitude, Obs, Perplexity, Random, Taylor, Wanda
from secateur.passes.importance.base import Importance
from secateur.passes.width.allocate import Allocate
from secateur.passes.width.fill_widths import FillWidths
from secateur.passes.width.fold_heads import fold_pairs
from secateur.passes.width.shares import global_counts, top_units, unit_values
from secateur.runtime.resume.fingerprint import hash_parameters
from secateur.runtime.resume.state import rebuild_program, state_of

HEADS, GROUPS, WIDTH = 48, 8, 4


@pytest.fixture(scope="module")
def nemotron() -> Program:
    """48 query heads over 8 key/value heads, as Nemotron-4 15B has."""
    shape = {
        "hidden_size": 96,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": WIDTH,
    }
    return capture(tiny_model("llama", **shape))


@pytest.fixture(scope="module")
def text(nemotron: Program) -> Context:
    ids = torch.randint(0, 11, (4, 12), generator=torch.Generator().manual_seed(7))
    return Context(data=samples([ids], nemotron))


def run(steps: str, program: Program, context: Context) -> Program:
    for step in Pipeline.parse(steps).passes:
        program = step(program, context)
    return program


def queries(program: Program) -> list[CoupledGroup]:
    return [group for group in coupled_groups(program) if group.family == "query_heads"]


def head_scores(program: Program, context: Context, layer: int) -> Tensor:
    """[48]: Minitron's score of each head, from what its output projection reads."""
    model, seen = program.source.model, list[Tensor]()
    hook = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(  # type: ignore[union-attr, index]
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        for sample in context.data or ():
            model(**sample.inputs)
    hook.remove()
    norms = (
        torch.cat(seen).unflatten(-1, (HEADS, WIDTH)).norm(dim=-1)
    )  # [sequences, positions, heads]
    return norms.mean(1).square().sum(0).sqrt()


def test_half_of_the_heads_by_rank_inside_each_group(nemotron: Program, text: Context) -> None:
    smaller = run("score{metric=activation},prune-width{query_heads=3}", nemotron, text)
    assert smaller.cut is not None
    for layer, group in enumerate(queries(nemotron)):
        by_group = head_scores(nemotron, text, layer).view(GROUPS, HEADS // GROUPS)
        expected = by_group.topk(3, dim=1).indices.sort(1).values
        assert torch.equal(smaller.cut.kept[group.name].T, expected)
        q_proj = dict(smaller.named_parameters())[f"model.layers.{layer}.self_attn.q_proj.weight"]
        assert q_proj.shape[0] == 24 * WIDTH


METRICS: list[Importance] = [Magnitude(), Random(), Taylor(), Activation(), Wanda(), Obs()]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_scores_by_head(nemotron: Program, text: Context, metric: Importance) -> None:
    scored = Score(metric)(nemotron, text)
    by_position = Score(metric, query_heads="position")(nemotron, text)
    group = queries(nemotron)[0]
    assert scored.scores[group.name].shape == (6, GROUPS)
    assert by_position.scores[group.name].shape == (6,)
    if isinstance(metric, Magnitude | Wanda):  # sums over channels: nothing is lost between the two
        torch.testing.assert_close(scored.scores[group.name].sum(1), by_position.scores[group.name])


def test_what_is_measured_by_cutting_is_by_position(nemotron: Program, text: Context) -> None:
    scored = Score(Perplexity(sequences=1, families=("query_heads",)))(nemotron, text)
    assert {score.shape for score in scored.scores.values()} == {(6,)}


def test_the_old_choice_is_there_by_name(nemotron: Program, text: Context) -> None:
    steps = "score{metric=wanda,query_heads=position},prune-width{query_heads=3}"
    smaller = run(steps, nemotron, text)
    assert smaller.cut is not None
    assert all(smaller.cut.kept[group.name].shape == (3,) for group in queries(nemotron))


def test_heads_fold_into_heads_of_their_own_group(nemotron: Program) -> None:
    group = queries(nemotron)[0]
    scores = torch.rand(6, GROUPS, generator=torch.Generator().manual_seed(1))
    scored = nemotron.replace(scores={group.name: scores})
    options = {"groups": {group.name: 4}, "uniform": False}
    folded = PruneWidth(**options, fold_heads=True)(scored)  # type: ignore[arg-type]
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (
        dict(program.named_parameters())[name].detach() for program in (nemotron, folded)
    )
    heads = before.view(GROUPS, 6, WIDTH, -1).clone()
    for column in range(GROUPS):
        for stays, goes in fold_pairs(scores[:, column], 4):
            heads[column, stays] = 2 * heads[column, stays] - heads[column, goes]
    kept = top_units(scores, 4)
    expected = torch.stack([heads[column, kept[:, column]] for column in range(GROUPS)])
    torch.testing.assert_close(after.view(GROUPS, 4, WIDTH, -1), expected)


def test_repair_compares_with_the_right_heads(nemotron: Program, text: Context) -> None:
    """Rows of the pruned weights are those of the dense ones, and the refit makes the stream
    better."""
    smaller = run("score{metric=wanda},prune-width{query_heads=3}", nemotron, text)
    repaired = Repair()(smaller, text)
    errors = [figures["error"] for figures in repaired.history[-1].figures["consumers"].values()]
    assert len(errors) == 2
    assert max(errors) < 1


def test_sizes_under_a_budget_and_widened_again(nemotron: Program, text: Context) -> None:
    scored = Score(Wanda())(nemotron, text)
    for damage in ("scores", "error"):
        smaller = Allocate(ratio=0.4, families=("query_heads",), damage=damage, levels=6)(
            scored, text
        )  # type: ignore[arg-type]
        assert smaller.cut is not None
        kept = smaller.cut.kept
        for group in (group for group in queries(nemotron) if group.name in kept):
            assert torch.equal(
                kept[group.name], top_units(scored.scores[group.name], len(kept[group.name]))
            )
    one = queries(nemotron)[0].name
    narrow = PruneWidth(groups={one: 3}, uniform=False)(scored)
    wide = FillWidths()(
        PruneWidth(groups={queries(narrow)[1].name: 5}, uniform=False)(Score(Wanda())(narrow, text))
    )
    assert {group.units for group in queries(wide)} == {5}


def test_a_killed_run_builds_it_again(nemotron: Program, text: Context) -> None:
    smaller = run(
        "score{metric=random},prune-width{query_heads=3},score{metric=random}", nemotron, text
    )
    again = rebuild_program(nemotron, state_of(smaller, hash_parameters(nemotron)))
    assert smaller.cut is not None and again.cut is not None
    for name, kept in smaller.cut.kept.items():
        assert torch.equal(again.cut.kept[name], kept)
    for name, score in smaller.scores.items():
        assert torch.equal(again.scores[name], score)


def test_rankings_of_their_own() -> None:
    scores = torch.tensor([[3.0, 1.0], [2.0, 5.0], [1.0, 4.0]])
    assert top_units(scores, 2).tolist() == [[0, 1], [1, 2]]
    assert unit_values(scores).tolist() == [8.0, 6.0, 2.0]
    assert unit_values(scores[:, 0]).tolist() == [3.0, 2.0, 1.0]
    other = torch.tensor([7.0, 7.0, 0.0])
    assert global_counts({"a": scores, "b": other}, 4, 1, "none") == {"a": 2, "b": 2}
