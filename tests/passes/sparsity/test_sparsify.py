"""One-shot sparsity against references that are written down from the papers, and what the pass
refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.sparse import grams
from zoo.sparsity_reference import (
    magnitude_mask,
    ria_mask,
    sparsegpt,
    sparsegpt_by_columns,
    wanda_mask,
)

from secateur.graph import Pattern, Program, Share, drop, with_parameters
from secateur.graph.errors import EditError, PipelineError
from secateur.passes import Context, Pipeline, samples
from secateur.passes.calibration.data import CalibrationError
from secateur.passes.calibration.gram import gram_of, inverse_factor, output_error, squares_of
from secateur.passes.calibration.kl import kl
from secateur.passes.calibration.lockstep import Lockstep
from secateur.passes.lowering.layers import linear_layers, sharing_input
from secateur.passes.solvers.group_refinement import refine_groups
from secateur.passes.solvers.sparsegpt import blocks_of, prune_by_sparsegpt
from secateur.passes.sparsity.sparsify import Sparsify
from secateur.passes.storage.journal import Journal
from secateur.runtime.resume.fingerprint import hash_parameters

ByKind = Callable[[str], Program]
PATTERNS: list[Pattern | Share] = [
    Pattern(2, 4),
    Pattern(1, 4),
    Pattern(4, 8),
    Pattern(1, 2),
    Share(0.5),
    Share(0.7),
]


@pytest.fixture(scope="module")
def data(llama: Program) -> Context:
    tokens = torch.randint(0, 128, (6, 20), generator=torch.Generator().manual_seed(5))
    return Context(data=samples(tokens, llama))


@pytest.fixture(scope="module")
def by_gpt(llama: Program, data: Context) -> Program:
    return Sparsify(refine=0)(llama, data)


def weight_of(program: Program, name: str) -> Tensor:
    return dict(program.named_parameters())[name].detach()


# SparseGPT
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_is_that_of_the_paper(pattern: Pattern | Share) -> None:
    weight = torch.randn(24, 64)
    gram = grams(weight)
    factor, _ = inverse_factor(gram, 0.01)
    found, mask = prune_by_sparsegpt(weight, factor, pattern, block=16)
    wanted = sparsegpt(weight, gram, pattern, damping=0.01, block=16)
    assert torch.equal(found != 0, wanted != 0) and pattern.describe_violations(found) is None
    assert torch.allclose(found, wanted.float(), atol=1e-4)
    assert torch.equal(mask, found != 0)


def test_the_reference_of_the_benchmark_is_that_of_the_definition() -> None:
    weight = torch.randn(16, 48)
    gram = grams(weight)
    slow = sparsegpt(weight, gram, Pattern(2, 4), damping=0.01)
    assert torch.allclose(sparsegpt_by_columns(weight, gram, 0.01), slow.float(), atol=1e-5)


def test_updates_are_gathered_without_changing_the_result() -> None:
    weight = torch.randn(16, 96)
    factor, _ = inverse_factor(grams(weight), 0.01)
    one, other = (
        prune_by_sparsegpt(weight, factor, Pattern(2, 4), block=block)[0] for block in (4, 128)
    )
    assert torch.allclose(one, other, atol=1e-5)


def test_each_step_serves_the_outputs() -> None:
    weight = torch.randn(48, 64)
    gram = grams(weight)
    factor, damping = inverse_factor(gram, 0.01)
    found, mask = prune_by_sparsegpt(weight, factor, Pattern(2, 4))
    better = refine_groups(
        weight,
        found,
        gram + gram.diagonal().mean() * damping * torch.eye(64).double(),
        Pattern(2, 4),
        10,
    )
    largest = weight * Pattern(2, 4).select_mask(weight.abs())
    errors = [output_error(weight, one, gram) for one in (largest, weight * mask, found, better)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.85 * errors[1] and errors[3] < 0.85 * errors[2]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_blocks_cover_all_inputs_and_keep_what_the_pattern_keeps(pattern: Pattern | Share) -> None:
    spans = [span for block in blocks_of(pattern, 40, 16) for span in block]
    assert [a for a, _, _ in spans] == [0, *(b for _, b, _ in spans[:-1])] and spans[-1][1] == 40
    assert sum(kept for _, _, kept in spans) == 40 // pattern.group_size(
        40
    ) * pattern.kept_per_group(40)


def test_inputs_that_never_fire_lose_their_weights_first() -> None:
    weight = torch.randn(8, 16).abs() + 5
    gram = grams(torch.randn(8, 16))
    gram[4:6] = gram[:, 4:6] = 0
    factor, _ = inverse_factor(gram, 0.01)
    found, mask = prune_by_sparsegpt(weight, factor, Pattern(2, 4), live_K=gram.diagonal() > 0)
    assert not mask[:, 4:6].any() and mask[:, 6:8].all() and bool(found.isfinite().all())


# Refinement
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)], ids=str)
def test_refinement_never_loses(pattern: Pattern) -> None:
    weight = torch.randn(16, 32)
    gram = grams(weight) + 0.1 * torch.eye(32, dtype=torch.float64)
    found, errors = weight * pattern.select_mask(weight.abs()), list[float]()
    for _ in range(6):
        errors.append(output_error(weight, found, gram))
        found = refine_groups(weight, found, gram, pattern, sweeps=1, block=8)
        assert pattern.describe_violations(found) is None
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]


def test_one_group_is_solved_exactly() -> None:
    """With a single group there is nothing else to wait for: the best of all supports, by brute
    force."""
    weight = torch.randn(32, 4)
    gram = grams(torch.randn(3, 4))
    gram = gram + 0.01 * torch.eye(4, dtype=torch.float64)
    found = refine_groups(weight, torch.zeros_like(weight), gram, Pattern(2, 4), sweeps=1).double()
    for row, made in zip(weight.double(), found, strict=True):
        options = []
        for support in combinations(range(4), 2):
            at = list(support)
            value = torch.zeros(4, dtype=torch.float64)
            value[at] = torch.linalg.solve(gram[at][:, at], (gram @ row)[at])
            options.append(float((row - value) @ gram @ (row - value)))
        assert math.isclose(
            float((row - made) @ gram @ (row - made)), min(options), rel_tol=1e-4, abs_tol=1e-6
        )


def test_a_best_weight_stays() -> None:
    weight = torch.randn(8, 16)
    sparse = weight * Pattern(2, 4).select_mask(weight.abs())
    gram = grams(weight) + torch.eye(16, dtype=torch.float64)
    assert torch.allclose(
        refine_groups(sparse, sparse, gram, Pattern(2, 4), sweeps=3), sparse, atol=1e-5
    )


# The pass
@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("sparsify{metric=magnitude}", lambda w, norms: magnitude_mask(w)),
        ("sparsify{metric=wanda}", wanda_mask),
        ("sparsify{metric=ria}", ria_mask),
    ],
)
def test_masks_are_those_of_the_papers(
    llama: Program, data: Context, text: str, reference: Callable[[Tensor, Tensor], Tensor]
) -> None:
    made = Pipeline.parse(text)(llama, data)
    layers = [one for one in linear_layers(llama)[0] if not one.head]
    assert set(made.sparse) == {one.parameter for one in layers} and len(layers) == 14
    run = Lockstep(made, data.data or ())
    for sharing in sharing_input(layers):  # on what the sparse model itself produces at each layer
        run.advance_to(sharing[0].node.name)
        squares, tokens = squares_of(run, sharing[0].x.name, 6)
        for one in sharing:
            dense, weight = weight_of(llama, one.parameter), weight_of(made, one.parameter)
            mask = reference(dense, (squares / tokens).sqrt().float())
            assert torch.equal(weight, torch.where(mask, dense, 0.0))
            assert torch.equal(weight + made.sparse[one.parameter].removed, dense)


def test_sparsegpt_sees_what_the_sparse_model_produces(
    llama: Program, data: Context, by_gpt: Program
) -> None:
    layers = [one for one in linear_layers(llama)[0] if not one.head]
    run = Lockstep(by_gpt, data.data or ())
    for sharing in sharing_input(layers):
        run.advance_to(sharing[0].node.name)
        gram, tokens = gram_of(run, sharing[0].x.name, 6)
        for one in sharing:
            found = weight_of(by_gpt, one.parameter)
            wanted = sparsegpt(
                weight_of(llama, one.parameter), gram, Pattern(2, 4), damping=0.01, block=128
            )
            assert torch.equal(found != 0, wanted != 0)
            assert torch.allclose(found, wanted.float(), atol=2e-3)
            norms = by_gpt.sparse[one.parameter].norms
            assert norms is not None and torch.allclose(
                norms, (gram.diagonal() / tokens).sqrt().float()
            )


def test_survivors_really_change_and_the_order_of_methods_holds(
    llama: Program, data: Context, by_gpt: Program
) -> None:
    figures = by_gpt.history[-1].figures
    assert (
        figures["survivors_changed"] > 0.9
        and figures["sparsity"] == 0.5
        and figures["layers"] == 14
    )
    only_mask, better = (Sparsify(**options)(llama, data) for options in ({"update": False}, {}))
    assert only_mask.history[-1].figures["survivors_changed"] == 0
    found = [kl(llama, one, data.data or ()).mean for one in (only_mask, by_gpt, better)]
    assert found == sorted(found, reverse=True)
    assert [one.history[-1].figures["refined"] for one in (only_mask, by_gpt, better)] == [0, 0, 5]
    errors = [one.history[-1].figures["error"] for one in (only_mask, by_gpt, better)]
    assert errors == sorted(errors, reverse=True)


def test_what_was_removed_and_the_dense_model_are_kept(
    llama: Program, data: Context, by_gpt: Program
) -> None:
    assert by_gpt.cut is not None and by_gpt.cut.dense is llama and not by_gpt.cut.kept
    name, one = next(iter(by_gpt.sparse.items()))
    dense, found = weight_of(llama, name), weight_of(by_gpt, name)
    assert (str(one.pattern), one.metric) == ("2:4", "sparsegpt")
    assert one.removed is not None and torch.equal(one.removed, torch.where(found == 0, dense, 0.0))
    lean = Sparsify(metric="magnitude", keep_removed=False)(llama)
    assert all(one.removed is None and one.norms is None for one in lean.sparse.values())


@pytest.mark.parametrize(
    "kind",
    [
        "opt",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("gpt_neox", "gemma3_text", "qwen3_moe")
        ),
    ],
)
def test_other_architectures(program_of: ByKind, kind: str) -> None:
    program = program_of(kind)
    tokens = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(1))
    made = Sparsify(refine=1)(program, Context(data=samples(tokens, program)))
    assert len(made.sparse) >= 8
    assert all(
        one.pattern.describe_violations(weight_of(made, name)) is None
        for name, one in made.sparse.items()
    )


def test_sixteen_bits_hold_no_negative_zeros(llama: Program, data: Context) -> None:
    halves = {n: (p.detach() * 1e-7).half() for n, p in llama.named_parameters() if "mlp" in n}
    assert all((value == 0).any() for value in halves.values())
    small = with_parameters(llama, {n: v.float() for n, v in halves.items()})
    made = Pipeline.parse("sparsify{metric=wanda,targets=mlp}")(
        small, data
    )  # the verifier runs after it
    weight = weight_of(made, next(iter(made.sparse)))
    assert not (weight.signbit() & (weight == 0)).any()


def test_names_choose_weights(llama: Program) -> None:
    made = Pipeline.parse(
        'sparsify{metric=magnitude,targets=[mlp,"re:layers.0.*q_proj"],ignore=layers.1.mlp.down_proj}'
    )
    names = set(made.run(llama).sparse)
    mlp = {
        f"model.layers.{at}.mlp.{part}_proj.weight"
        for at in (0, 1)
        for part in ("gate", "up", "down")
    }
    assert names == (mlp | {"model.layers.0.self_attn.q_proj.weight"}) - {
        "model.layers.1.mlp.down_proj.weight"
    }
    assert (
        "lm_head.weight" in Pipeline.parse("sparsify{metric=magnitude,head=true}").run(llama).sparse
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "sparsify{metric=magnitude,targets=mlpp}",
            "targets: 'mlpp' matches no weight; did you mean 'mlp'",
        ),
        (
            "sparsify{metric=magnitude,ignore=[lm_head,q_porj]}",
            "ignore: 'q_porj' matches no weight",
        ),
        ("sparsify{metric=magnitude,targets=lm_head}", "no weight can be made sparse .*head=true"),
        (
            "sparsify{metric=magnitude,targets=embed_tokens}",
            "no weight can be made sparse .*only looked up",
        ),
        ("sparsify{metric=magnitude,pattern=3:5}", "cannot be 3:5: 64 inputs are no multiple of 5"),
        (
            "sparsify{metric=magnitude},sparsify{metric=magnitude}",
            "is sparse already: name it in ignore",
        ),
        ("sparsify", "needs calibration data"),
    ],
)
def test_what_cannot_be_is_refused(llama: Program, text: str, fault: str) -> None:
    with pytest.raises(PipelineError, match=fault):
        Pipeline.parse(text).run(llama)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("sparsify{pattern=4:2}", "expected n:m"),
        ("sparsify{pattern=half}", "no pattern"),
        ("sparsify{refine=2,update=false}", "update=true"),
        ("sparsify{refine=2,pattern=50%}", "needs a pattern n:m"),
        ("sparsify{budget=1.5}", "a part of the dense bytes"),
        ('sparsify{targets="re:("}', "no regular expression"),
        ("sparsify{metric=wnda}", "did you mean 'wanda'"),
    ],
)
def test_options_that_cannot_be(text: str, fault: str) -> None:
    with pytest.raises(PipelineError, match=fault):
        Pipeline.parse(text)


def test_a_pattern_in_a_recipe_is_no_number() -> None:
    """YAML 1.1 would read 2:4 as 124, a number to the base sixty."""
    for recipe in (
        "passes:\n  - sparsify: {pattern: 2:4}\n",
        'passes:\n  - sparsify: {pattern: "2:4"}\n',
    ):
        made = Pipeline.from_recipe(recipe)
        assert made.passes[0] == Sparsify() and Pipeline.from_recipe(made.to_recipe()) == made


def test_nan_is_named(llama: Program, data: Context) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = weight_of(llama, name).clone()
    weight[3, 7] = math.nan
    for text in (
        "sparsify{metric=magnitude}",
        "sparsify{metric=wanda,targets=layers.1.mlp.up_proj}",
    ):
        with pytest.raises(Exception, match=f"{name} is not finite at row 3, input 7"):
            Pipeline.parse(text)(with_parameters(llama, {name: weight}), data)
    infinite = with_parameters(
        llama, {"model.norm.weight": weight_of(llama, "model.norm.weight") * math.inf}
    )
    with pytest.raises(CalibrationError, match=r"inputs of lm_head.weight are not finite"):
        Pipeline.parse("sparsify{metric=wanda,targets=lm_head,head=true}")(infinite, data)


def test_damping_grows_where_it_must_and_is_told(llama: Program, data: Context) -> None:
    few = Context(
        data=(data.data or ())[:2]
    )  # 40 tokens for 64 inputs: the Gram matrices are singular
    made = Sparsify(damping=1e-8, targets=("q_proj",))(llama, few)
    assert made.history[-1].figures["more_damping"].keys() == made.sparse.keys()
    assert all(weight_of(made, name).isfinite().all() for name in made.sparse)
    with pytest.raises(
        CalibrationError, match=r"q_proj.weight: the Gram matrix of the inputs cannot be factored"
    ):
        Sparsify(damping=1e-30, targets=("q_proj",))(llama, few)


# A budget
@pytest.mark.parametrize("damage", ["kl", "output"])
def test_a_budget_leaves_dense_what_is_hurt_most(
    llama: Program, data: Context, damage: str
) -> None:
    made = Sparsify(refine=0, budget=0.8, damage=damage)(llama, data)  # type: ignore[arg-type]
    plan = made.history[-1].figures["plan"]
    assert plan["bytes"] <= plan["budget_bytes"] < plan["dense_bytes"]
    assert set(made.sparse) | set(plan["kept_dense"]) == set(plan["damages"])
    sizes = {n: weight_of(llama, n).shape for n in plan["damages"]}
    for kept in plan[
        "kept_dense"
    ]:  # none of the same size was hurt more and made sparse all the same
        assert all(
            plan["damages"][kept] >= plan["damages"][other]
            for other in made.sparse
            if sizes[other] == sizes[kept]
        )
    whole = Sparsify(refine=0)(llama, data)
    assert kl(llama, made, data.data or ()).mean < kl(llama, whole, data.data or ()).mean


def test_a_budget_that_cannot_be_held_is_refused(llama: Program, data: Context) -> None:
    with pytest.raises(EditError, match=r"all 14 weights sparse take .* bytes, the budget is"):
        Sparsify(metric="magnitude", budget=0.3)(llama, data)


# Killed
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    llama: Program, data: Context, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def dies(items, description, total=None):  # type: ignore[no-untyped-def]
        for place, item in enumerate(items):
            if place == 5:
                raise Killed
            yield item

    one = Sparsify(refine=1, offload=True)
    context = Context(data=data.data, resume=tmp_path, progress=dies)
    with pytest.raises(Killed):
        one(llama, context)
    assert len(Journal(tmp_path).names()) == 5
    again = one(llama, Context(data=data.data, resume=tmp_path))
    whole = Sparsify(refine=1)(llama, data)
    assert hash_parameters(again) == hash_parameters(whole)
    assert again.history[-1].figures["errors"] == whole.history[-1].figures["errors"]
    assert all(torch.equal(again.sparse[n].norms, whole.sparse[n].norms) for n in whole.sparse)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"refine": 1}, {"metric": "magnitude"}])
def test_new_weights_may_lie_on_the_disk(
    llama: Program, data: Context, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("secateur.passes.calibration.lockstep.LARGE", 1)
    on_disk, in_memory = (
        Sparsify(**options, offload=True)(llama, data),
        Sparsify(**options)(llama, data),
    )
    assert hash_parameters(on_disk) == hash_parameters(in_memory)
    parameters = dict(on_disk.named_parameters())
    for name, one in on_disk.sparse.items():
        removed, other = one.removed, in_memory.sparse[name].removed
        assert removed is not None and other is not None and torch.equal(removed, other)
        assert parameters[name].untyped_storage().filename and removed.untyped_storage().filename


def test_depth_goes_on_after_it(by_gpt: Program) -> None:
    smaller = drop(by_gpt, ["model.layers.0"])
    assert len(smaller.sparse) == 7 and all("layers.1" in name for name in smaller.sparse)
