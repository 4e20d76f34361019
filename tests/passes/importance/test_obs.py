"""OBS against least squares: what it says is the error that a refit leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.graph import Program, coupled_groups
from secateur.passes import CalibrationError, Context, Pipeline, Score, samples
from secateur.passes.importance import Obs
from secateur.passes.importance.obs import invert_damped, obs_errors, removal_errors


def problem(rows: int, channels: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    maker = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=maker, dtype=torch.float64)
    x = torch.randn(rows, channels, generator=maker, dtype=torch.float64) @ mix
    return x, torch.randn(outputs, channels, generator=maker, dtype=torch.float64)


def refit_error(x: Tensor, weight: Tensor, gone: list[int]) -> float:
    """Mean squared error a row, by least squares on the columns that stay."""
    stays = [j for j in range(x.shape[1]) if j not in gone]
    wanted = x @ weight.T
    fitted = (
        x[:, stays] @ torch.linalg.lstsq(x[:, stays], wanted).solution
        if stays
        else torch.zeros_like(wanted)
    )
    return float((wanted - fitted).square().sum() / len(x))


@settings(max_examples=25, deadline=None)
@given(
    units=st.integers(2, 5),
    size=st.integers(1, 3),
    outputs=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_score_is_the_error_that_least_squares_leaves(
    units: int, size: int, outputs: int, seed: int
) -> None:
    x, weight = problem(60, units * size, outputs, seed)
    positions = torch.randperm(units * size, generator=torch.Generator().manual_seed(seed)).view(
        units, size
    )
    found = obs_errors(weight, torch.linalg.inv(x.T @ x / len(x)), positions)
    assert found.tolist() == pytest.approx(
        [refit_error(x, weight, unit.tolist()) for unit in positions], rel=1e-6
    )


@settings(max_examples=15, deadline=None)
@given(units=st.integers(2, 7), size=st.integers(1, 2), seed=st.integers(0, 99))
def test_one_at_a_time_is_greedy_least_squares(units: int, size: int, seed: int) -> None:
    x, weight = problem(80, units * size, 3, seed)
    positions = torch.arange(units * size).view(units, size)
    found = removal_errors(weight, torch.linalg.inv(x.T @ x / len(x)), positions, at_once=1)
    gone, left, lost = list[int](), list(range(units)), 0.0
    while left:
        errors = {unit: refit_error(x, weight, [*gone, *positions[unit].tolist()]) for unit in left}
        best = min(errors, key=errors.__getitem__)
        assert float(found[best]) >= (errors[best] - lost) * (1 - 1e-5)
        assert all(found[best] < found[unit] for unit in left if unit != best)
        gone += positions[best].tolist()
        left.remove(best)
        lost = errors[best]


def test_of_two_equal_channels_one_shot_drops_both_and_progressive_one() -> None:
    x, weight = problem(200, 4, 3)
    x[:, 1] = x[:, 0] + 1e-4 * torch.randn(200, dtype=torch.float64)
    weight[:, :2] *= 10
    inverse, positions = torch.linalg.inv(x.T @ x / 200), torch.arange(4)[:, None]
    assert set(obs_errors(weight, inverse, positions).argsort()[:2].tolist()) == {0, 1}
    assert (
        len({0, 1} & set(removal_errors(weight, inverse, positions, 1).argsort()[:3].tolist())) == 1
    )


def test_several_at_once_rank_like_one_at_a_time_where_units_are_independent() -> None:
    weight, inverse = torch.randn(3, 10, dtype=torch.float64), torch.eye(10, dtype=torch.float64)
    positions = torch.arange(10)[:, None]
    ranks = [removal_errors(weight, inverse, positions, n).argsort().tolist() for n in (1, 4, 10)]
    assert ranks[0] == ranks[1] == ranks[2] == weight.square().sum(0).argsort().tolist()


def test_a_matrix_without_a_factor_is_damped_until_it_has_one() -> None:
    bad = torch.diag(torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64))
    found = invert_damped(bad, 1e-3)
    assert bool(found.isfinite().all()) and bool((torch.linalg.eigvalsh(found) > 0).all())
    assert bool(invert_damped(torch.zeros(3, 3, dtype=torch.float64), 0.01).isfinite().all())
    with pytest.raises(CalibrationError, match="not finite"):
        invert_damped(bad * torch.nan, 0.01)


def test_closed_form_in_a_program(two_layers: Program, ids: Tensor) -> None:
    model = two_layers.source.model
    x = model.hidden(ids).detach().flatten(0, 1).double()
    gram = x.T @ x / len(x)
    expected = model.down.weight.double().square().sum(0) / invert_damped(gram, 0.1).diagonal()
    context = Context(data=samples([ids], two_layers))
    found = Score(Obs(progressive=False, damping=0.1))(two_layers, context).scores["mlp#2"]
    torch.testing.assert_close(found, expected.float().detach(), rtol=1e-4, atol=1e-7)


def test_batches_and_padding_change_nothing(llama: Program, ids: Tensor) -> None:
    pad, ones = torch.full((5, 4), 9), torch.ones_like(ids)
    padded = {
        "input_ids": torch.cat([pad, ids], 1),
        "attention_mask": torch.cat([pad * 0, ones], 1),
    }
    found = [
        Score(Obs())(llama, Context(data=samples(data, llama))).scores
        for data in ([ids], ids.split(1), [padded])
    ]
    assert all(found[0][name].equal(other[name]) for other in found[1:] for name in found[0])
    free = [g for g in coupled_groups(llama) if g.locked is None]
    assert {g.name for g in free if g.family in ("mlp", "kv_heads", "hidden")} <= set(found[0])
    heads = next(g for g in free if g.family == "kv_heads")
    assert len(found[0][heads.name]) == heads.units and float(found[0][heads.name].min()) > 0


def test_it_is_named_in_a_pipeline() -> None:
    (score,) = Pipeline.parse("score{metric=obs{progressive=false,at_once=4,damping=0.1}}").passes
    assert score == Score(Obs(progressive=False, at_once=4, damping=0.1))


def test_the_damping_is_in_units_of_the_mean_diagonal() -> None:
    x, _ = problem(40, 5, 2)
    for scale in (1e-6, 1.0, 1e6):
        gram = scale * x.T @ x
        expected = torch.linalg.inv(
            gram + 0.03 * gram.diagonal().mean() * torch.eye(5, dtype=gram.dtype)
        )
        torch.testing.assert_close(invert_damped(gram, 0.03), expected, rtol=1e-6, atol=0)
