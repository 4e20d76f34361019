"""OBS: by how much the outputs of its consumers move when a unit goes and the others make up for
it.

Dims: K channels of a consumer's input, R its outputs, U units of k channels each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from secateur.graph import CoupledGroup, Member, Program
from secateur.passes.base import Context, Cost
from secateur.passes.calibration.data import CalibrationError
from secateur.passes.calibration.lockstep import Lockstep
from secateur.passes.calibration.observe import Reader
from secateur.passes.importance.base import Importance, MemberScores, Needs
from secateur.passes.importance.moments import pairs_of

UPDATES = 128  # of the inverse in a progressive ranking, unless at_once says otherwise
NOTHING = 1e-30  # mean square of an input that never fires


@dataclass(frozen=True)
class Obs(Importance):
    """The squared error of its consumers' outputs, a token, that is left when the unit goes and the
    rest is refitted.

    With H = E[x x^T] over all calibration tokens and J the channels of a unit: tr(W_J
    ((H^-1)_JJ)^-1 W_J^T).  Each weight that consumes a group gives one score.  Where rows go to
    different experts, H is that of all rows.

    progressive: drop the least unit, refit the others, and score these again: a unit's score is the
        error at which its turn came, so that the ranking is the order of removal.  One-shot scores
        overrate units that stand in for each other.
    at_once: units dropped between two updates of the inverse; by default so many that there are at
        most 128 updates.
    damping: added to the diagonal of H, in units of its mean; ten times more as often as H has no
        Cholesky factor.

    Source:
        Kurtic et al. 2023 (ZipLM), arXiv:2302.04089, eq. 2-4 and algorithm 1; Hassibi & Stork 1992.
    """

    name: ClassVar[str] = "obs"
    needs: ClassVar[Needs] = "activations"

    progressive: bool = True
    at_once: Annotated[int, Field(ge=1)] | None = None
    damping: Annotated[float, Field(gt=0)] = 0.01

    @property
    def cost(self) -> Cost:
        """Two forward passes, the Gram matrix, its inverse, and the part of it that is left."""
        return Cost(
            2.0, 0.0, holds=1, solves=3
        )  # the products, their inverse, and what shrinks of it

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
        """OBS errors of each group's units, one tensor for each weight that consumes the
        group.

        Args:
            program: the model.
            groups: to score.
            context: with calibration data.

        Returns:
            by group name, tensors [units] float32; groups that no weight consumes are left out.

        Raises:
            CalibrationError: an activation is not finite.
        """
        pairs = {}
        for group in groups:
            pairs[group.name] = pairs_of(program, group)
        readers = {}
        for group_pairs in pairs.values():
            for _, reader in group_pairs:
                readers[(reader.node, reader.dim)] = reader
        waiting: dict[tuple[fx.Node, int], list[tuple[str, int, Member]]] = {}
        for name, group_pairs in pairs.items():
            for place, (member, reader) in enumerate(group_pairs):
                waiting.setdefault((reader.node, reader.dim), []).append((name, place, member))
        named = dict(program.named_parameters())
        scores = dict[tuple[str, int], Tensor]()
        for reader, gram_KK in gram_matrices(program, list(readers.values()), context):
            inverse_KK = invert_damped(gram_KK, self.damping)
            for name, place, member in waiting[reader.node, reader.dim]:
                weight = named[member.parameter].detach().movedim(member.dim, -1)
                scores[name, place] = self._score_units(
                    weight.flatten(0, -2), inverse_KK, member.positions
                )
        return {
            name: [scores[name, place] for place in range(len(group_pairs))]
            for name, group_pairs in pairs.items()
            if group_pairs
        }

    def _score_units(self, weight_RK: Tensor, inverse_KK: Tensor, positions_Uk: Tensor) -> Tensor:
        """The scores of one weight's units, progressive or one-shot: [U] float32."""
        weight_RK = weight_RK.to(inverse_KK)
        positions_Uk = positions_Uk.to(inverse_KK.device)
        if not self.progressive:
            return obs_errors(weight_RK, inverse_KK, positions_Uk).float().cpu()
        at_once = self.at_once or max(1, math.ceil(len(positions_Uk) / UPDATES))
        return removal_errors(weight_RK, inverse_KK, positions_Uk, at_once).cpu()


def gram_matrices(
    program: Program, wanted: Sequence[Reader], context: Context
) -> Iterator[tuple[Reader, Tensor]]:
    """E[x x^T] over all calibration tokens of each activation, [K, K] float64, one after another in
    graph order.

    All sequences advance together, so that memory is one layer's activations and one such matrix.

    Args:
        program: the model.
        wanted: activations.
        context: with calibration data.
    """
    data = context.data or ()
    order = {}
    for position, node in enumerate(program.gm.graph.nodes):
        order[node] = position
    run = Lockstep(program, data)
    for reader in context.progress(
        sorted(wanted, key=lambda r: order[r.node]), "input correlations", len(wanted)
    ):
        run.advance_to(reader.node.name)
        total = torch.zeros(())
        rows = 0
        for sample in range(len(data)):
            value = run.node_value(sample, reader.node.name).movedim(reader.dim, -1)
            x_TK = value.reshape(-1, value.shape[-1]).float()
            total = total.to(x_TK.device) + (x_TK.T @ x_TK).double()
            rows = rows + len(x_TK)
        yield reader, total / max(rows, 1)


def invert_damped(gram_KK: Tensor, damping: float) -> Tensor:
    """(H + damping * mean(diag H) * I)^-1, the damping ten times larger as often as that has no
    Cholesky factor.

    Args:
        gram_KK: H, float64.
        damping: in units of the mean of the diagonal.

    Returns:
        [K, K] float64.
    """
    if not bool(gram_KK.isfinite().all()):
        raise CalibrationError(
            "obs: the activations of the calibration data are not finite; see the model's dtype"
        )
    mean = gram_KK.diagonal().mean().clamp_min(NOTHING)
    while True:
        damped = gram_KK + damping * mean * torch.eye(
            len(gram_KK), dtype=gram_KK.dtype, device=gram_KK.device
        )
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return torch.cholesky_inverse(factor)
        damping *= 10


def obs_errors(weight_RK: Tensor, inverse_KK: Tensor, positions_Uk: Tensor) -> Tensor:
    """tr(W_J ((H^-1)_JJ)^-1 W_J^T) for each unit's channels J: [U].

    Args:
        weight_RK: of a consumer.
        inverse_KK: inverse of the damped H.
        positions_Uk: channels of each unit.

    Returns:
        [U].
    """
    if positions_Uk.shape[1] == 1:
        return (weight_RK.square().sum(0) / inverse_KK.diagonal())[positions_Uk[:, 0]]
    blocks_Ukk = inverse_KK[positions_Uk[:, :, None], positions_Uk[:, None, :]]
    columns_UkR = weight_RK.T[positions_Uk]
    solved = torch.cholesky_solve(columns_UkR, torch.linalg.cholesky(blocks_Ukk))
    return (columns_UkR * solved).sum((1, 2)).clamp_min(0)


def removal_errors(
    weight_RK: Tensor, inverse_KK: Tensor, positions_Uk: Tensor, at_once: int
) -> Tensor:
    """The error at which each unit's turn to go came: [U] float32, strictly rising in the order of
    removal.

    After each removal the columns left are refitted, W <- W - W_J ((H^-1)_JJ)^-1 (H^-1)_J:, and the
    inverse is brought down to them, H^-1 <- H^-1 - (H^-1)_:J ((H^-1)_JJ)^-1 (H^-1)_J:.  A unit that
    has become cheaper than one that went before it counts as much as that one.

    Args:
        weight_RK: of a consumer.
        inverse_KK: inverse of the damped H.
        positions_Uk: channels of each unit.
        at_once: units removed between two updates.

    Returns:
        [U] float32.
    """
    weight = weight_RK.clone()
    inverse = inverse_KK.clone()
    left_Uk = positions_Uk
    units = torch.arange(len(positions_Uk), device=positions_Uk.device)
    unit_errors = torch.zeros(len(units), device=weight.device)
    highest = torch.tensor(0.0, device=weight.device)
    while len(units):
        errors = obs_errors(weight, inverse, left_Uk).float()
        order = torch.argsort(errors, stable=True)
        for unit in order[:at_once]:
            highest = torch.maximum(
                errors[unit], torch.nextafter(highest, errors.new_tensor(torch.inf))
            )
            unit_errors[units[unit]] = highest
        going = left_Uk[order[:at_once]].flatten()
        staying = order[at_once:].sort().values
        units = units[staying]
        left_Uk = left_Uk[staying]
        factor = torch.linalg.cholesky(inverse[going][:, going])
        across = torch.cholesky_solve(inverse[going], factor)
        weight.addmm_(weight[:, going], across, alpha=-1)
        inverse.addmm_(inverse[:, going], across, alpha=-1)
        if 2 * left_Uk.numel() <= len(inverse):
            weight, inverse, left_Uk = _restrict_to(weight, inverse, left_Uk)
    return unit_errors


def _restrict_to(weight: Tensor, inverse: Tensor, left_Uk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and inverse of the channels of the units left, and where these stand in them."""
    stay = left_Uk.flatten()
    return (
        weight[:, stay],
        inverse[stay][:, stay],
        torch.arange(len(stay), device=stay.device).view_as(left_Uk),
    )
