"""Magnitude: how large the weights of a unit are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from secateur.graph import CoupledGroup, Program
from secateur.passes.base import Context
from secateur.passes.importance.base import Importance, MemberScores, Needs, parameter_scores


@dataclass(frozen=True)
class Magnitude(Importance):
    """Sum of |w|^p over the entries of a unit, without a root. A baseline: on language models it is
    far worse than random.

    p: 1 or 2.

    Source:
        Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627, the L1 and L2 rows of table 1.
    """

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[Needs] = "nothing"

    p: Literal[1, 2] = 2

    def members(
        self, program: Program, groups: Sequence[CoupledGroup], context: Context
    ) -> MemberScores:
        """Sums of |w|^p of each group's units, one tensor for each member.

        Args:
            program: the model.
            groups: to score.
            context: not used.

        Returns:
            by group name, tensors [units] float32.
        """

        def entry_salience(name: str, weight: Tensor) -> Tensor:
            return weight.float().abs().pow(self.p)

        return parameter_scores(program, groups, entry_salience)
