"""Ridge least squares on accumulated products, with the damping chosen on rows that were held back.

Dims: T rows (tokens), K inputs, N outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
FLOOR = 1e-3


class Products:
    """Sums over rows of what a least-squares fit of residuals ``r_TN`` on inputs ``x_TK`` needs.

    Products of one call are taken in float32 or better and summed in float64.  ``ones`` adds an
    input that is always 1, whose coefficient is a bias and is not damped.
    """

    def __init__(self, inputs: int, outputs: int, ones: bool, device: torch.device) -> None:
        width = inputs + ones
        self.inputs = inputs
        self.ones = ones
        self.rows = 0
        self.gram_KK = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross_NK = torch.zeros(outputs, width, dtype=torch.float64, device=device)
        self.energy = 0.0

    def add_rows(self, x_TK: Tensor, r_TN: Tensor) -> None:
        """Count some rows.

        Args:
            x_TK: inputs.
            r_TN: residuals.
        """
        wide = torch.promote_types(x_TK.dtype, torch.float32)
        x_TK = x_TK.to(wide)
        r_TN = r_TN.to(wide)
        if self.ones:
            x_TK = torch.cat([x_TK, x_TK.new_ones(len(x_TK), 1)], 1)
        self.gram_KK += x_TK.T @ x_TK
        self.cross_NK += r_TN.T @ x_TK
        self.energy += float(r_TN.double().square().sum())
        self.rows += len(x_TK)

    def merge(self, other: Products) -> Products:
        """The products over the rows of both.

        Args:
            other: of the same shapes.
        """
        both = Products(self.inputs, len(self.cross_NK), self.ones, self.gram_KK.device)
        both.gram_KK = self.gram_KK + other.gram_KK
        both.cross_NK = self.cross_NK + other.cross_NK
        both.energy = self.energy + other.energy
        both.rows = self.rows + other.rows
        return both

    def error(self, delta_NK: Tensor) -> float:
        """Sum of squares of ``r - x delta^T``; ``energy`` for a delta of zero.

        Args:
            delta_NK: correction.
        """
        explained = (
            2 * (delta_NK * self.cross_NK).sum() - (delta_NK * (delta_NK @ self.gram_KK)).sum()
        )
        return self.energy - float(explained)

    def solve(self, damping: float) -> Tensor | None:
        """delta_NK that minimises ``error(delta) + damping * sum(s_K * delta_NK^2)``; None where
        that fails.

        s_K: the energy of each input, so that the penalty is the same whatever an input's scale;
        inputs that hardly ever fire get at least a thousandth of the mean.

        Args:
            damping: relative to the energy of each input.

        Source:
            Hoerl & Kennard 1970, on standardised inputs, with the penalty on the correction, so
            that a large damping changes nothing.
        """
        penalty = self.gram_KK.diagonal().clone()
        penalty[: self.inputs] += FLOOR * penalty[: self.inputs].mean()
        penalty[self.inputs :] = 0
        factor, failed = torch.linalg.cholesky_ex(self.gram_KK + (damping * penalty).diag())
        if bool(failed):
            return None
        delta_NK = torch.cholesky_solve(self.cross_NK.T, factor).T
        if bool(torch.isfinite(delta_NK).all()):
            return delta_NK
        return None


@dataclass(frozen=True)
class Fit:
    """A correction and what it does to the held-back rows.

    delta_NK: to add to the weight (and bias, the last column), or None: nothing makes the held-back
        rows better.
    damping: relative to the energy of each input.
    before, after: sums of squares on the rows that judged.
    """

    delta_NK: Tensor | None
    damping: float
    before: float
    after: float


def fit_damped(seen: Products, held: Products, judge: Products | None = None) -> Fit:
    """The correction of the damping that serves the held-back rows best, fitted again on these and
    the others.

    Dampings are tried from strong to weak until the held-back rows lose again or the solution
    fails.  A correction is given only where the one fitted without the held-back rows makes these
    strictly better, and where the final one does so with the rows that judge.

    Args:
        seen: sums over the rows to fit on.
        held: sums over the rows that choose the damping.
        judge: rows that neither choose the damping nor are fitted; None: there are none.
    """
    after = held.energy
    damping = 0.0
    for weaker in DAMPINGS:
        delta = seen.solve(weaker)
        if delta is None:
            error = math.inf
        else:
            error = held.error(delta)
        if error < after:
            after = error
            damping = weaker
        elif delta is None or damping:
            break
    delta = None
    if damping:
        delta = seen.merge(held).solve(damping)
    if judge is None:
        before = held.energy
    else:
        before = judge.energy
    if delta is not None and judge is not None:
        after = judge.error(delta)
    if delta is None or not after < before:
        return Fit(None, 0.0, before, before)
    return Fit(delta, damping, before, after)
