"""Plans: the shapes of the result before any work, and rough needs of the job."""

from __future__ import annotations

import json

import pytest
import torch
from zoo.models import NanoGPT, perturb, tiny_model

from secateur.graph import Program, SecateurError, capture
from secateur.graph.errors import EditError
from secateur.passes import Pipeline
from secateur.runtime import plan_config
from secateur.tools.plan.footprint import measure_footprint
from secateur.tools.plan.job import estimate_job, probe_gflops
from secateur.tools.plan.plan import SparseShare, count_sparse, make_plan, on_meta

TEXT = "score{metric=random},prune-width{mlp=0.25,kv_heads=1,hidden=0.25}"


def fits(program: Program) -> None:
    """A stock class that takes anything."""


def test_the_plan_is_what_comes_out(llama: Program) -> None:
    pipeline = Pipeline.parse(TEXT)
    plan = make_plan(llama, pipeline, fits)
    assert plan.before == measure_footprint(llama)
    assert plan.after == measure_footprint(pipeline.run(llama))
    assert {(edit.family, edit.units, edit.kept) for edit in plan.edits} == {
        ("mlp", 96, 72),
        ("kv_heads", 2, 1),
        ("hidden", 64, 48),
    }
    assert plan.misfit is None
    assert json.loads(json.dumps(plan.to_json()))["after"]["parameters"] == plan.after.parameters


def test_the_plan_tells_which_weights_become_sparse(llama: Program) -> None:
    pipeline = Pipeline.parse("sparsify{metric=magnitude,ignore=down_proj}")
    made = pipeline.run(llama)
    (told,) = make_plan(llama, pipeline, fits).sparse
    weights = [p for name, p in made.named_parameters() if name in made.sparse]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert told == SparseShare(
        "2:4", len(weights), sum(weight.numel() for weight in weights), zeros
    )
    assert count_sparse(made) == (told,) and not make_plan(llama, Pipeline.parse(TEXT), fits).sparse


def test_widths_that_do_not_fit_a_pattern_are_refused_before_any_work(llama: Program) -> None:
    with pytest.raises(SecateurError, match="no multiple of 7"):
        make_plan(llama, Pipeline.parse("sparsify{pattern=5:7,metric=magnitude}"), fits)


def test_planning_touches_no_weight(llama: Program) -> None:
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in llama.named_parameters()}
    make_plan(llama, Pipeline.parse(TEXT), fits)
    assert all(
        p.data_ptr() == before[name][0] and p.equal(before[name][1])
        for name, p in llama.named_parameters()
    )
    light = on_meta(llama)
    assert all(p.is_meta for _, p in light.named_parameters())
    shapes = [
        {name: p.shape for name, p in program.named_parameters()} for program in (light, llama)
    ]
    assert shapes[0] == shapes[1]


def test_a_meta_program_of_a_hundred_gigabytes_costs_nothing() -> None:
    sizes = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "head_dim": 128,
    }
    with torch.device("meta"):
        program = capture(tiny_model("llama", **sizes, num_hidden_layers=2, vocab_size=128256))
    plan = make_plan(program, Pipeline.parse("score{metric=random},prune-width{mlp=0.5}"), fits)
    assert plan.before.parameters > 3e9
    assert plan.after.parameters == plan.before.parameters - 2 * 3 * 8192 * 14336


def test_a_misfit_is_part_of_the_plan(llama: Program) -> None:
    pipeline = Pipeline.parse("score{metric=random},prune-width{mlp=0.5,skip=[0],uniform=false}")
    plan = make_plan(llama, pipeline, plan_config)
    assert plan.misfit is not None
    assert "mlp" in plan.misfit
    assert (
        make_plan(
            llama, Pipeline.parse("score{metric=random},prune-width{mlp=0.5}"), plan_config
        ).misfit
        is None
    )


def test_plain_modules_are_planned_too() -> None:
    program = capture(perturb(NanoGPT()), {"ids": torch.zeros(2, 7, dtype=torch.int64)})
    plan = make_plan(program, Pipeline.parse("score{metric=random},prune-width{mlp=0.5}"), refuses)
    assert plan.misfit is None
    assert plan.after.parameters < plan.before.parameters


def refuses(program: Program) -> None:
    raise SecateurError("never")


def test_what_cannot_be_is_refused(llama: Program) -> None:
    with pytest.raises(EditError, match="no group of family 'experts'"):
        make_plan(llama, Pipeline.parse("score,prune-width{experts=0.5}"), fits)


def test_estimates_grow_with_the_work(llama: Program) -> None:
    size = measure_footprint(llama)
    jobs = {
        metric: estimate_job(
            Pipeline.parse(f"score{{metric={metric}}}"), (size, size), tokens=10**9, window=256
        )
        for metric in ("random", "activation", "taylor")
    }
    assert jobs["random"].tokens == 0
    assert jobs["activation"].tokens == 10**9
    assert jobs["random"].seconds < jobs["activation"].seconds < jobs["taylor"].seconds
    assert jobs["taylor"].peak_bytes > jobs["activation"].peak_bytes > size.bytes


def test_each_pass_has_its_share(llama: Program) -> None:
    size, mega = measure_footprint(llama), 10**6
    text = "score{metric=wanda},prune-width{mlp=0.25},repair,distill{tokens=5_000_000}".replace(
        "_", ""
    )
    job = estimate_job(Pipeline.parse(text), (size, size), tokens=mega, window=256, width=72)
    score, prune, repair, distill = job.passes
    assert [share.name for share in job.passes] == ["score", "prune-width", "repair", "distill"]
    assert (prune.seconds, prune.bytes) == (0, 0)
    assert repair.bytes == round(
        4 * size.parameters + 6 * 8 * 72**2 + 2 * mega * size.live_bytes_per_token
    )
    assert score.bytes == round(256 * 3 * size.largest_bytes_per_token)
    assert distill.bytes > 16 * size.parameters
    assert distill.seconds == pytest.approx(5 * 4 / 3 * repair.seconds, rel=0.1)
    assert job.peak_bytes >= repair.bytes + size.bytes
    held = [
        estimate_job(Pipeline.parse(t), (size, size), tokens=mega, window=256).passes[0].bytes
        for t in ("repair", "repair{offload=true}")
    ]
    assert held[1] < held[0] / 10


def test_the_probe_measures() -> None:
    assert 0.01 < probe_gflops(0.01) < 1e6
