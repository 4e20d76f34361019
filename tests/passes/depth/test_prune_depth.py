"""Which blocks go, by every method; what is measured is what the dropped program does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from zoo.models import tiny_model

from secateur.graph import Program, blocks, capture, drop, keep
from secateur.graph.errors import EditError, PipelineError
from secateur.passes import Pipeline
from secateur.passes.base import Context
from secateur.passes.calibration.data import samples
from secateur.passes.calibration.kl import kl
from secateur.passes.depth.damage import block_influences, measure_damages, part_parameters
from secateur.passes.depth.prune_depth import PruneDepth
from secateur.passes.language.options import OptionError


@pytest.fixture(scope="module")
def five() -> Program:
    return capture(tiny_model("llama", num_hidden_layers=5))


@pytest.fixture(scope="module")
def context(five: Program) -> Context:
    ids = torch.randint(3, 120, (3, 10), generator=torch.Generator().manual_seed(2))
    return Context(data=samples(ids, five))


def names(program: Program) -> list[str]:
    return [block.name for block in blocks(program)]


def dropped(program: Program) -> list[str]:
    assert program.cut is not None
    return list(program.cut.dropped)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "bert"])
def test_damage_is_that_of_the_dropped_program(kind: str) -> None:
    program = capture(tiny_model(kind, num_hidden_layers=3))
    ids = torch.randint(3, 120, (2, 10), generator=torch.Generator().manual_seed(2))
    context = Context(data=samples(ids, program))
    parts = [part.name for block in blocks(program) for part in (block, *block.sub_blocks)]
    cuts = [frozenset(), *(frozenset([name]) for name in parts), frozenset(names(program)[:2])]
    found = measure_damages(program, program, cuts, "kl", context, "")
    expected = [kl(program, drop(program, cut), context.data or ()).mean for cut in cuts]
    assert found == pytest.approx(expected, abs=1e-6) and found[0] < 1e-6


@torch.no_grad()
def test_perplexity_is_the_mean_loss_of_the_next_token(five: Program, context: Context) -> None:
    (found,) = measure_damages(
        five, five, [frozenset(["model.layers.2"])], "perplexity", context, ""
    )
    smaller, losses = drop(five, ["model.layers.2"]), list[Tensor]()
    for sample in context.data or ():
        ids = sample.inputs["input_ids"]
        losses.append(
            F.cross_entropy(smaller(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        )
    assert found == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


@torch.no_grad()
def test_influence_is_one_minus_the_cosine_of_the_stream(five: Program, context: Context) -> None:
    found = block_influences(five, blocks(five), context)
    cosines: dict[str, list[Tensor]] = {name: [] for name in names(five)}
    for sample in context.data or ():
        hidden = five.source.model(**sample.inputs, output_hidden_states=True).hidden_states
        for at, name in enumerate(
            names(five)[:-1]
        ):  # the last hidden state is after the final norm
            cosines[name].append(F.cosine_similarity(hidden[at], hidden[at + 1], dim=-1).flatten())
    for name in names(five)[:-1]:
        assert found[name] == pytest.approx(1 - float(torch.cat(cosines[name]).mean()), abs=1e-5)


def best_after(program: Program, context: Context, gone: list[str]) -> str:
    left = [name for name in names(program) if name not in gone]
    return min(
        left, key=lambda name: kl(program, drop(program, [*gone, name]), context.data or ()).mean
    )


def test_greedy_measures_what_is_left_after_every_block(five: Program, context: Context) -> None:
    smaller = PruneDepth(drop=2)(five, context)
    first = best_after(five, context, [])
    assert dropped(smaller) == [first, best_after(five, context, [first])]
    rounds = smaller.history[-1].figures["rounds"]
    assert [len(r["scores"]) for r in rounds] == [5, 4]
    assert rounds[1]["now"] == pytest.approx(rounds[0]["scores"][first], abs=1e-6)
    assert (
        smaller.history[-1].figures["parameters_after"]
        == smaller.num_parameters
        < five.num_parameters
    )


def test_alone_and_influence_take_the_least(five: Program, context: Context) -> None:
    data = context.data or ()
    alone = sorted(names(five), key=lambda name: kl(five, drop(five, [name]), data).mean)
    assert set(dropped(PruneDepth(drop=2, method="alone")(five, context))) == set(alone[:2])
    scores = block_influences(five, blocks(five), context)
    assert set(dropped(PruneDepth(drop=2, method="influence")(five, context))) == set(
        sorted(scores, key=scores.__getitem__)[:2]
    )


def test_contiguous_takes_the_best_run_of_neighbours(five: Program, context: Context) -> None:
    runs = [names(five)[at : at + 2] for at in range(1, 3)]
    best = min(runs, key=lambda run: kl(five, drop(five, run), context.data or ()).mean)
    smaller = PruneDepth(drop=2, method="contiguous", keep_first=1, keep_last=1)(five, context)
    assert dropped(smaller) == best


def test_the_ends_stay_where_asked(five: Program, context: Context) -> None:
    smaller = PruneDepth(drop=2, method="influence", keep_first=2, keep_last=1)(five, context)
    assert set(dropped(smaller)) == {"model.layers.2", "model.layers.3"}
    with pytest.raises(EditError, match="3 blocks are to go, and 2 of 5 may"):
        PruneDepth(drop=3, keep_first=2, keep_last=1)(five, context)


@pytest.mark.parametrize("method", ["greedy", "alone", "influence"])
def test_sub_blocks_go_up_to_the_parameters_of_so_many_blocks(
    five: Program, context: Context, method: Any
) -> None:
    smaller = PruneDepth(drop=1, level="sub-block", method=method)(five, context)
    sizes = part_parameters(five)
    assert all(name.endswith(("self_attn", "mlp")) for name in dropped(smaller))
    gone = five.num_parameters - smaller.num_parameters
    slack = min(sizes[name] for name in sizes if name.endswith(("self_attn", "mlp"))) / 2
    assert abs(gone - sizes["model.layers.0"]) <= slack + 1


def damage_without(program: Program, context: Context, gone: list[str]) -> float:
    return kl(program, drop(program, gone), context.data or ()).mean


def test_greedy_takes_sub_blocks_or_both_of_a_layer_by_damage_a_parameter(
    five: Program, context: Context
) -> None:
    smaller = PruneDepth(drop=2, level="sub-block")(five, context)
    sizes, gone = part_parameters(five), list[str]()
    pairs = [" + ".join(sub.name for sub in block.sub_blocks) for block in blocks(five)]
    for facts in smaller.history[-1].figures["rounds"]:
        now = damage_without(five, context, gone) if gone else 0.0
        prices = {
            choice: (damage_without(five, context, [*gone, *choice.split(" + ")]) - now)
            / sum(sizes[name] for name in choice.split(" + "))
            for choice in facts["scores"]
        }
        chosen = " + ".join(facts["dropped"])
        assert prices[chosen] == pytest.approx(min(prices.values()), rel=1e-3, abs=1e-11)
        gone += facts["dropped"]
    assert set(smaller.history[-1].figures["rounds"][0]["scores"]) >= {
        *pairs,
        *(" + ".join(pairs)).split(" + "),
    }
    assert dropped(smaller) == gone


def test_a_killed_run_goes_on_after_its_last_round(
    five: Program, context: Context, tmp_path: Path
) -> None:
    whole = PruneDepth(drop=3)(five, context)
    resumable = Context(data=context.data, resume=tmp_path)
    PruneDepth(drop=2)(five, resumable)
    seen: list[str] = []

    def watch(items: Any, description: str, total: int | None = None) -> Any:
        seen.append(description)
        return items

    again = PruneDepth(drop=3)(five, Context(data=context.data, resume=tmp_path, progress=watch))
    assert seen == ["depth, round 3"], "rounds 1 and 2 were kept"
    assert dropped(again) == dropped(whole)


def test_layers_by_number_need_no_data(five: Program) -> None:
    smaller = Pipeline.parse("prune-depth{layers=[1,-1]}").run(five)
    assert set(dropped(smaller)) == {"model.layers.1", "model.layers.4"}
    with pytest.raises(EditError, match=r"layers names 9.*0\.\.4"):
        PruneDepth(layers=(9,)).plan(five)


def test_after_width_the_dense_model_stays_the_reference(five: Program, context: Context) -> None:
    narrow = keep(five, {f"mlp@model.layers.{i}.mlp": range(48) for i in range(5)})
    smaller = PruneDepth(drop=1)(narrow, context)
    scores = smaller.history[-1].figures["rounds"][0]["scores"]
    for name, score in scores.items():
        assert score == pytest.approx(
            kl(five, drop(narrow, [name]), context.data or ()).mean, abs=1e-6
        )


def test_what_is_left_is_repaired_by_the_dense_stream(five: Program) -> None:
    ids = torch.randint(3, 120, (8, 16), generator=torch.Generator().manual_seed(4))
    text = "score{metric=wanda},prune-width{mlp=0.5},prune-depth{layers=[2]}"
    rough = Pipeline.parse(text).run(five, data=ids)
    repaired = Pipeline.parse(f"{text},repair").run(five, data=ids)
    data = samples(ids, five)
    assert set(repaired.history[-1].figures["consumers"]) == {
        f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1, 3, 4)
    }
    assert kl(five, repaired, data).mean < kl(five, rough, data).mean


def test_a_plan_needs_no_weights() -> None:
    with torch.device("meta"):
        program = capture(tiny_model("llama", num_hidden_layers=4))
    edits = PruneDepth(drop=2).plan(program)
    assert [(edit.family, edit.units, edit.kept) for edit in edits] == [("blocks", 4, 2)]
    assert len(blocks(PruneDepth(drop=2).preview(program))) == 2
    halves = PruneDepth(drop=2, level="sub-block").preview(program)
    assert program.num_parameters - halves.num_parameters == pytest.approx(
        2 * part_parameters(program)["model.layers.0"], rel=0.2
    )
    with pytest.raises(PipelineError, match="meta device"):
        PruneDepth(drop=2)(program, Context(data=()))


def test_what_makes_no_sense_is_said() -> None:
    with pytest.raises(OptionError, match=r"drop=4"):
        PruneDepth()
    with pytest.raises(OptionError, match="whole blocks"):
        PruneDepth(drop=2, level="sub-block", method="contiguous")


def test_a_part_of_the_blocks(llama: Program) -> None:
    (edit,) = PruneDepth(drop=0.5).plan(llama)
    assert (edit.units, edit.kept, edit.asked) == (2, 1, 0.5)
    assert len(blocks(PruneDepth(drop=0.1).preview(llama))) == 1
    with pytest.raises(OptionError):
        PruneDepth(drop=1.5)
