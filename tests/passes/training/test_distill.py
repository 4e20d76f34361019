"""The distill pass: what it trains and what it leaves alone, its teachers, and the ways to spend
less memory."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.models import tiny_model

from secateur.graph import Program, capture
from secateur.graph.errors import PipelineError
from secateur.passes import Context, Pipeline, samples
from secateur.passes.storage.journal import Journal
from secateur.passes.training.distill import Distill
from secateur.passes.training.text import TextError
from secateur.passes.training.trainer import TrainingError
from secateur.runtime import to_transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from worker import pruned

QUICK: dict[str, Any] = {
    "tokens": 768,
    "batch_tokens": 96,
    "held_out": 4,
    "evaluations": 2,
    "lr": 1e-3,
    "warmup": 0.0,
}
Made = tuple[Program, Context]


@pytest.fixture(scope="module")
def made() -> Made:
    torch.manual_seed(0)
    return pruned()


@pytest.fixture(scope="module")
def plain(made: Made) -> Program:
    return Distill(**QUICK)(*made)


def figures(program: Program) -> dict[str, Any]:
    return program.history[-1].figures


def kls(program: Program) -> list[float]:
    return [point["kl"] for point in figures(program)["curve"]]


def values(program: Program) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in program.named_parameters()}


def test_it_learns_and_leaves_what_it_was_given_alone(made: Made) -> None:
    small, context = made
    assert small.cut is not None
    before, dense = values(small), values(small.cut.dense)
    drawn = torch.get_rng_state()
    trained = Distill(**{**QUICK, "tokens": 3000})(small, context)
    assert torch.equal(drawn, torch.get_rng_state()), "the caller's random numbers are not touched"
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    assert all(torch.equal(p, dense[name]) for name, p in small.cut.dense.named_parameters())
    assert all(p.requires_grad and p.grad is None for _, p in trained.named_parameters())
    assert not all(torch.equal(p, before[name]) for name, p in trained.named_parameters())
    told = figures(trained)
    assert told["trained"] == "stock class" and told["loss_from"] == "hidden states, in chunks"
    assert told["held_out"][-1]["kl"] < 0.97 * told["held_out"][0]["kl"]
    assert told["held_out"][-1]["step"] == told["steps"] and told["tokens"] == told["steps"] * 96
    assert trained.cut is small.cut and trained.scores == {}


def test_the_stock_model_is_trained_through_the_programs_own_weights(
    made: Made, plain: Program
) -> None:
    ids = torch.arange(20)[None]
    with torch.no_grad():
        graph, stock = plain(input_ids=ids).logits, to_transformers(plain)(input_ids=ids).logits
    torch.testing.assert_close(graph, stock, rtol=1e-4, atol=1e-4)


def test_the_first_loss_is_the_divergence_written_out(made: Made) -> None:
    small, context = made
    assert small.cut is not None and context.data is not None
    found = figures(Distill(**QUICK)(small, context))["held_out"][0]
    total, count, ce = 0.0, 0, 0.0
    with torch.no_grad():
        for sample in context.data[:4]:
            ids = sample.inputs["input_ids"]
            log_p = small.cut.dense(input_ids=ids).logits.log_softmax(-1)
            log_q = small(input_ids=ids).logits.log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
            count += ids.numel()
            ce += float(torch.nn.functional.nll_loss(log_q[0, :-1], ids[0, 1:]))
    assert found["kl"] == pytest.approx(total / count, rel=1e-4)
    assert found["ce"] == pytest.approx(ce / 4, rel=1e-4)


def test_micro_batches_make_the_step_of_one_batch(made: Made, plain: Program) -> None:
    whole, single = Distill(**QUICK, micro_batch=4)(*made), Distill(**QUICK, micro_batch=1)(*made)
    assert kls(whole) == pytest.approx(kls(plain), rel=1e-5)
    assert kls(single) == pytest.approx(kls(whole), rel=1e-4)


@pytest.mark.slow
def test_checkpointing_and_compilation_change_no_loss(made: Made, plain: Program) -> None:
    assert kls(Distill(**QUICK, checkpointing=True)(*made)) == pytest.approx(kls(plain), rel=1e-5)
    assert kls(Distill(**QUICK, compile="aot_eager")(*made)) == pytest.approx(kls(plain), rel=1e-4)


def test_bfloat16_products_are_close(made: Made, plain: Program) -> None:
    rough = Distill(**QUICK, precision="bfloat16")(*made)
    assert kls(rough) == pytest.approx(kls(plain), rel=5e-2) and kls(rough) != kls(plain)
    assert all(p.dtype == torch.float32 for _, p in rough.named_parameters())


def test_weights_of_low_precision_are_trained_as_float32_and_rounded_at_the_end() -> None:
    program = capture(tiny_model("llama").bfloat16())
    ids = torch.randint(0, 128, (12, 24), generator=torch.Generator().manual_seed(1))
    context = Context(data=samples(ids, program), raise_model=to_transformers)
    small = Pipeline.parse("score{metric=magnitude},prune-width{mlp=0.5}")(program, context)
    trained = Distill(**{**QUICK, "held_out": 2})(small, context)
    assert {p.dtype for _, p in trained.named_parameters()} == {torch.bfloat16}
    assert sum(kls(trained)[-3:]) < sum(kls(trained)[:3])


def test_a_shape_that_no_stock_class_holds_is_trained_as_a_graph(
    made: Made, plain: Program
) -> None:
    small, context = made
    graph = Distill(**QUICK)(small, replace(context, raise_model=None))
    assert (
        figures(graph)["trained"] == "graph" and figures(graph)["loss_from"] == "logits, in chunks"
    )
    assert kls(graph) == pytest.approx(kls(plain), rel=1e-4)
    for (name, one), (_, two) in zip(
        graph.named_parameters(), plain.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)
    with pytest.raises(PipelineError, match="checkpointing=true"):
        Distill(**QUICK, checkpointing=True)(small, replace(context, raise_model=None))
    with pytest.raises(PipelineError, match="no hidden states"):
        Distill(**QUICK, states=((0, 0),))(small, replace(context, raise_model=None))


def test_cross_entropy_alone_needs_no_teacher(made: Made) -> None:
    small, context = made
    alone = Distill(**QUICK, kl=0.0, ce=1.0)(small.replace(cut=None), context)
    assert {point["kl"] for point in figures(alone)["curve"]} == {0.0}
    assert figures(alone)["curve"][-1]["ce"] < figures(alone)["curve"][0]["ce"]
    both = Distill(**QUICK, kl=1.0, ce=0.5)(small, context)
    first = figures(both)["curve"][0]
    assert first["loss"] == pytest.approx(first["kl"] + 0.5 * first["ce"], rel=1e-5)


def test_hidden_states_count_as_much_as_the_divergence(made: Made) -> None:
    small, context = made
    first = figures(Distill(**QUICK, states=((0, 0), (-1, -1)))(small, context))["curve"][0]
    assert first["states"] > 0
    assert first["loss"] == pytest.approx(2 * first["kl"], rel=1e-5)


def test_a_narrower_student_learns_a_projection() -> None:
    program = capture(tiny_model("llama"))
    ids = torch.randint(0, 128, (12, 24), generator=torch.Generator().manual_seed(1))
    context = Context(data=samples(ids, program), raise_model=to_transformers)
    small = Pipeline.parse("score{metric=magnitude},prune-width{hidden=32}")(program, context)
    points = figures(
        Distill(**{**QUICK, "tokens": 2000, "lr": 3e-3}, states=((0, 0), (-1, -1)))(small, context)
    )["curve"]
    assert points[-1]["states"] < 0.8 * points[0]["states"]


def test_a_teacher_of_another_dtype_is_a_copy(made: Made, plain: Program) -> None:
    small, context = made
    assert small.cut is not None
    rough = Distill(**QUICK, teacher_dtype="bfloat16")(small, context)
    assert kls(rough) == pytest.approx(kls(plain), rel=5e-2) and kls(rough) != kls(plain)
    assert {p.dtype for _, p in small.cut.dense.named_parameters()} == {torch.float32}


def test_a_teacher_folder_is_as_good_as_the_dense_program(
    made: Made, plain: Program, tmp_path: Path
) -> None:
    small, context = made
    assert small.cut is not None
    to_transformers(small.cut.dense).save_pretrained(tmp_path / "teacher")
    found = Distill(**QUICK, teacher=str(tmp_path / "teacher"))(small.replace(cut=None), context)
    assert kls(found) == pytest.approx(kls(plain), rel=1e-5)
    with pytest.raises(PipelineError, match="no model folder"):
        Distill(**QUICK, teacher=str(tmp_path))(small, context)


def test_rows_that_the_teacher_wrote_down_are_those_it_says(made: Made, tmp_path: Path) -> None:
    small, context = made
    live = Distill(**QUICK, top_k=16)(small, context)
    stored = Distill(**QUICK, top_k=16, store=str(tmp_path))(small, context)
    assert kls(stored) == kls(live) and figures(stored)["held_out"] == figures(live)["held_out"]
    journal = Journal(tmp_path)
    names = journal.names()
    assert len(names) == 25, "24 sequences, and what they depend on"
    journal.remove("rows-00000003")
    stamp = (tmp_path / "rows-00000004.safetensors").stat().st_mtime_ns
    assert kls(Distill(**QUICK, top_k=16, store=str(tmp_path))(small, context)) == kls(live)
    assert (
        journal.names() == names
        and (tmp_path / "rows-00000004.safetensors").stat().st_mtime_ns == stamp
    )
    Distill(**{**QUICK, "tokens": 96}, top_k=8, store=str(tmp_path))(small, context)
    entry = journal.read("rows-00000004")
    assert entry is not None and entry.tensors["indices"].shape == (24, 8), (
        "other rows replace those of another k"
    )


@pytest.mark.slow
def test_a_corrected_teacher_first_learns_the_text(made: Made) -> None:
    small, context = made
    assert small.cut is not None
    dense = values(small.cut.dense)
    corrected = figures(Distill(**QUICK, correct_tokens=480)(small, context))
    told = corrected["teacher_correction"]
    assert told["steps"] == 5 and told["curve"][0]["lr"] == pytest.approx(1e-3 / 5)
    assert told["held_out"][-1]["ce"] != told["held_out"][0]["ce"]
    assert all(torch.equal(p, dense[name]) for name, p in small.cut.dense.named_parameters())
    assert corrected["curve"][0]["kl"] != kls(Distill(**{**QUICK, "tokens": 96})(small, context))[0]


def test_the_whole_curve_goes_to_the_output_folder(made: Made, tmp_path: Path) -> None:
    small, context = made
    told = figures(
        Distill(**{**QUICK, "tokens": 96 * 130, "evaluations": 1})(
            small, replace(context, output=tmp_path)
        )
    )
    written = json.loads((tmp_path / "distill.json").read_text())
    assert len(written["curve"]) == told["steps"] == 130
    assert len(told["curve"]) <= 64 and told["curve"][-1]["tokens"] == 96 * 130
    mean = sum(point["kl"] for point in written["curve"][:3]) / 3
    assert told["curve"][0]["kl"] == pytest.approx(mean)


def test_what_cannot_be_is_refused_with_the_reason(made: Made) -> None:
    small, context = made
    with pytest.raises(PipelineError, match="name a teacher folder"):
        Distill()(small.replace(cut=None), context)
    with pytest.raises(PipelineError, match="nothing to learn"):
        Distill(kl=0.0)(small, context)
    with pytest.raises(PipelineError, match="give top_k"):
        Distill(store="x")(small, context)
    with pytest.raises(PipelineError, match="beside the KL"):
        Distill(kl=0.0, ce=1.0, states=((0, 0),))(small, context)
    with pytest.raises(PipelineError, match="needs calibration data"):
        Distill()(small, replace(context, data=None))
    with pytest.raises(TextError, match="expected safetensors"):
        Distill(data="/nowhere.safetensors")(small, context)
    with pytest.raises(TrainingError, match="lower lr"):
        Distill(**{**QUICK, "lr": 1e30})(small, context)


def test_another_vocabulary_is_refused(made: Made, tmp_path: Path) -> None:
    small, context = made
    tiny_model("llama", vocab_size=136).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="136 logits a token and the student 128"):
        Distill(**QUICK, teacher=str(tmp_path))(small, context)


def test_it_reads_as_a_pipeline() -> None:
    text = "distill{tokens=200000,lr=0.001,precision=bfloat16,states=[[0,0],[-3,-3]]}"
    (one,) = Pipeline.parse(text).passes
    assert one == Distill(tokens=200_000, lr=1e-3, states=((0, 0), (-3, -3)), precision="bfloat16")
    assert Pipeline(passes=(one,)).to_text() == text
    assert Pipeline.parse("distill{tokens=2e5}").passes[0] == Distill(tokens=200_000)
