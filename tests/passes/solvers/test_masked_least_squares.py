"""Least squares under a mask, against a solution row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.passes.solvers.masked_least_squares import DAMPING, EVERY, STEPS, descend, fit_masked
from secateur.passes.solvers.ridge import FLOOR, Products


def products(x_TK: Tensor, r_TN: Tensor) -> Products:
    made = Products(x_TK.shape[1], r_TN.shape[1], False, torch.device("cpu"))
    made.add_rows(x_TK, r_TN)
    return made


def problem(rows: int = 200, noise: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs of very different sizes, residuals that a masked matrix explains in part,
    and the mask."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator) + 2 * torch.eye(12)
    x_TK = torch.randn(rows, 12, generator=generator) @ mix * torch.logspace(-2, 1, 12)
    mask_NK = torch.rand(5, 12, generator=generator) < 0.5
    weight_NK = torch.randn(5, 12, generator=generator) / torch.logspace(-2, 1, 12)
    return x_TK, x_TK @ weight_NK.T + noise * torch.randn(rows, 5, generator=generator), mask_NK


def test_many_steps_end_at_the_solution_of_each_row() -> None:
    x_TK, r_TN, mask_NK = problem()
    found_NK = next(
        delta for step, delta in enumerate(descend(products(x_TK, r_TN), mask_NK), 1) if step == 60
    )
    energy_K = x_TK.square().sum(0).double()
    energy_K = energy_K + FLOOR * energy_K.mean()
    for row, mask_K in enumerate(mask_NK):
        gram = (x_TK.T @ x_TK).double()[mask_K][:, mask_K] + (DAMPING * energy_K[mask_K]).diag()
        wanted = torch.linalg.solve(gram, (x_TK.T @ r_TN[:, row]).double()[mask_K]).float()
        torch.testing.assert_close(found_NK[row, mask_K], wanted, rtol=2e-3, atol=1e-5)
    assert not found_NK[~mask_NK].any()


def test_the_rows_held_back_say_when_to_stop() -> None:
    x_TK, r_TN, mask_NK = problem(60)
    seen, held = products(x_TK[:48], r_TN[:48]), products(x_TK[48:], r_TN[48:])
    found = fit_masked(seen, held, mask_NK)
    assert found.delta_NK is not None and not found.delta_NK[~mask_NK].any()
    assert found.steps % 4 == 0 and found.after < 0.7 * found.before == 0.7 * held.energy
    part = next(
        delta for step, delta in enumerate(descend(seen, mask_NK), 1) if step == found.steps
    )
    assert held.error(part.double()) == found.after


def test_the_steps_are_taken_again_on_all_rows() -> None:
    x_TK, r_TN, mask_NK = problem(60)
    seen, held = products(x_TK[:48], r_TN[:48]), products(x_TK[48:], r_TN[48:])
    found = fit_masked(seen, held, mask_NK)
    assert found.delta_NK is not None
    after = [
        next(d for step, d in enumerate(descend(p, mask_NK), 1) if step == found.steps)
        for p in (seen, held)
    ]
    whole = next(
        d for step, d in enumerate(descend(products(x_TK, r_TN), mask_NK), 1) if step == found.steps
    )
    torch.testing.assert_close(found.delta_NK, whole)
    assert all(float((found.delta_NK - part).abs().max()) > 1e-3 for part in after)


def test_as_many_steps_as_serve_the_rows_held_back() -> None:
    """Few noisy rows: the rows to fit on would take every step, those held back lose after some."""
    stopped = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x_TK = torch.randn(40, 12, generator=generator) * torch.logspace(-1, 1, 12)
        weight_NK = 0.3 * torch.randn(5, 12, generator=generator) / torch.logspace(-1, 1, 12)
        r_TN = x_TK @ weight_NK.T + torch.randn(40, 5, generator=generator)
        mask_NK = torch.ones(5, 12, dtype=torch.bool)
        seen, held = products(x_TK[:14], r_TN[:14]), products(x_TK[14:], r_TN[14:])
        found = fit_masked(seen, held, mask_NK)
        steps = [
            d for _, d in zip(range(found.steps + EVERY), descend(seen, mask_NK), strict=False)
        ]
        errors = [
            held.energy,
            *(held.error(steps[at].double()) for at in range(EVERY - 1, len(steps), EVERY)),
        ]
        assert errors[-2] == found.after and errors[:-1] == sorted(errors[:-1], reverse=True)
        if found.steps < STEPS:
            assert errors[-1] >= errors[-2]
            stopped += 1
    assert stopped > 3


def test_residuals_that_the_inputs_do_not_explain_change_nothing() -> None:
    x_TK, _, mask_NK = problem(60)
    noise_TN = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    found = fit_masked(
        products(x_TK[:20], noise_TN[:20]), products(x_TK[20:], noise_TN[20:]), mask_NK
    )
    assert found.delta_NK is None and found.after == found.before


def test_inputs_that_never_fire_and_rows_without_entries_stay_finite() -> None:
    x_TK, r_TN, mask_NK = problem(60)
    x_TK[:, 3], mask_NK[2] = 0, False
    found = fit_masked(products(x_TK[:48], r_TN[:48]), products(x_TK[48:], r_TN[48:]), mask_NK)
    assert (
        found.delta_NK is not None
        and bool(found.delta_NK.isfinite().all())
        and not found.delta_NK[2].any()
    )
