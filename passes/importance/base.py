"""The base of importance estimators, and the aggregation of member scores to unit scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.graph import CoupledGroup, Member, Program
from secateur.passes.base import Context, Cost
from secateur.passes.language.options import Options

Needs = Literal["nothing", "gradients", "activations"]
Aggregation = Literal["sum", "mean", "max", "prod", "last"]
Normalization = Literal["none", "sum", "mean", "max", "standard"]
MemberScores = Mapping[str, Sequence[Tensor]]
COSTS: Mapping[Needs, Cost] = {
    "nothing": Cost(),
    "gradients": Cost(3.0, 4.0),
    "activations": Cost(1.0, 0.0),
}


@dataclass(frozen=True)
class Importance(Options):
    """An estimator of how much each unit matters.  Its dataclass fields are its options.

    needs: what it takes beside the weights: nothing, gradients (forward and backward over the
        calibration data) or activations (forward alone).
    by_cell: whether the groups that ``members`` is given may stand for units at single coordinates
        (``CoupledGroup.as_cells``), which can be scored and not edited.
    """

    needs: ClassVar[Needs]
    by_cell: ClassVar[bool] = True

    @property
    def cost(self) -> Cost:
        """Rough work, for estimates."""
        return COSTS[self.needs]

    def sees(self, program: Program, group: CoupledGroup) -> bool:
        """Whether ``members`` gives scores of a group; needs no weights.

        Args:
            program: on any device.
            group: that may be pruned.
        """
        return True

    @abstractmethod
    def members(
        self, program: Program, groups: Sequence[CoupledGroup], context: Context
    ) -> MemberScores:
        """Scores of the units of each group, one tensor for each thing that was scored: a
        parameter, an activation.

        Args:
            program: the model.
            groups: to score.
            context: with calibration data and seed.

        Returns:
            by group name, tensors [units] float32, higher is more important.  A group that this
            estimator cannot see is left out.
        """


AGGREGATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "prod": lambda x: geometric_mean(x),
    "last": lambda x: x[-1],
}
NORMALIZATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "sum": lambda x: x / _replace_zeros(x.sum()),
    "mean": lambda x: x / _replace_zeros(x.mean()),
    "max": lambda x: x / _replace_zeros(x.abs().max()),
    "standard": lambda x: (x - x.mean()) / _replace_zeros(x.std(correction=0)),
}


def _replace_zeros(x: Tensor) -> Tensor:
    """The tensor with ones in place of zeros, safe to divide by."""
    return torch.where(x == 0, torch.ones_like(x), x)


def geometric_mean(scores: Tensor) -> Tensor:
    """The product over the first dim as its root of that many factors, by logs.

    It ranks as the product does, and stays within the range of the factors however many they are.

    Args:
        scores: [factors, units] float64, none below zero.

    Returns:
        [units] float64.
    """
    return scores.log().mean(0).exp()


def aggregate_members(scores: Sequence[Tensor], how: Aggregation) -> Tensor:
    """Member scores, each [units], as unit scores [units] float32.

    prod gives the geometric mean, see ``geometric_mean``; a single member keeps its scores whatever
    their sign.

    Args:
        scores: one tensor [units] for each member.
        how: aggregation over the members.

    Returns:
        [units] float32.

    Raises:
        ValueError: a product of scores of which some are below zero.

    Source:
        Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627, section 3.2: sum, prod, max, last-only.
    """
    if how == "prod" and len(scores) == 1:
        return scores[0].float()
    if how == "prod" and any(bool((score < 0).any()) for score in scores):
        raise ValueError(
            "some scores are below zero, and their product ranks nothing: use aggregate=sum"
        )
    stacked = torch.stack([s.double() for s in scores])
    return AGGREGATIONS[how](stacked).float()


def normalize_scores(scores: Tensor, how: Normalization) -> Tensor:
    """Scores [units] of one group on a scale that compares across groups.

    Args:
        scores: [units].
        how: scale.

    Returns:
        [units] float32.
    """
    return NORMALIZATIONS[how](scores.double()).float()


def distinct_members(group: CoupledGroup) -> list[Member]:
    """The members without repetition: a tied parameter is one tensor, although several ops read
    it.

    Args:
        group: with one member for each op that reads a parameter.

    Returns:
        members, each parameter and position once.
    """
    seen: dict[tuple[str, int, bytes], Member] = {}
    for member in group.members:
        key = (member.parameter, member.dim, member.positions.contiguous().numpy().tobytes())
        seen.setdefault(key, member)
    return list(seen.values())


def per_unit(salience: Tensor, member: Member, vectors: bool = False) -> Tensor:
    """Sum the entries of a unit.

    Args:
        salience: of every entry of the member's parameter, shape of the parameter.
        member: where the units stand in the parameter.
        vectors: take the absolute value of each position's sum before a unit's positions are added.

    Returns:
        [units] float64.
    """
    others = []
    for dim in range(salience.dim()):
        if dim != member.dim:
            others.append(dim)
    if others:
        along = salience.sum(others, dtype=torch.float64)
    else:
        along = salience.double()
    if vectors:
        along = along.abs()
    return along[member.positions.to(along.device)].sum(1).cpu()


def parameter_scores(
    program: Program,
    groups: Sequence[CoupledGroup],
    salience: Callable[[str, Tensor], Tensor],
    vectors: bool = False,
) -> dict[str, list[Tensor]]:
    """Member scores of an estimator that looks at each entry of each parameter.

    Args:
        program: the model.
        groups: to score.
        salience: (name, parameter) -> salience of every entry, shape of the parameter; computed
            once a parameter.
        vectors: as in ``per_unit``.

    Returns:
        by group name, tensors [units] float32.
    """
    named = dict(program.named_parameters())
    names = dict.fromkeys(member.parameter for group in groups for member in group.members)
    return scores_of(
        groups, ((name, salience(name, named[name].detach())) for name in names), vectors
    )


def scores_of(
    groups: Sequence[CoupledGroup], saliences: Iterable[tuple[str, Tensor]], vectors: bool = False
) -> dict[str, list[Tensor]]:
    """Member scores from the salience of every entry of each parameter, by name, one after another
    in any order.

    Args:
        groups: to score.
        saliences: (parameter name, salience of every entry).
        vectors: as in ``per_unit``.

    Returns:
        by group name, tensors [units] float32.
    """
    wanted: dict[str, list[tuple[str, int, Member]]] = {}
    for group in groups:
        for place, member in enumerate(distinct_members(group)):
            wanted.setdefault(member.parameter, []).append((group.name, place, member))
    scores_by_group: dict[str, dict[int, Tensor]] = {}
    for name, value in saliences:
        for group_name, place, member in wanted[name]:
            scores_by_group.setdefault(group_name, {})[place] = per_unit(
                value, member, vectors
            ).float()
    scores: dict[str, list[Tensor]] = {}
    for group in groups:
        by_place = scores_by_group.get(group.name)
        if by_place is not None:
            scores[group.name] = [by_place[i] for i in sorted(by_place)]
    return scores
