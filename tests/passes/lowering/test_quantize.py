"""The quantize pass: grids, the update, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from zoo.sparse import grams, keep_two_of_four, made_24

from secateur.graph import Program, SecateurError
from secateur.passes import Context, samples
from secateur.passes.calibration.gram import GramError, inverse_factor, output_error
from secateur.passes.lowering.quantize import Quantize
from secateur.passes.solvers.gptq import quantize_gptq
from secateur.passes.solvers.integer_grid import (
    GROUP,
    LIMITS,
    Grid,
    find_grid,
    grid_of,
    groups_per_row,
)

ByKind = Callable[[str], Program]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 4), (5, 63), (16, 128), (7, 300)])
def test_a_weight_on_a_grid_is_found_again(
    bits: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    weight[0] = 0
    on_grid = grid_of(weight, bits).round_to_grid(weight)
    found = find_grid(on_grid)
    assert found is not None and found.scale_NG.shape == (
        shape[0],
        groups_per_row(shape[1], found.bits),
    )
    codes = found.to_codes(on_grid)
    assert torch.equal(found.to_numbers(codes, dtype), on_grid)
    low, high = LIMITS[found.bits]
    assert low <= int(codes.min()) and int(codes.max()) <= high


@pytest.mark.parametrize("bits", [8, 4])
def test_no_number_moves_further_than_half_a_scale(bits: int) -> None:
    weight = torch.randn(9, 300)
    scale = grid_of(weight, bits).expand_scale(300)
    low, high = LIMITS[bits]
    inside = (weight / scale > low) & (weight / scale < high)
    assert inside.float().mean() > 0.98
    moved = (grid_of(weight, bits).round_to_grid(weight) - weight).abs()
    assert bool((moved <= 0.5001 * scale)[inside].all())


def test_a_smaller_scale_is_taken_only_where_it_errs_less() -> None:
    weight = torch.randn(64, GROUP)
    full = Grid(4, (weight.abs().amax(1, keepdim=True) / 7).to(torch.bfloat16).float())
    searched, plain = (
        (grid.round_to_grid(weight) - weight).square().sum(1) for grid in (grid_of(weight, 4), full)
    )
    assert bool((searched <= plain).all()) and searched.sum() < 0.95 * plain.sum()


def test_ordinary_weights_lie_on_no_grid() -> None:
    assert find_grid(torch.randn(4, 576)) is None
    assert find_grid(torch.randn(4, 576).to(torch.bfloat16)) is None
    mixed = torch.randn(3, 256)
    mixed[0] = grid_of(mixed, 8).round_to_grid(mixed)[0]
    assert find_grid(mixed) is None, "the first row alone does not decide"


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_changes_outputs_less_than_rounding_and_keeps_zeros(bits: int) -> None:
    weight = keep_two_of_four(torch.randn(48, 256))
    gram = grams(weight)
    nearest, updated = (
        grid_of(weight, bits).round_to_grid(weight),
        quantize_gptq(weight, gram, bits, 0.01),
    )
    assert bool((updated[weight == 0] == 0).all()) and not torch.signbit(updated[weight == 0]).any()
    assert output_error(weight, updated, gram) < 0.9 * output_error(weight, nearest, gram)
    assert find_grid(updated) is not None


def test_gptq_is_the_sequential_least_squares_of_the_paper() -> None:
    """By the textbook: after each column is fixed, solve for those to come exactly, on the full
    Gram matrix."""
    weight, bits, damping = torch.randn(6, 24, dtype=torch.float64), 8, 0.01
    gram = grams(weight)
    scale = grid_of(weight, bits, gram.diagonal().float()).scale_NG[:, 0].double()
    damped = gram + torch.eye(24, dtype=torch.float64) * damping * gram.diagonal().mean()
    work = weight.clone()
    for at in range(24):
        fixed = (work[:, at] / scale).round().clamp(-127, 127) * scale
        error = fixed - work[:, at]
        work[:, at] = fixed
        if at < 23:  # minimise |(work - weight) x| over the free columns, given what is fixed
            free = slice(at + 1, 24)
            work[:, free] -= torch.linalg.solve(
                damped[free, free], damped[free, at : at + 1] @ error[None]
            ).T
    assert torch.allclose(quantize_gptq(weight, gram, bits, damping).double(), work, atol=1e-6)


def test_inputs_that_never_fire_do_no_harm() -> None:
    weight = torch.randn(4, 16)
    gram = grams(weight)
    gram[3] = gram[:, 3] = 0
    assert bool(quantize_gptq(weight, gram, 8, 0.01).isfinite().all())
    with pytest.raises(GramError, match="more calibration tokens"):
        inverse_factor(torch.full((4, 4), float("nan"), dtype=torch.float64), 0.01)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_pass_puts_every_linear_layer_on_a_grid(
    program_of: ByKind, kind: str, bits: int
) -> None:
    program = program_of(kind)
    after = Quantize(bits=bits)(program)
    figures = after.history[-1].figures
    before, now = dict(program.named_parameters()), dict(after.named_parameters())
    assert figures["layers"] == len(figures["errors"]) >= 8
    for name, value in now.items():
        if name in figures["errors"]:
            assert find_grid(value.detach()) is not None and not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name])
    limit = {8: 0.02, 4: 0.25}[bits]
    assert 0 < figures["error"] < limit


def test_a_2_4_model_stays_2_4(llama: Program) -> None:
    sparse = made_24(llama)
    ids = torch.randint(0, 128, (6, 24))
    for options in ({"bits": 8}, {"bits": 4, "method": "gptq"}):
        after = Quantize(**options)(sparse, Context(data=samples(ids, sparse)))
        for name, value in sparse.named_parameters():
            assert bool((after.gm.get_parameter(name)[value == 0] == 0).all()), name


def test_gptq_on_the_graph_beats_rounding_on_what_the_model_says(llama: Program) -> None:
    ids = torch.randint(0, 128, (12, 32))
    context = Context(data=samples(ids, llama))
    wanted = logits(llama, ids)
    gaps = [
        (logits(Quantize(bits=4, method=method)(llama, context), ids) - wanted).norm()
        / wanted.norm()
        for method in ("rtn", "gptq")
    ]
    assert gaps[1] < 0.9 * gaps[0]


def logits(program: Program, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return program(input_ids=ids).logits


def test_the_head_and_the_table_of_embeddings_are_told_apart(program_of: ByKind) -> None:
    tied, free = program_of("gpt2"), program_of("llama")
    left = Quantize()(free).history[-1].figures["left_alone"]
    assert (
        "head=true" in left["lm_head.weight"] and "looked up" in left["model.embed_tokens.weight"]
    )
    assert "lm_head.weight" in Quantize(head=True)(free).history[-1].figures["errors"]
    figures = Quantize(head=True)(tied).history[-1].figures
    assert "table of embeddings" in figures["left_alone"]["transformer.wte.weight"]


def test_nothing_is_done_without_weights_or_data(llama: Program) -> None:
    with pytest.raises(SecateurError, match="calibration data"):
        Quantize(method="gptq")(llama)


def test_the_output_error_is_a_ratio_of_norms() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(rows, 6, generator=generator) for rows in (50, 4))
    changed = weight + 0.1 * torch.randn(4, 6, generator=generator)
    wanted = float((x @ (changed - weight).T).norm() / (x @ weight.T).norm())
    assert output_error(weight, changed, (x.T @ x).double()) == pytest.approx(wanted, rel=1e-4)
    assert output_error(weight, 1.5 * weight, (x.T @ x).double()) == pytest.approx(0.5, rel=1e-4)
