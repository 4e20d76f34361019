"""What each pass of the table does where weights are sparse: it keeps their zeros, or refuses
before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from secateur.graph import Program, keep, verify, with_parameters
from secateur.graph.errors import EditError, PipelineError, VerificationError
from secateur.passes import PASSES, Context, Pass, PassResult, Pipeline, samples

# By pass: a text that runs it on a sparse Program.
KEEPS = {
    "score": "score{metric=magnitude}",
    "prune-depth": "prune-depth{layers=[0]}",
    "compensate": "compensate",
    "quantize": "quantize{bits=8}",
    "lower": "lower{machine=h100}",
    "sparsify": "sparsify{metric=magnitude,targets=o_proj}",
}
REFUSES = {
    "prune-width": "put prune-width before sparsify",
    "allocate": "put allocate before sparsify",
    "search": "put search before sparsify",
    "fill-dropped": "put fill-dropped before sparsify",
    "fill-widths": "put fill-widths before sparsify",
    "repair": "put repair before",
    "distill": "use retrain-sparse",
    "permute-channels": "put permute-channels before sparsify",
}
ASKED: dict[str, dict[str, Any]] = {"prune-width": {"mlp": 0.5}, "search": {"mlp": (48, 96)}}
ELSEWHERE = {
    "retrain-sparse",
    "reconstruct",
    "adapt-lora",
}  # they work on sparse weights; their own tests show it


@pytest.fixture(scope="module")
def sparse(llama: Program) -> Program:
    return Pipeline.parse("sparsify{metric=magnitude,ignore=o_proj}").run(llama)


@pytest.fixture(scope="module")
def data(llama: Program, ids: Tensor) -> Context:
    return Context(data=samples(ids, llama))


def test_every_pass_is_looked_at() -> None:
    known = {cls.name for cls in PASSES if cls.__module__.startswith("secateur.")}
    assert known - ELSEWHERE == (KEEPS.keys() | REFUSES.keys()) & known
    assert {"score", "prune-width", "quantize"} <= known


@pytest.mark.parametrize("name", KEEPS)
def test_a_pass_that_keeps_zeros(sparse: Program, data: Context, name: str) -> None:
    after = Pipeline.parse(KEEPS[name])(sparse, data)
    verify(after)
    left = {parameter for parameter, _ in after.named_parameters()}
    assert set(sparse.sparse) & left <= set(after.sparse) and after.sparse
    known, before = dict(after.named_parameters()), dict(sparse.named_parameters())
    assert all(not known[n][before[n] == 0].any() for n in set(sparse.sparse) & left)


@pytest.mark.parametrize("name", [cls.name for cls in PASSES if cls.name in REFUSES])
def test_a_pass_that_would_fill_zeros_refuses(sparse: Program, data: Context, name: str) -> None:
    cls = PASSES.find_class(name)
    assert cls is not None and issubclass(cls, Pass)
    one = cls(**ASKED.get(name, {}))
    scored = sparse.replace(scores={"a group": torch.ones(2)})
    with pytest.raises(PipelineError, match=REFUSES[name]):
        one(scored, data)
    assert any(REFUSES[name] in reason for reason in Pipeline(passes=(one,)).requires(scored))


def test_an_order_that_cannot_be_is_told_before_any_work(llama: Program) -> None:
    text = "sparsify{metric=magnitude},score{metric=magnitude},prune-width{mlp=0.5}"
    with pytest.raises(
        PipelineError, match="prune-width: weights are sparse along the inputs that would go"
    ):
        Pipeline.parse(text).run(llama)
    order = Pipeline.parse(
        "score{metric=magnitude},prune-width{mlp=48},sparsify{metric=magnitude}"
    ).run(llama)
    assert [step.name for step in order.history] == ["score", "prune-width", "sparsify"]


def test_a_width_that_does_not_fit_is_refused_with_the_reason(llama: Program) -> None:
    narrow = Pipeline.parse("score{metric=magnitude},prune-width{mlp=46}").run(llama)
    with pytest.raises(
        PipelineError, match=r"down_proj.weight cannot be 2:4: 46 inputs are no multiple of 4"
    ):
        Pipeline.parse("sparsify{metric=magnitude}").run(narrow)
    made = Pipeline.parse("sparsify{metric=magnitude,ignore=down_proj}").run(narrow)
    assert made.sparse and not any("down_proj" in name for name in made.sparse)


@dataclass(frozen=True)
class Densify(Pass):
    """Lies: it fills the zeros and says nothing."""

    name: ClassVar[str] = "densify"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"

    def call(self, program: Program, context: Context) -> PassResult:
        values = {
            n: p.detach() + 1e-30 for n, p in program.named_parameters() if n in program.sparse
        }
        return PassResult(with_parameters(program, values), True)


def test_a_pass_that_lies_is_caught(sparse: Program) -> None:
    """The net below: whatever a pass does, what is said to be sparse is counted after it."""
    with pytest.raises(VerificationError, match=r"sparse weights are sparse: .* is not 2:4"):
        Densify()(sparse)


def test_an_edit_of_inputs_is_refused_by_the_graph_itself(sparse: Program) -> None:
    with pytest.raises(EditError, match="prune widths first"):
        keep(sparse, {"mlp@model.layers.0.mlp": range(48)})
