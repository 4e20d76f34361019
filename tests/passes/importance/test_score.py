"""The score pass: what it gives, what it leaves alone, what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from zoo.models import tiny_model

from secateur.graph import CoupledGroup, Program, capture, coupled_groups
from secateur.graph.errors import EditError, PipelineError
from secateur.passes import Allocate, Context, Pipeline, PruneWidth, Score, samples
from secateur.passes.importance import (
    IMPORTANCES,
    Activation,
    Importance,
    Magnitude,
    Random,
    Taylor,
)
from secateur.passes.importance.base import NORMALIZATIONS, aggregate_members


@pytest.mark.parametrize(
    "metric", [Random(), Magnitude(), Taylor(), Activation()], ids=lambda m: m.name
)
def test_one_finite_score_a_unit_of_every_free_group(
    llama: Program, ids: Tensor, metric: Importance
) -> None:
    scored = Score(metric)(llama, Context(data=samples([ids], llama)))
    free = {g.name: g.units for g in coupled_groups(llama) if g.locked is None}
    unseen = set(scored.history[-1].figures["unscored"])
    assert {name: len(score) for name, score in scored.scores.items()} == {
        name: units for name, units in free.items() if name not in unseen
    }
    assert all(
        s.dtype == torch.float32 and bool(s.isfinite().all()) for s in scored.scores.values()
    )
    assert unseen == set() or isinstance(metric, Activation)
    assert scored.gm is llama.gm


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("metric", sorted(cls.name for cls in IMPORTANCES))
def test_what_a_metric_sees_is_what_it_scores(
    program_of: Callable[[str], Program], ids: Tensor, metric: str, kind: str
) -> None:
    program = program_of(kind)
    score = Score(metric)
    scored = score(program, Context(data=samples([ids], program)))
    seen = score.preview(program)
    assert set(seen.scores) == set(scored.scores)
    assert seen.scores


def test_aggregation_and_normalization_are_applied(llama: Program) -> None:
    name = "mlp@model.layers.0.mlp"
    by_sum, by_mean = (Score(Magnitude(), how)(llama).scores[name] for how in ("sum", "mean"))
    torch.testing.assert_close(by_sum, 3 * by_mean)
    scaled = Score(Magnitude(), normalize="mean")(llama).scores[name]
    torch.testing.assert_close(scaled, by_sum / by_sum.mean())


def test_weights_are_needed() -> None:
    with torch.device("meta"):
        program = capture(tiny_model("llama"))
    with pytest.raises(PipelineError, match="meta device"):
        Score(Random())(program)


class Broken(Random):
    """Gives no numbers."""

    def members(
        self, program: Program, groups: list[CoupledGroup], context: Context
    ) -> dict[str, list[Tensor]]:  # type: ignore[override]
        return {group.name: [torch.full((group.units,), float("nan"))] for group in groups}


def test_scores_that_are_not_finite_are_refused(llama: Program) -> None:
    with pytest.raises(PipelineError, match="not finite"):
        Score(Broken())(llama)


def test_every_choice_can_be_written_in_a_pipeline() -> None:
    for how in NORMALIZATIONS:
        (score,) = Pipeline.parse(f"score{{normalize={how}}}").passes
        assert score == Score(normalize=how)  # type: ignore[arg-type]


class Flat(Random):
    """The same for every unit."""

    def members(
        self, program: Program, groups: list[CoupledGroup], context: Context
    ) -> dict[str, list[Tensor]]:  # type: ignore[override]
        return {group.name: [torch.ones(group.units)] for group in groups}


def test_a_product_over_the_residual_stream_chooses_by_its_factors(
    llama: Program, ids: Tensor
) -> None:
    data = Context(data=samples([ids], llama))
    scored = Score(Activation(), aggregate="prod")(llama, data)
    (name,) = (group.name for group in coupled_groups(llama) if group.family == "hidden")
    members = Activation().members(
        llama, [g for g in coupled_groups(llama) if g.name == name], data
    )[name]
    expected = torch.stack([score.double() for score in members]).log().sum(0)
    assert torch.equal(scored.scores[name].argsort(), expected.argsort())
    tiny = [1e-9 * score for score in members] * 40  # a deep model of small activations
    assert torch.equal(aggregate_members(tiny, "prod").argsort(), expected.argsort())


def test_equal_scores_of_any_metric_are_refused_where_units_are_chosen(llama: Program) -> None:
    flat = Score(Flat())(llama)
    with pytest.raises(
        EditError, match=r"gives all 96 scores of mlp@model\.layers\.0\.mlp the same value"
    ):
        PruneWidth(mlp=0.5)(flat)
    assert PruneWidth(mlp=96)(flat).cut is None
    with pytest.raises(EditError, match="the same value"):
        Allocate(damage="scores")(flat)
