"""Activation: how strongly a unit fires at the inputs of its consumers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.graph import CoupledGroup, Program
from secateur.passes.base import Context
from secateur.passes.importance.base import Importance, MemberScores, Needs
from secateur.passes.importance.observe import Reader, observe, readers


@dataclass(frozen=True)
class Activation(Importance):
    """Minitron's activation score: mean of |x| over a sequence, L2 over sequences.

    A unit of several positions (a head) is reduced by L2 over them first; a unit with several distinct consumer inputs
    (a residual channel: every norm's output) has one score for each, which aggregation adds.
    Source: Muralidharan et al. 2024, arXiv:2407.14679, section 2.2 and table 11 (batch L2, sequence mean).
    """

    name: ClassVar[str] = "activation"
    needs: ClassVar[Needs] = "activations"

    def members(self, program: Program, groups: Sequence[CoupledGroup], context: Context) -> MemberScores:
        reading = {group.name: found for group in groups if (found := readers(program, group))}
        wanted = [reader for found in reading.values() for reader in found]
        squares = {reader: torch.zeros(len(reader.positions), dtype=torch.float64) for reader in wanted}

        def see(reader: Reader, value: Tensor, batch: int) -> None:
            squares[reader] += unit_activity(value, reader, batch).square().sum(0).cpu()

        observe(program, context, squares, see)
        return {name: [squares[r].sqrt().float() for r in found] for name, found in reading.items()}


def unit_activity(value: Tensor, reader: Reader, batch: int) -> Tensor:
    """Mean over a sequence of each unit's activity.

    Args: value: the activation; ``reader.dim`` holds the channels, the other dims are batch and positions in order.
    Returns: [batch, units] float64.
    """
    channels_last = value.movedim(reader.dim, -1).float()
    flat = channels_last.reshape(batch, -1, channels_last.shape[-1])
    units = flat[..., reader.positions.to(flat.device)]
    activity: Tensor = torch.linalg.vector_norm(units, dim=-1)
    return activity.mean(1, dtype=torch.float64)
