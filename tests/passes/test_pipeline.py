"""Passes in a row: order, data, history, hooks, failures; and the contract of every pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.graph import Program
from secateur.graph.errors import EditError, PipelineError, VerificationError
from secateur.passes import PASSES, Context, Hooks, Pass, PassResult, Pipeline, PruneWidth, Score
from secateur.passes.importance import IMPORTANCES, Activation, Magnitude, Random, Taylor
from secateur.passes.language.options import options_table


@dataclass(frozen=True)
class Spoil(Pass):
    """Breaks the weights of the head, honestly or not."""

    name: ClassVar[str] = "spoil"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"

    def call(self, program: Program, context: Context) -> PassResult:
        gm = program.gm.__copy__()
        gm.head = nn.Linear(3, 11)
        return PassResult(program.replace(gm=gm), modified=True)


@dataclass(frozen=True)
class Fail(Pass):
    """Raises."""

    name: ClassVar[str] = "fail"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "exact"
    error: Any = field(default=RuntimeError("broken"))

    def call(self, program: Program, context: Context) -> PassResult:
        raise self.error


metrics = st.one_of(
    st.builds(Random), st.builds(Magnitude, st.sampled_from([1, 2])), st.builds(Taylor)
)
scores = st.builds(
    Score, metrics, st.sampled_from(["sum", "max"]), st.sampled_from(["none", "standard"])
)
amounts = st.one_of(st.floats(0, 0.99), st.integers(1, 4096))
prunes = st.builds(
    PruneWidth,
    mlp=amounts,
    hidden=st.one_of(st.none(), amounts),
    groups=st.dictionaries(st.text(min_size=1), amounts, max_size=2),
    round_to=st.one_of(
        st.integers(1, 256), st.dictionaries(st.sampled_from(["mlp", "hidden"]), st.just(32))
    ),
    uniform=st.booleans(),
)


@given(st.lists(st.one_of(scores, prunes), min_size=1, max_size=4), st.integers(0, 99))
def test_text_and_recipe_read_back(passes: list[Pass], seed: int) -> None:
    pipeline = Pipeline(tuple(passes), seed=seed)
    assert Pipeline.parse(pipeline.to_text()) == replace(pipeline, seed=0)
    assert Pipeline.from_recipe(pipeline.to_recipe()) == pipeline


@pytest.mark.parametrize("cls", [*PASSES, *IMPORTANCES], ids=lambda cls: cls.name)
def test_every_pass_is_documented_and_named_in_kebab_case(cls: type[Any]) -> None:
    assert cls.name == cls.name.lower().replace("_", "-")
    assert len(cls.summary()) > 10
    assert all(meaning for _, _, meaning in options_table(cls))
    if issubclass(cls, Pass):
        assert cls.numerics in ("exact", "close", "lossy")


def test_run_records_what_was_done(llama: Program, ids: Tensor) -> None:
    smaller = Pipeline.parse("score{metric=taylor},prune-width{mlp=0.25}").run(
        llama, data=[ids], seed=7
    )
    first, second = smaller.history
    assert first.name == "score" and first.options["metric"]["taylor"]["form"] == "element"
    assert first.figures["tokens"] == ids.numel()
    assert first.figures["seed"] == second.figures["seed"] == 7
    assert second.figures["seconds"] > 0
    assert second.figures["parameters_after"] == smaller.num_parameters < llama.num_parameters
    assert not smaller.scores
    assert llama.history == ()
    assert smaller(input_ids=ids).logits.shape == (5, 12, 128)


def test_missing_data_is_told_before_any_work(llama: Program) -> None:
    with pytest.raises(PipelineError, match="score needs calibration data"):
        Pipeline.parse("score{metric=activation},prune-width{mlp=0.5}").run(llama)
    with pytest.raises(PipelineError, match="score cannot run: needs calibration data"):
        Score(Activation())(llama)


@pytest.mark.parametrize(
    "text", ["prune-width{mlp=0.5}", "score{metric=random},prune-width{mlp=0.5},prune-width{mlp=1}"]
)
def test_missing_scores_are_told_before_any_work(llama: Program, text: str) -> None:
    with pytest.raises(PipelineError, match=r"prune-width: .* put score\{metric=...\} before it"):
        Pipeline.parse(text).run(llama)


def test_scores_may_come_with_the_program(llama: Program) -> None:
    scored = Score(Random())(llama)
    assert Pipeline.parse("prune-width{mlp=48}").run(scored).num_parameters < llama.num_parameters


def test_the_result_is_verified(two_layers: Program) -> None:
    with pytest.raises(VerificationError, match="head"):
        Spoil()(two_layers)


@pytest.mark.parametrize("error", [RuntimeError("broken"), EditError("broken")])
def test_a_failure_names_the_pass_and_those_before(two_layers: Program, error: Exception) -> None:
    with pytest.raises(type(error), match="broken") as caught:
        Pipeline((Score(Random()), Fail(type(error)("broken")))).run(two_layers)
    assert caught.value.__notes__ == ["in pass fail (2 of 2); already run: score"]


def test_hooks(two_layers: Program) -> None:
    lines: list[str] = []
    hooks = Hooks(frozenset({"score"}), time_passes=True, stop_after="score", write=lines.append)
    pipeline = replace(Pipeline.parse("score{metric=random},prune-width{mlp=0.5}"), hooks=hooks)
    stopped = pipeline.run(two_layers)
    assert [step.name for step in stopped.history] == ["score"]
    assert lines[0].startswith("score: ")
    assert lines[1].startswith("# graph after score\ngraph():")
    assert "aten.linear" in lines[1]


def test_hooks_name_passes_that_run(two_layers: Program) -> None:
    pipeline = replace(Pipeline.parse("score{metric=random}"), hooks=Hooks(stop_after="scor"))
    with pytest.raises(PipelineError, match=r"no pass 'scor' runs here; did you mean 'score'\?"):
        pipeline.run(two_layers)


def test_plan_follows_the_shapes_through_the_passes(llama: Program) -> None:
    pipeline = Pipeline.parse(
        "score{metric=random},prune-width{mlp=0.5},score{metric=random},prune-width{mlp=0.5}"
    )
    assert [(edit.units, edit.kept) for edit in pipeline.plan(llama)] == [(96, 48)] * 2 + [
        (48, 24)
    ] * 2
    shapes = {name: p.shape for name, p in pipeline.preview(llama).named_parameters()}
    assert shapes["model.layers.1.mlp.down_proj.weight"] == torch.Size([64, 24])
