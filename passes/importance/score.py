"""Give every unit of every coupled group an importance score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, InstanceOf
from torch import Tensor

from secateur.graph import CoupledGroup, Program, coupled_groups
from secateur.graph.errors import PipelineError
from secateur.passes.base import JSON, Context, Cost, Pass, PassResult
from secateur.passes.importance import (
    IMPORTANCES,
    Importance,
    Taylor,
    aggregate_members,
    normalize_scores,
)
from secateur.passes.importance.base import Aggregation, Normalization

Metric = Annotated[InstanceOf[Importance], BeforeValidator(IMPORTANCES.build)]


@dataclass(frozen=True)
class Score(Pass):
    """Score the units of all groups that may be pruned.  Numerics: exact (the model is not
    touched).

    metric: the estimator, with its own options: fisher, taylor{form=second}, ... (`secateur passes`
        lists all).
    aggregate: how the scores of a unit's members become one: sum, mean, max, prod (as the geometric
        mean, which ranks like the product and does not vanish over many members) or last.
    normalize: scale of each group's scores: none, sum, mean, max or standard.
    query_heads: what is ranked where several query heads share a key/value head: group (each
        key/value head ranks its own) or position (the same place under all key/value heads goes or
        stays; perplexity gives this alone).

    Source:
        ranking inside each group: Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, as its
        authors' code does.
    """

    name: ClassVar[str] = "score"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "exact"
    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    metric: Metric = field(default_factory=Taylor)
    aggregate: Aggregation = "sum"
    normalize: Normalization = "none"
    query_heads: Literal["group", "position"] = "group"

    @property
    def needs_data(self) -> bool:
        """Whether the metric reads activations or gradients."""
        return self.metric.needs != "nothing"

    @property
    def cost(self) -> Cost:
        """The cost of the metric."""
        return self.metric.cost

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run; scores need weights.

        Args:
            program: to be scored.
        """
        reasons = super().requires(program)
        if any(p.is_meta for _, p in program.named_parameters()):
            reasons.append("the weights are on the meta device: open the model with weights")
        return reasons

    def preview(self, program: Program) -> Program:
        """The Program with empty scores of the groups that the metric can see.

        Args:
            program: on any device.
        """
        scores = {}
        for group in coupled_groups(program):
            if group.locked is None and self.metric.sees(program, group):
                scores[group.name] = torch.empty(group.units, device="meta")
        return program.replace(scores=scores)

    def call(self, program: Program, context: Context) -> PassResult:
        """Score every unlocked group.

        Args:
            program: to be scored.
            context: with calibration data, where the metric reads it.

        Raises:
            PipelineError: scores are not finite, or cannot be aggregated as asked.
        """
        groups = []
        for group in coupled_groups(program):
            if group.locked is None:
                groups.append(group)
        by_cell = self.metric.by_cell and self.query_heads == "group"
        if by_cell:
            asked = [group.as_cells() for group in groups]
        else:
            asked = groups
        members = self.metric.members(program, asked, context)
        by_name = {group.name: group for group in groups}
        scores = {}
        for name, member_scores in members.items():
            scores[name] = self._unit_scores(by_name[name], member_scores)
        for name, score in scores.items():
            if not bool(torch.isfinite(score).all()):
                raise PipelineError(
                    f"{self.metric.name} gives scores of {name} that are not finite"
                )
        unseen = sorted({group.name for group in groups} - set(scores))
        for name in unseen:
            context.log.info(
                "score: %s cannot see %s: no weight reads its units", self.metric.name, name
            )
        figures: JSON = {"groups": len(scores), "unscored": unseen}
        if context.data is not None and self.needs_data:
            figures |= {
                "sequences": len(context.data),
                "tokens": sum(s.tokens for s in context.data),
            }
        return PassResult(program.replace(scores=scores), modified=False, figures=figures)

    def _unit_scores(self, group: CoupledGroup, found: Sequence[Tensor]) -> Tensor:
        """The scores of a group's members as [units], or [units, coordinates] where cells were
        scored."""
        try:
            scores = normalize_scores(aggregate_members(found, self.aggregate), self.normalize)
        except ValueError as error:
            raise PipelineError(f"score: {self.metric.name} on {group.name}: {error}") from error
        if len(scores) == group.units:
            return scores
        return scores.reshape(group.units, group.coordinates)
