"""Wanda-sp: how much a unit adds to the outputs of its consumers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.graph import CoupledGroup, Program
from secateur.passes.base import Context
from secateur.passes.importance.base import Importance, MemberScores, Needs
from secateur.passes.importance.moments import pairs_of, weigh_columns


@dataclass(frozen=True)
class Wanda(Importance):
    """|W[:, j]|^2 * E[x_j^2] over all calibration tokens, summed over the channels j of a unit.

    It is the error that dropping the unit alone makes in its consumer's output, were channels
    independent.

    Source:
        Sun et al. 2024 (Wanda), arXiv:2306.11695, eq. 1, by columns as in An et al. 2024 (FLAP),
        arXiv:2312.11983 (their Wanda-sp), squared.
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar[Needs] = "activations"

    def sees(self, program: Program, group: CoupledGroup) -> bool:
        """Whether a weight reads the group.

        Args:
            program: on any device.
            group: that may be pruned.
        """
        return bool(pairs_of(program, group))

    def members(
        self, program: Program, groups: Sequence[CoupledGroup], context: Context
    ) -> MemberScores:
        """Wanda scores of each group, one tensor for each weight that consumes it.

        Args:
            program: the model.
            groups: to score.
            context: with calibration data.

        Returns:
            by group name, tensors [units] float32.
        """
        return weigh_columns(program, groups, context, lambda moments: moments.mean_square)
