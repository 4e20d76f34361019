"""FLAP: how much a unit moves about its mean, as its consumers see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.graph import CoupledGroup, Program
from secateur.passes.base import Context
from secateur.passes.importance.base import Importance, MemberScores, Needs
from secateur.passes.importance.moments import pairs_of, weigh_columns


@dataclass(frozen=True)
class Flap(Importance):
    """Var(x_j) * |W[:, j]|^2 over all calibration tokens, summed over the channels j of a unit.

    What a unit gives on average can move into a bias; this is the error that remains.
    joint: the scale on which the paper ranks heads and neurons of all layers together: the channels
        of a group are standardised (mean 0, variance 1), and a unit is the mean of its channels.
        Then
        ``prune-width{ratio=0.2,families=[kv_heads,mlp],uniform=false,ranking=global,normalize=none}``
        counts a head as
        the parameters that go with it, 512/3 neurons in LLaMA-7B.

    Source:
        An et al. 2024 (FLAP), arXiv:2312.11983, eq. 5 (weighted input feature variance) and section
        3.3 (standardised, adaptive over layers and modules).
    """

    name: ClassVar[str] = "flap"
    needs: ClassVar[Needs] = "activations"

    joint: bool = False

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
        """FLAP scores of each group, one tensor for each weight that consumes it.

        Args:
            program: the model.
            groups: to score.
            context: with calibration data.

        Returns:
            by group name, tensors [units] float32.
        """
        if self.joint:
            over_channels = standardized_means
        else:
            over_channels = channel_sums
        return weigh_columns(
            program, groups, context, lambda moments: moments.variance, over_channels
        )


def channel_sums(channels_Uk: Tensor) -> Tensor:
    """[units]: the sum of each unit's channels.

    Args:
        channels_Uk: [units, channels of a unit].

    Returns:
        [units].
    """
    return channels_Uk.sum(1)


def standardized_means(channels_Uk: Tensor) -> Tensor:
    """[units]: the mean of each unit's channels after all channels were brought to mean 0 and
    variance 1.

    Args:
        channels_Uk: [units, channels of a unit].

    Returns:
        [units].
    """
    spread = channels_Uk.std()  # by one less than their number, as the authors' code does
    centred = channels_Uk - channels_Uk.mean()
    return (centred / torch.where(spread > 0, spread, torch.ones_like(spread))).mean(1)
