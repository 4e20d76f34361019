"""Random scores: the control that every estimator must beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.graph import CoupledGroup, Program
from secateur.passes.base import Context
from secateur.passes.importance.base import Importance, MemberScores, Needs


@dataclass(frozen=True)
class Random(Importance):
    """Uniform in [0, 1), from the seed and the group's name, so that other groups change
    nothing."""

    name: ClassVar[str] = "random"
    needs: ClassVar[Needs] = "nothing"

    def members(
        self, program: Program, groups: Sequence[CoupledGroup], context: Context
    ) -> MemberScores:
        """Uniform random scores, drawn from the seed and each group's name.

        Args:
            program: not used.
            groups: to score.
            context: its seed is used.

        Returns:
            by group name, one tensor [units] float32 in [0, 1).
        """
        scores = {}
        for group in groups:
            scores[group.name] = [
                torch.rand(group.units, generator=_make_generator(group.name, context))
            ]
        return scores


def _make_generator(name: str, context: Context) -> torch.Generator:
    """The generator of one group's scores."""
    digest = hashlib.sha256(f"{context.seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
