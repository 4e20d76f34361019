"""FLAP: how much a unit moves about its mean, as its consumers see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.graph import CoupledGroup, Program
from secateur.passes.base import Context
from secateur.passes.importance.base import Importance, MemberScores, Needs
from secateur.passes.importance.moments import weighted_columns


@dataclass(frozen=True)
class Flap(Importance):
    """Var(x_j) * |W[:, j]|^2 over all calibration tokens, summed over the channels j of a unit.

    What a unit gives on average can move into a bias; this is the error that remains.  To rank across layers as the
    paper does, standardise: ``score{metric=flap,normalize=standard}``.
    Source: An et al. 2024 (FLAP), arXiv:2312.11983, eq. 5 (weighted input feature variance).
    """

    name: ClassVar[str] = "flap"
    needs: ClassVar[Needs] = "activations"

    def members(self, program: Program, groups: Sequence[CoupledGroup], context: Context) -> MemberScores:
        return weighted_columns(program, groups, context, lambda moments: moments.variance)
