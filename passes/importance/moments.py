"""Moments of consumer inputs, weighted by the columns that read them: the base of Wanda, FLAP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.graph import CoupledGroup, Member, Program
from secateur.passes.base import Context
from secateur.passes.calibration.observe import READS, Reader, consumers, observe
from secateur.passes.importance.base import MemberScores, distinct_members


@dataclass
class Moments:
    """Sums over all calibration tokens of one activation, by channel: [channels] float64."""

    count: int
    total: Tensor
    squares: Tensor

    @property
    def mean_square(self) -> Tensor:
        """Mean of the squares over the calibration tokens: [channels] float64."""
        return self.squares / max(self.count, 1)

    @property
    def variance(self) -> Tensor:
        """Mean of the squared distance from the mean."""
        return (self.mean_square - (self.total / max(self.count, 1)).square()).clamp_min(0)


def weigh_columns(
    program: Program,
    groups: Sequence[CoupledGroup],
    context: Context,
    statistic: Callable[[Moments], Tensor],
    over_channels: Callable[[Tensor], Tensor] = lambda channels_Uk: channels_Uk.sum(1),
) -> MemberScores:
    """For each consumer of a group: sum over a unit's channels j of ``statistic(x_j) * |W[:,
    j]|^2``.

    Args:
        program: the model.
        groups: to score.
        context: with calibration data.
        statistic: of the moments of an activation, [channels].
        over_channels: what to do instead of the sum, [units, channels of each] to [units].

    Returns:
        by group name, one tensor [units] float32 for each weight that consumes the group and each
        of its inputs.
    """
    pairs = {}
    for group in groups:
        if pairs_of_group := pairs_of(program, group):
            pairs[group.name] = pairs_of_group
    seen: dict[tuple[object, int], Moments] = {}

    def observe_value(reader: Reader, value: Tensor, batch: int) -> None:
        rows = value.movedim(reader.dim, -1).double().flatten(0, -2)
        new = Moments(len(rows), rows.sum(0), rows.square().sum(0))
        old = seen.get((reader.node, reader.dim))
        if old is not None:
            new = Moments(old.count + new.count, old.total + new.total, old.squares + new.squares)
        seen[reader.node, reader.dim] = new

    inputs = {}
    for group_pairs in pairs.values():
        for _, input_reader in group_pairs:
            inputs[input_reader.node, input_reader.dim] = input_reader
    observe(program, context, list(inputs.values()), observe_value)
    named = dict(program.named_parameters())
    norms: dict[tuple[str, int], Tensor] = {}
    scores: dict[str, list[Tensor]] = {}
    for name, pairs_of_group in pairs.items():
        for member, reader in pairs_of_group:
            weight = named[member.parameter].detach()
            key = (member.parameter, member.dim)
            norm = norms.setdefault(key, _column_squares(weight, member.dim))
            by_channel = norm * statistic(seen[reader.node, reader.dim]).to(norm.device)
            units = over_channels(by_channel[member.positions.to(norm.device)])
            scores.setdefault(name, []).append(units.float().cpu())
    return scores


def pairs_of(program: Program, group: CoupledGroup) -> list[tuple[Member, Reader]]:
    """Each weight that consumes the group, with each activation that it meets; the head counts,
    tied or not.

    Args:
        program: the model.
        group: to be scored.

    Returns:
        (member, activation) pairs.
    """
    pairs: list[tuple[Member, Reader]] = []
    for member in distinct_members(group):
        if member.role in READS:
            for node, dim in consumers(program.gm, member.parameter, member.dim):
                pairs.append((member, Reader(node, dim, member.positions)))
    return pairs


def _column_squares(weight: Tensor, dim: int) -> Tensor:
    """|W[:, j]|^2 of every position along ``dim``: [positions] float64."""
    others = []
    for d in range(weight.dim()):
        if d != dim:
            others.append(d)
    return weight.float().square().sum(others, dtype=torch.float64)
