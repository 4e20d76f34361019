"""Width pruning: which groups, how many units, which units; and every refusal."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.models import NanoGPT, perturb, tiny_model

from secateur.graph import Program, capture, coupled_groups, keep, masked_call
from secateur.graph.errors import EditError
from secateur.passes import Context, Pipeline, PruneWidth, Score
from secateur.passes.importance import Random
from secateur.passes.language.options import OptionError
from secateur.passes.width.shares import unit_cost
from secateur.runtime import plan_config

EIGHT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}


@pytest.fixture(scope="module")
def scored(llama: Program) -> Program:
    return Score(Random())(llama, Context(seed=1))


def planned(program: Program, **options: Any) -> dict[str, tuple[int, int]]:
    return {edit.group: (edit.units, edit.kept) for edit in PruneWidth(**options).plan(program)}


def widths(program: Program) -> dict[str, int]:
    return {group.name: group.units for group in coupled_groups(program)}


def test_a_ratio_applies_to_the_families(llama: Program) -> None:
    mlp = {f"mlp@model.layers.{i}.mlp": (96, 72) for i in range(2)}
    assert planned(llama, ratio=0.25) == mlp
    heads = {f"kv_heads@model.layers.{i}.self_attn": (2, 1) for i in range(2)}
    assert planned(llama, ratio=0.5, families=("kv_heads",)) == heads
    both = planned(llama, ratio=0.25, families=("mlp", "hidden"), hidden=48)
    assert both == {**mlp, "hidden": (64, 48)}


def test_amounts_and_multiples(llama: Program) -> None:
    assert planned(llama, mlp=40)["mlp@model.layers.0.mlp"] == (96, 40)
    assert planned(llama, mlp=0.5, round_to=32)["mlp@model.layers.0.mlp"] == (96, 64)
    assert planned(llama, mlp=0.5, hidden=0.3, round_to={"hidden": 16})["hidden"] == (64, 48)
    assert planned(llama, kv_heads=0.5, round_to=32)["kv_heads@model.layers.0.self_attn"] == (2, 1)


def test_the_best_units_stay(scored: Program) -> None:
    name = "mlp@model.layers.1.mlp"
    smaller = PruneWidth(mlp=10)(scored)
    best = scored.scores[name].topk(10).indices.sort().values
    old, new = (
        dict(p.named_parameters())["model.layers.1.mlp.down_proj.weight"] for p in (scored, smaller)
    )
    assert new.equal(old[:, best])
    assert smaller.history[-1].figures["families"]["mlp"] == {
        "groups": 2,
        "units": 192,
        "kept": 20,
        "smallest": 10,
        "largest": 10,
    }


def test_several_families_at_once_compute_what_the_full_graph_does_without_the_units(
    scored: Program, ids: Tensor
) -> None:
    pruning = PruneWidth(mlp=0.25, kv_heads=1, query_heads=1, hidden=0.25)
    smaller = pruning(scored)
    edit = {
        e.group: scored.scores[e.group].topk(e.kept, dim=0).indices.sort(0).values
        for e in pruning.plan(scored)
    }
    expected = masked_call(scored, edit, input_ids=ids).logits
    torch.testing.assert_close(smaller(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    shapes = {name: list(p.shape) for name, p in smaller.named_parameters()}
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == [48, 16]
    assert shapes["model.layers.0.mlp.down_proj.weight"] == [48, 72]


def test_preview_has_the_shapes_of_the_result(scored: Program) -> None:
    pruning = PruneWidth(mlp=0.25, kv_heads=1, hidden=0.25)
    shapes = [
        {n: p.shape for n, p in q.named_parameters()}
        for q in (pruning.preview(scored), pruning(scored))
    ]
    assert shapes[0] == shapes[1]


def test_nothing_to_cut_is_no_change(scored: Program) -> None:
    same = PruneWidth(mlp=0.0)(scored)
    assert same.gm is scored.gm
    assert same.num_parameters == scored.num_parameters


def test_layers_to_leave_alone(scored: Program) -> None:
    smaller = PruneWidth(mlp=0.5, skip=(-1,), uniform=False, ranking="local")(scored)
    assert widths(smaller)["mlp@model.layers.0.mlp"] == 48
    assert widths(smaller)["mlp@model.layers.1.mlp"] == 96


def test_global_ranking_lets_layers_differ(llama: Program) -> None:
    names = [f"mlp@model.layers.{i}.mlp" for i in range(2)]
    ramp = torch.arange(96.0)
    scored = llama.replace(scores={names[0]: ramp, names[1]: ramp * 2})
    smaller = PruneWidth(mlp=0.5, uniform=False, normalize="none")(scored)
    assert [widths(smaller)[name] for name in names] == [32, 64]
    rounded = PruneWidth(mlp=0.5, uniform=False, normalize="none", round_to=24)(scored)
    assert [widths(rounded)[name] for name in names] == [24, 72]
    assert [edit.exact for edit in PruneWidth(mlp=0.5, uniform=False).plan(scored)] == [
        False,
        False,
    ]


def test_all_families_in_one_ranking_lose_the_parameters_asked_for(llama: Program) -> None:
    groups = {g.name: g for g in coupled_groups(llama) if g.family in ("mlp", "kv_heads")}
    worth = {
        "mlp": 1.0,
        "kv_heads": 2.0,
    }  # heads matter more than any neuron: all that goes are neurons
    scores = {n: worth[g.family] + torch.rand(g.units) * 0.1 for n, g in groups.items()}
    pruning = PruneWidth(
        ratio=0.5, families=("mlp", "kv_heads"), uniform=False, ranking="global", normalize="none"
    )
    smaller = pruning(llama.replace(scores=scores))
    found = widths(smaller)
    assert all(found[n] == g.units for n, g in groups.items() if g.family == "kv_heads")
    shapes = {n: p.shape for n, p in llama.named_parameters()}
    half = sum(unit_cost(g, shapes) * g.units // 2 for g in groups.values())
    neuron = next(unit_cost(g, shapes) for g in groups.values() if g.family == "mlp")
    assert neuron == 3 * 64 and abs(llama.num_parameters - smaller.num_parameters - half) < neuron
    by_family = PruneWidth(ratio=0.5, families=("mlp", "kv_heads"), uniform=False)(
        llama.replace(scores=scores)
    )
    heads = [
        p.shape[0] for name, p in by_family.named_parameters() if name.endswith("k_proj.weight")
    ]
    assert heads == [16, 16]


def test_single_groups_by_name(scored: Program) -> None:
    name = "mlp@model.layers.1.mlp"
    smaller = Pipeline.parse("prune-width{groups={mlp@model.layers.1.mlp=0.5},uniform=false}").run(
        scored
    )
    assert widths(smaller)[name] == 48
    with pytest.raises(EditError, match="would differ"):
        PruneWidth(groups={name: 0.5}).plan(scored)
    assert planned(scored, groups={"hidden": 48}) == {"hidden": (64, 48)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing is asked for"),
        ({"ratio": 1.0}, "less than 1"),
        ({"ratio": -0.1}, "greater than or equal to 0"),
        ({"mlp": 1.0}, "below 1; for a number of units kept"),
        ({"mlp": 0}, "keeps no unit"),
        ({"mlp": True}, "found True"),
        ({"ratio": 0.1, "families": ("mpl",)}, "did you mean 'mlp'"),
        ({"ratio": 0.1, "round_to": 0}, "greater than or equal to 1"),
        ({"mlp": 0.1, "skip": (0,)}, "add uniform=false"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        PruneWidth(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"experts": 0.25}, "no group of family 'experts'; it has: .*hidden.*mlp"),
        (
            {"vocabulary": 0.1},
            "every group of family 'vocabulary' is locked: its rows are looked up",
        ),
        (
            {"groups": {"vocabulary@model.embed_tokens": 0.1}},
            "must not be pruned: its rows are looked up",
        ),
        ({"groups": {"mlp@model.layers.1": 0.1}}, "did you mean 'mlp@model.layers.1.mlp'"),
        ({"mlp": 0.999}, "would be empty"),
        ({"mlp": 200}, "fewer than the 200"),
        (
            {"mlp": 0.1, "skip": (2,), "uniform": False},
            "skip names layer 2, but the model has layers 0..1",
        ),
    ],
)
def test_edits_that_cannot_be(llama: Program, options: dict[str, Any], says: str) -> None:
    with pytest.raises(EditError, match=says):
        PruneWidth(**options).plan(llama)


def test_a_router_keeps_as_many_experts_as_it_chooses(program_of: Callable[[str], Program]) -> None:
    program = program_of("mixtral")
    assert set(planned(program, experts=0.25).values()) == {(4, 3)}
    with pytest.raises(EditError, match="at least 2"):
        PruneWidth(experts=1).plan(program)


def test_a_metric_that_cannot_see_a_group_is_said(scored: Program) -> None:
    some = {name: score for name, score in scored.scores.items() if name != "hidden"}
    with pytest.raises(EditError, match="hidden has no scores"):
        PruneWidth(hidden=0.5)(scored.replace(scores=some))


def test_locked_groups_of_a_family_are_left_alone_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = capture(perturb(NanoGPT()), {"ids": torch.zeros(2, 7, dtype=torch.int64)})
    locked = [group for group in coupled_groups(program) if group.locked]
    assert locked
    scored = Score(Random())(program)
    with (
        caplog.at_level(logging.INFO, "secateur.passes"),
        pytest.raises(EditError, match="is locked"),
    ):
        PruneWidth(ratio=0.5, families=(locked[0].family,))(scored)
    assert locked[0].name in caplog.text


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "t5", "vit", "phi3"])
def test_architectures_by_family_alone(kind: str, program_of: Callable[[str], Program]) -> None:
    program = Score(Random())(program_of(kind))
    inputs = {n: v for n, v in program.source.example_inputs.items() if isinstance(v, Tensor)}
    smaller = PruneWidth(ratio=0.25, families=("mlp", "hidden"))(program)
    pruned = {name: (widths(program)[name], units) for name, units in widths(smaller).items()}
    for name, (before, after) in pruned.items():
        if name.startswith(("mlp", "hidden")):
            assert after == kept(before), name
    assert smaller(**inputs).logits.isfinite().all()


def kept(units: int) -> int:
    return int(0.75 * units + 0.5)


def test_the_edit_is_what_keep_does(scored: Program, ids: Tensor) -> None:
    names = ["mlp@model.layers.0.mlp", "mlp@model.layers.1.mlp"]
    by_hand = keep(
        scored, {name: scored.scores[name].topk(48).indices.sort().values for name in names}
    )
    assert PruneWidth(mlp=0.5)(scored)(input_ids=ids).logits.equal(by_hand(input_ids=ids).logits)


def test_heads_are_kv_heads_or_query_heads_where_one_is_shared(llama: Program) -> None:
    heads = {f"kv_heads@model.layers.{i}.self_attn": (2, 1) for i in range(2)}
    assert planned(llama, heads=0.5) == heads
    shared = capture(tiny_model("llama", num_key_value_heads=1))
    assert planned(shared, heads=0.2) == {
        f"query_heads@model.layers.{i}.self_attn": (4, 3) for i in range(2)
    }
    with pytest.raises(EditError, match="no attention heads"):
        planned(capture(tiny_model("mamba")), heads=0.2)


def test_hidden_is_rounded_to_the_heads_that_stay() -> None:
    with torch.device("meta"):
        wide = capture(tiny_model("llama", **EIGHT_HEADS))
    asked = {"heads": 0.2, "hidden": 0.0, "round_to": {"hidden": "heads"}}
    assert planned(wide, **asked)["hidden"] == (64, 48)  # 6 heads, and a multiple of 8
    assert planned(wide, **{**asked, "hidden": 0.5})["hidden"] == (64, 24)
    assert planned(wide, heads=0.2, hidden=48)["hidden"] == (64, 48)
    with pytest.raises(EditError, match="not a multiple of 24"):
        planned(wide, **{**asked, "hidden": 40})
    plan = plan_config(PruneWidth(**asked).preview(wide))
    assert not plan.constants
    assert plan.changes["hidden_size"] == (64, 48)
    assert plan.changes["num_attention_heads"] == (8, 6)


def test_a_group_that_stays_whole_needs_no_scores(llama: Program) -> None:
    scored = Score(Random())(llama, Context(seed=1))
    without = {name: score for name, score in scored.scores.items() if name != "hidden"}
    blind = scored.replace(scores=without)
    smaller = PruneWidth(mlp=0.25, hidden=0.0)(blind)
    assert widths(smaller)["hidden"] == 64
    with pytest.raises(EditError, match="hidden has no scores"):
        PruneWidth(mlp=0.25, hidden=0.25)(blind)
