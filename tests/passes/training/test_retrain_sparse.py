"""The retrain-sparse pass: what it trains, how sparse it leaves it, and what it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.models import tiny_model

from secateur.graph import Program, capture, verify, with_parameters
from secateur.graph.errors import PipelineError
from secateur.passes import Context, Pipeline, samples
from secateur.passes.sparsity.sparsify import Sparsify
from secateur.passes.training.masks.schedule import RECORDS
from secateur.passes.training.retrain_sparse import RetrainSparse
from secateur.passes.training.trainer import TrainingError
from secateur.runtime import to_transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from test_distill_resume import assert_same, outcome, worker
from worker import sparse, stopping

QUICK: dict[str, Any] = {
    "tokens": 1152,
    "batch_tokens": 96,
    "held_out": 4,
    "evaluations": 1,
    "lr": 2e-3,
    "warmup": 0.0,
    "refresh": 4,
    "mode": "adaptive",
}
Made = tuple[Program, Context]


@pytest.fixture(scope="module")
def made() -> Made:
    torch.manual_seed(0)
    return sparse()


@pytest.fixture(scope="module")
def adaptive(made: Made) -> Program:
    return RetrainSparse(**QUICK)(*made)


def figures(program: Program) -> dict[str, Any]:
    return program.history[-1].figures


def losses(program: Program) -> list[float]:
    return [point["loss"] for point in figures(program)["curve"]]


def values(program: Program) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in program.named_parameters()}


def masks(program: Program) -> dict[str, Tensor]:
    parameters = dict(program.named_parameters())
    return {name: parameters[name].detach() != 0 for name in program.sparse}


def test_masks_move_and_the_model_stays_exactly_sparse(made: Made, adaptive: Program) -> None:
    small, _ = made
    verify(adaptive)
    assert adaptive.sparse.keys() == small.sparse.keys()
    for name, parameter in adaptive.named_parameters():
        if name in adaptive.sparse:
            one = adaptive.sparse[name]
            assert (
                one.pattern.describe_violations(parameter.detach()) is None
                and one.removed is not None
            )
            assert not ((parameter == 0) & parameter.signbit()).any() and (one.removed != 0).any()
    told, before, after = figures(adaptive), masks(small), masks(adaptive)
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    assert told["mask_bits_changed"] == moved > 0
    assert told["mask_bits"] == sum(mask.numel() for mask in before.values())
    assert told["trained"] == "stock class" and told["weights_under_masks"] == len(before) == 14
    assert all(set(RECORDS) <= set(point) for point in told["curve"])
    assert told["curve"][-1]["changed"] == pytest.approx(moved / told["mask_bits"])
    assert sum(losses(adaptive)[-4:]) < sum(losses(adaptive)[:4])


def test_what_it_was_given_stays(made: Made) -> None:
    small, context = made
    assert small.cut is not None
    before, dense, kept = values(small), values(small.cut.dense), dict(small.sparse)
    trained = RetrainSparse(**{**QUICK, "tokens": 288})(small, context)
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    assert all(torch.equal(p, dense[name]) for name, p in small.cut.dense.named_parameters())
    assert dict(small.sparse) == kept and trained.sparse is not small.sparse
    assert {name for name, _ in to_transformers(trained).named_parameters()} == set(before)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            trained(input_ids=ids).logits, to_transformers(trained)(input_ids=ids).logits
        )


def test_fixed_masks_stay(made: Made) -> None:
    small, context = made
    fixed = RetrainSparse(**{**QUICK, "mode": "fixed", "kl": 0.0, "ce": 1.0})(
        small.replace(cut=None), context
    )
    before, after = masks(small), masks(fixed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert figures(fixed)["mask_bits_changed"] == 0
    assert sum(losses(fixed)[-4:]) < sum(losses(fixed)[:4])
    assert all(
        torch.equal(one.removed, small.sparse[name].removed) for name, one in fixed.sparse.items()
    )


@pytest.mark.parametrize("mode", ["adaptive", "cast"])
def test_what_is_measured_while_it_trains_is_what_is_left(
    made: Made, adaptive: Program, mode: str
) -> None:
    """Held-out text is measured under the masks, whatever the products of training take."""
    small, context = made
    assert context.data is not None
    trained = (
        adaptive
        if mode == "adaptive"
        else RetrainSparse(**{**QUICK, "mode": "cast", "strength": 2.0})(small, context)
    )
    verify(trained)
    total = 0.0
    with torch.no_grad():
        for sample in context.data[:4]:
            ids = sample.inputs["input_ids"]
            total += float(
                torch.nn.functional.cross_entropy(trained(input_ids=ids).logits[0, :-1], ids[0, 1:])
            )
    assert figures(trained)["held_out"][-1]["ce"] == pytest.approx(total / 4, rel=1e-5)
    assert figures(trained)["mask_bits_changed"] > 0


def test_a_sparse_head_is_under_its_mask_in_the_losses() -> None:
    program = capture(tiny_model("llama", tie_word_embeddings=False))
    ids = torch.randint(0, 128, (10, 24), generator=torch.Generator().manual_seed(1))
    context = Context(data=samples(ids, program), raise_model=to_transformers)
    small = Sparsify(metric="magnitude", head=True, targets="lm_head")(program, context)
    assert list(small.sparse) == ["lm_head.weight"] and context.data is not None
    told = figures(
        RetrainSparse(**{**QUICK, "tokens": 96, "held_out": 1}, revive="removed")(small, context)
    )
    with torch.no_grad():
        scores = small(input_ids=ids[:1]).logits[0, :-1]
    assert told["held_out"][0]["ce"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(scores, ids[0, 1:]))
    )


def test_the_graph_itself_is_trained_alike(made: Made, adaptive: Program) -> None:
    small, context = made
    graph = RetrainSparse(**QUICK)(small, replace(context, raise_model=None))
    assert figures(graph)["trained"] == "graph"
    assert losses(graph) == pytest.approx(losses(adaptive), rel=1e-4)
    same = [torch.equal(mask, masks(adaptive)[name]) for name, mask in masks(graph).items()]
    assert all(same) and "_mask" not in graph.gm.code


@pytest.mark.slow
def test_recomputation_and_micro_batches_change_nothing(made: Made, adaptive: Program) -> None:
    for option in ({"checkpointing": True}, {"micro_batch": 1}):
        other = RetrainSparse(**{**QUICK, **option})(*made)
        assert losses(other) == pytest.approx(losses(adaptive), rel=1e-4)
        assert figures(other)["mask_bits_changed"] == pytest.approx(
            figures(adaptive)["mask_bits_changed"], rel=0.02
        )


@pytest.mark.slow
def test_compilation_changes_nothing(made: Made, adaptive: Program) -> None:
    compiled = RetrainSparse(**QUICK, compile="aot_eager")(*made)
    assert losses(compiled) == pytest.approx(losses(adaptive), rel=1e-4)
    rough = RetrainSparse(**QUICK, precision="bfloat16")(*made)
    assert losses(rough) == pytest.approx(losses(adaptive), rel=5e-2) and losses(rough) != losses(
        adaptive
    )


def test_weights_of_low_precision_are_sparse_at_the_end() -> None:
    small, context = sparse(dtype=torch.bfloat16)
    trained = RetrainSparse(**{**QUICK, "tokens": 576, "kl": 0.0, "ce": 1.0})(small, context)
    verify(trained)
    assert {p.dtype for _, p in trained.named_parameters()} == {torch.bfloat16}
    assert figures(trained)["mask_bits_changed"] > 0


def test_the_first_refresh_respects_a_start_of_any_kind(made: Made) -> None:
    """What is kept was made smaller after the choice, as by a solver: by size alone the mask would
    turn over."""
    small, context = made
    shrunk = {name: 0.3 * value for name, value in values(small).items() if name in small.sparse}
    changed = with_parameters(small, shrunk)
    options = {**QUICK, "lr": 1e-9, "tokens": 288, "refresh": 2, "kl": 0.0, "ce": 1.0}
    assert figures(RetrainSparse(**options)(changed, context))["mask_bits_changed"] == 0


@pytest.mark.slow
def test_what_was_not_kept_starts_from_zero(made: Made) -> None:
    small, context = made
    options = {**QUICK, "tokens": 288, "refresh": 2, "kl": 0.0, "ce": 1.0}
    bare = {name: replace(one, removed=None) for name, one in small.sparse.items()}
    forgotten = RetrainSparse(**options)(small.replace(sparse=MappingProxyType(bare)), context)
    assert all(one.removed is None for one in forgotten.sparse.values())
    zero = RetrainSparse(**options, revive="zero")(small, context)
    assert losses(zero) == losses(forgotten)


def test_what_cannot_be_is_refused_with_the_reason(made: Made) -> None:
    small, context = made
    with pytest.raises(PipelineError, match="no weight is sparse: put sparsify"):
        RetrainSparse()(small.replace(sparse={}), context)
    with pytest.raises(PipelineError, match="score=wanda needs the norms"):
        RetrainSparse(mode="adaptive", score="wanda")(small, context)
    with pytest.raises(PipelineError, match="need a stock model"):
        RetrainSparse(**{**QUICK, "mode": "cast"})(small, replace(context, raise_model=None))
    with pytest.raises(PipelineError, match="nothing to learn"):
        RetrainSparse(kl=0.0, ce=0.0)(small, context)
    normed = {
        name: replace(one, norms=torch.ones(dict(small.named_parameters())[name].shape[1]))
        for name, one in small.sparse.items()
    }
    assert (
        RetrainSparse(mode="adaptive", score="wanda").requires(small.replace(sparse=normed)) == []
    )


def test_a_run_that_was_stopped_goes_on_between_refreshes(made: Made, tmp_path: Path) -> None:
    """Masks are chosen every third step, a step is kept every second one; stopped after 5 and 2
    steps."""
    small, context = made
    one = RetrainSparse(**{**QUICK, "tokens": 768, "refresh": 3, "save_every": 2})
    straight, kept = one(small, context), replace(context, resume=tmp_path)
    for steps in (5, 2):
        with pytest.raises(SystemExit):
            one(small, replace(kept, progress=stopping(steps)))
    resumed = one(small, kept)
    assert figures(resumed)["curve"] == figures(straight)["curve"]
    assert figures(resumed)["mask_bits_changed"] == figures(straight)["mask_bits_changed"] > 0
    assert all(torch.equal(p, values(straight)[name]) for name, p in resumed.named_parameters())
    with pytest.raises(TrainingError, match="option refresh"):
        replace(one, refresh=4)(small, kept)
    other = {
        name: replace(entry, norms=torch.ones(entry.removed.shape[1]))
        for name, entry in small.sparse.items()
    }
    with pytest.raises(TrainingError, match=r"masks .kept"):
        one(small.replace(sparse=other), kept)


@pytest.mark.slow
def test_kills_between_refreshes_change_nothing(tmp_path: Path) -> None:
    options = ("pass=retrain-sparse", 'mode="adaptive"', "refresh=3", "lr=0.003", "tokens=960")
    worker(tmp_path / "straight", *options)
    worker(tmp_path / "killed", *options, f"resume={tmp_path / 'kept'}", "kills=5,0,2")
    assert_same(tmp_path / "straight", tmp_path / "killed")
    (_, told), (_, other) = outcome(tmp_path / "straight"), outcome(tmp_path / "killed")
    assert told["mask_bits_changed"] == other["mask_bits_changed"] > 0


@pytest.mark.slow
def test_two_processes_have_the_masks_of_one(tmp_path: Path) -> None:
    options = ("pass=retrain-sparse", 'mode="adaptive"', "refresh=4", "lr=0.003", "tokens=1920")
    worker(tmp_path / "one", *options)
    worker(tmp_path / "two", *options, processes=2)
    (weights, told), (others, other) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert other["sharded"] and told["mask_bits_changed"] == other["mask_bits_changed"] > 0
    for name, weight in weights.items():
        assert torch.equal(weight == 0, others[name] == 0), name
        torch.testing.assert_close(weight, others[name], rtol=1e-5, atol=1e-5)
    worker(tmp_path / "half", *options, f"resume={tmp_path / 'kept'}", "stop_at=7", processes=2)
    worker(tmp_path / "again", *options, f"resume={tmp_path / 'kept'}", processes=2)
    assert_same(tmp_path / "two", tmp_path / "again")


def test_it_reads_as_a_pipeline() -> None:
    text = "retrain-sparse{tokens=2000000,kl=0.0,ce=1.0,mode=adaptive}"
    (one,) = Pipeline.parse(text).passes
    assert one == RetrainSparse(tokens=2_000_000, mode="adaptive", kl=0.0, ce=1.0)
    assert Pipeline(passes=(one,)).to_text() == text
