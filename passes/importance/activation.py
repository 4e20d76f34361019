"""Activation: how strongly a unit fires at the inputs of its consumers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.graph import CoupledGroup, Program
from secateur.passes.base import Context
from secateur.passes.calibration.observe import Reader, observe, readers
from secateur.passes.importance.base import Importance, MemberScores, Needs

OverSequence = Literal["mean", "l2", "var"]
OverBatch = Literal["l2", "mean", "var"]

# What becomes of a unit's activity over the positions of a sequence: [batch, positions, units] ->
# [batch, units].
SEQUENCE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.abs().mean(1, dtype=torch.float64),
    "l2": lambda x: torch.linalg.vector_norm(x, dim=1, dtype=torch.float64),
    "var": lambda x: x.double().var(1, correction=0),
}
# What becomes of that over all sequences, from their number, sum and sum of squares.
BATCH: Mapping[str, Callable[[int, Tensor, Tensor], Tensor]] = {
    "l2": lambda count, total, squares: squares.sqrt(),
    "mean": lambda count, total, squares: total / count,
    "var": lambda count, total, squares: (squares / count - (total / count).square()).clamp_min(0),
}


@dataclass(frozen=True)
class Activation(Importance):
    """Minitron's activation score: |x| aggregated over a sequence, then over sequences.

    A unit of several positions (a head) is reduced by L2 over them first; a unit with several
    distinct consumer inputs (a residual channel: every norm's output, once for router, experts and
    shared experts together) has one score for each, which aggregation adds.
    final_norm: whether what the head reads counts (tied to the embeddings or not), too; where
        nothing else reads a group it does.  The paper adds over the norms inside the layers.
    sequence: over positions: mean of |x|, l2, or var (of x itself, by the number of positions).
    batch: over sequences: l2, mean or var (by their number).

    Source:
        Muralidharan et al. 2024, arXiv:2407.14679, section 2.2 and table 11 (batch L2, sequence
        mean is best).
    """

    name: ClassVar[str] = "activation"
    needs: ClassVar[Needs] = "activations"

    batch: OverBatch = "l2"
    sequence: OverSequence = "mean"
    final_norm: bool = False

    def sees(self, program: Program, group: CoupledGroup) -> bool:
        """Whether a weight reads the group.

        Args:
            program: on any device.
            group: that may be pruned.
        """
        return bool(readers(program, group, self.final_norm))

    def members(
        self, program: Program, groups: Sequence[CoupledGroup], context: Context
    ) -> MemberScores:
        """Activation scores of each group, one for each activation that its consumers read.

        Args:
            program: the model.
            groups: to score.
            context: with calibration data.

        Returns:
            by group name, tensors [units] float32; groups that nothing reads are left out.
        """
        reading = {}
        for group in groups:
            group_readers = readers(program, group, self.final_norm)
            if group_readers:
                reading[group.name] = group_readers
        wanted = [reader for group_readers in reading.values() for reader in group_readers]
        totals = {
            reader: torch.zeros(len(reader.positions), dtype=torch.float64) for reader in wanted
        }
        squares = {reader: torch.zeros_like(total) for reader, total in totals.items()}
        counts = dict.fromkeys(wanted, 0)

        def observe_value(reader: Reader, value: Tensor, batch: int) -> None:
            activity = unit_activity(value, reader, batch, self.sequence).cpu()
            counts[reader] += len(activity)
            totals[reader] += activity.sum(0)
            squares[reader] += activity.square().sum(0)

        observe(program, context, totals, observe_value)
        over = BATCH[self.batch]
        scored = {
            reader: over(max(counts[reader], 1), totals[reader], squares[reader]).float()
            for reader in wanted
        }
        scores = {}
        for name, group_readers in reading.items():
            scores[name] = [scored[reader] for reader in group_readers]
        return scores


def unit_activity(
    value: Tensor, reader: Reader, batch: int, sequence: OverSequence = "mean"
) -> Tensor:
    """Each unit's activity over a sequence.

    Args:
        value: the activation; ``reader.dim`` holds the channels, the other dims are batch and
            positions in order.
        reader: the positions of the units in the activation.
        batch: number of sequences.
        sequence: aggregation over positions.

    Returns:
        [batch, units] float64.
    """
    channels_last = value.movedim(reader.dim, -1).float()
    flat = channels_last.reshape(batch, -1, channels_last.shape[-1])
    units = flat[..., reader.positions.to(flat.device)]
    if units.shape[-1] == 1:
        signed = units[..., 0]
    else:
        signed = torch.linalg.vector_norm(units, dim=-1)
    return SEQUENCE[sequence](signed)
