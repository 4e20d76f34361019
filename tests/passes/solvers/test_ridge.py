"""The least-squares fit against closed forms, and every way in which it declines."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from secateur.passes.solvers.ridge import DAMPINGS, Products, fit_damped


def rows(count: int, inputs: int, seed: int) -> Tensor:
    return torch.randn(
        count, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def products(x: Tensor, r: Tensor, ones: bool = False) -> Products:
    made = Products(x.shape[1], r.shape[1], ones, x.device)
    for start in range(0, len(x), 7):
        made.add_rows(x[start : start + 7], r[start : start + 7])
    return made


def test_the_solution_is_ridge_regression() -> None:
    x, r = rows(40, 5, 0), rows(40, 3, 1)
    for damping in (1e-3, 0.1, 10.0):
        found = products(x, r).solve(damping)
        energy = x.square().sum(0)
        penalty = damping * (energy + 1e-3 * energy.mean())
        expected = torch.linalg.solve(x.T @ x + penalty.diag(), x.T @ r).T
        torch.testing.assert_close(found, expected)


def test_a_large_damping_changes_nothing_and_a_small_one_is_plain_least_squares() -> None:
    x, r = rows(40, 5, 0), rows(40, 3, 1)
    nothing, plain = products(x, r).solve(1e12), products(x, r).solve(1e-12)
    assert nothing is not None and plain is not None
    assert float(nothing.abs().max()) < 1e-10
    torch.testing.assert_close(plain.T, torch.linalg.lstsq(x, r).solution)


def test_the_error_is_the_sum_of_squares_that_is_left() -> None:
    x, r, delta = rows(40, 5, 0), rows(40, 3, 1), rows(3, 5, 2)
    assert products(x, r).error(delta) == pytest.approx(float((r - x @ delta.T).square().sum()))
    assert products(x, r).error(torch.zeros_like(delta)) == pytest.approx(float(r.square().sum()))


def test_the_scale_of_an_input_hardly_matters() -> None:
    x, r = rows(40, 5, 0), rows(40, 3, 1)
    scale = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0], dtype=x.dtype)
    plain, scaled = products(x, r).solve(0.1), products(x * scale, r).solve(0.1)
    assert plain is not None and scaled is not None
    torch.testing.assert_close(scaled * scale, plain, rtol=0.02, atol=1e-3)


def test_a_bias_is_not_damped() -> None:
    x = rows(50, 4, 0)
    x = x - x.mean(0)
    r = torch.tensor([2.0, -3.0], dtype=x.dtype).expand(50, 2)
    found = products(x, r, ones=True).solve(1e6)
    assert found is not None
    torch.testing.assert_close(found[:, -1], r[0])
    assert found.shape == (2, 5)


def test_products_of_two_parts_are_those_of_the_whole() -> None:
    x, r = rows(40, 5, 0), rows(40, 3, 1)
    whole, both = (
        products(x, r, True),
        products(x[:21], r[:21], True).merge(products(x[21:], r[21:], True)),
    )
    torch.testing.assert_close(both.gram_KK, whole.gram_KK)
    torch.testing.assert_close(both.cross_NK, whole.cross_NK)
    assert both.energy == pytest.approx(whole.energy) and both.rows == whole.rows == 40


def test_what_can_be_explained_is_found_and_fitted_on_all_rows() -> None:
    x, weight = rows(60, 5, 0), rows(3, 5, 1)
    r = x @ weight.T + 0.01 * rows(60, 3, 2)
    made = fit_damped(products(x[:40], r[:40]), products(x[40:], r[40:]))
    assert made.delta_NK is not None and made.after < 0.01 * made.before
    torch.testing.assert_close(made.delta_NK, products(x, r).solve(made.damping))


def test_noise_is_left_alone_or_damped_until_the_held_back_rows_gain() -> None:
    for seed in range(20):
        seen = products(rows(12, 10, seed), rows(12, 2, seed + 100))
        held = products(rows(30, 10, seed + 200), rows(30, 2, seed + 300))
        made = fit_damped(seen, held)
        assert made.after <= made.before == held.energy
        assert (made.delta_NK is None) == (made.after == made.before)


def test_residuals_that_turn_around_are_left_alone() -> None:
    x, weight = rows(40, 5, 0), rows(3, 5, 1)
    made = fit_damped(products(x, x @ weight.T), products(x, -x @ weight.T))
    assert made.delta_NK is None and made.after == made.before


def test_no_input_at_all_cannot_be_factored_and_is_left_alone() -> None:
    x, r = torch.zeros(10, 4, dtype=torch.float64), rows(10, 2, 0)
    assert products(x, r).solve(0.1) is None
    assert fit_damped(products(x, r), products(x, r)).delta_NK is None


def test_repeated_inputs_need_the_damping_and_get_it() -> None:
    x = rows(40, 1, 0).expand(40, 6)
    r = x[:, :2].clone()
    made = fit_damped(products(x[:30], r[:30]), products(x[30:], r[30:]))
    assert made.delta_NK is not None and bool(made.delta_NK.isfinite().all())
    assert made.after < 1e-3 * made.before


def test_the_damping_is_the_best_for_the_held_back_rows_before_they_lose() -> None:
    gains = 0
    for seed in range(30):
        x, weight = rows(60, 10, seed), 0.2 * rows(2, 10, seed + 100)
        r = x @ weight.T + rows(60, 2, seed + 200)
        seen, held = products(x[:15], r[:15]), products(x[15:], r[15:])
        made = fit_damped(seen, held)
        errors = [
            math.inf if (d := seen.solve(damping)) is None else held.error(d)
            for damping in DAMPINGS
        ]
        best = errors.index(min(errors)) if min(errors) < held.energy else None
        assert (made.delta_NK is None) == (best is None)
        if best is not None:
            assert (made.damping, made.after) == (DAMPINGS[best], errors[best])
            gains += best < len(DAMPINGS) - 1
    assert gains > 10, "somewhere a weaker damping was worse, and was not taken"


def test_rows_that_chose_nothing_judge_the_final_fit() -> None:
    x, weight = rows(90, 5, 0), rows(3, 5, 1)
    r = x @ weight.T
    seen, held = products(x[:30], r[:30]), products(x[30:60], r[30:60])
    made = fit_damped(seen, held, products(x[60:], r[60:]))
    assert made.delta_NK is not None and made.after < 1e-3 * made.before
    torch.testing.assert_close(made.delta_NK, seen.merge(held).solve(made.damping))
    judge = products(x[60:], -r[60:])
    worse = fit_damped(seen, held, judge)
    assert worse.delta_NK is None and worse.after == worse.before == judge.energy
