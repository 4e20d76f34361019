"""Train a sparse model whose masks may move, and leave it exactly as sparse as it came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.graph import Program, Sparse
from secateur.passes.base import Context, Cost
from secateur.passes.distill import JSON, Distill, Prepared, Share
from secateur.passes.training.mask_schedule import RECORDS, MaskSchedule, Plan, ramp_steps
from secateur.passes.training.masked import Score, Site, bake, linear_only, put_masks, revived, take_masks
from secateur.passes.training.plan import pace
from secateur.passes.training.side_decay import Moment
from secateur.passes.training.text import Text


@dataclass(frozen=True)
class RetrainSparse(Distill):
    """Train a model under its masks, which may move between steps (Adaptive Sparse Trainer).  Numerics: lossy.

    The product of every sparse weight takes m W.  Its gradient goes to all of W, kept and removed entries alike; what
    is removed is pulled towards zero beside the momentum; every few optimizer steps the entries of highest score become
    the mask.  It starts from the masks and weights that the Program has, and what it leaves is m W, with exact zeros.

    kl, ce, temperature: as in the paper.  kl=1, ce=0, temperature=1 is Minitron's loss; kl=0 needs no dense model.
    mode: adaptive, or fixed: the masks stay and only what is kept is trained, without a pull.
    strength: of the pull when it is full, lambda = strength * rms(gradient) / rms(weight) of each weight; no number of
        the model's scale.  With Adam a pull that outweighs the gradient moves a weight by lr a step, whatever its size:
        the strength decides where that happens.
    ramp: part of the steps in which the pull grows from nothing to full; 0 for a static one (SR-STE).
    refresh: optimizer steps from one choice of masks to the next.
    score: what entries are chosen by: match (by what the weight's first mask was chosen), magnitude, wanda (times the
        norm of the input) or ria.
    revive: what removed entries start from: removed, their values, made smaller where one would displace a kept one at
        once; or zero.
    moment: what the optimizer's second moment is made of, see SideDecayAdamW.
    Source: Huang et al. 2025, arXiv:2407.20584: eq. 2-3, sections 3.1-3.3; the score that matches the start, the
        strength without dimension and the values that removed entries start from are ours.
    """

    name: ClassVar[str] = "retrain-sparse"
    uses: ClassVar[frozenset[str]] = frozenset({"sparse"})
    bars: ClassVar[Mapping[str, str]] = {}

    lr: Annotated[float, Field(gt=0)] = 5e-4
    kl: Share = 0.67
    ce: Share = 0.33
    temperature: Annotated[float, Field(gt=0)] = 2.0
    mode: Literal["adaptive", "fixed"] = "adaptive"
    strength: Annotated[float, Field(ge=0)] = 0.1
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.25
    refresh: Annotated[int, Field(ge=1)] = 10
    score: Literal["match", "magnitude", "wanda", "ria"] = "match"
    revive: Literal["removed", "zero"] = "removed"
    moment: Moment = "gradient"

    @property
    def cost(self) -> Cost:
        """Of distillation, and the masks with what they were at the start."""
        return replace(super().cost, bytes_per_parameter=super().cost.bytes_per_parameter + 2.0)

    def requires(self, program: Program) -> list[str]:
        reasons = super().requires(program)
        if self.mode == "adaptive" and (misfit := Score(self.score).misfit(program.sparse)):
            reasons.append(misfit)
        return reasons

    def _model(self, student: Program, context: Context) -> tuple[nn.Module, bool]:
        model, stays = super()._model(student, context)
        if not stays and (reason := linear_only(model, student)):
            context.log.warning("the graph itself is trained: %s", reason)
            return student.gm, True
        return model, stays

    def _prepare(self, model: nn.Module, student: Program, stays: bool, text: Text, context: Context) -> Prepared:
        steps, adaptive = pace(self, text.window, self.tokens).steps, self.mode == "adaptive"
        sites = put_masks(model, student, through=adaptive)
        if adaptive and self.revive == "removed":
            _revive(student, Score(self.score))
        plan = Plan(
            strength=self.strength if adaptive else 0.0,
            ramp=ramp_steps(self.ramp, steps),
            refresh=self.refresh if adaptive else 0,
            steps=steps,
            score=self.score,
            moment=self.moment,
        )
        masks = MaskSchedule(sites, plan)

        def finish() -> tuple[Program, JSON]:
            last = [(site, site.mask) for site in sites]
            take_masks(model, sites)
            return _baked(student, last, adaptive), {"weights_under_masks": len(sites), **_moved(last, masks)}

        return Prepared(finish, masks)


@torch.no_grad()
def _revive(student: Program, score: Score) -> None:
    """Put back what was removed, where it was kept."""
    parameters = dict(student.named_parameters())
    for name, one in student.sparse.items():
        if one.removed is not None:
            parameters[name].copy_(revived(parameters[name].detach(), one, score))


@torch.no_grad()
def _baked(student: Program, masks: Sequence[tuple[Site, Tensor]], trained: bool) -> Program:
    """The Program whose weights are m W, and which remembers (1 - m) W where it did before and that was trained."""
    parameters, sparse = dict(student.named_parameters()), dict[str, Sparse](student.sparse)
    for site, mask in masks:
        parameter = parameters[site.name]
        left, gone = bake(parameter.detach(), mask)
        parameter.copy_(left)
        if trained and site.sparse.removed is not None:
            sparse[site.name] = replace(site.sparse, removed=gone)
    return student.replace(sparse=MappingProxyType(sparse))


def _moved(masks: Sequence[tuple[Site, Tensor]], schedule: MaskSchedule) -> dict[str, Any]:
    """How far the masks went, and how they were at the last refresh."""
    bits = sum(mask.numel() for _, mask in masks)
    changed = sum(int((site.first.to(mask.device) != mask).sum()) for site, mask in masks)
    return {"mask_bits": bits, "mask_bits_changed": changed, **{key: schedule.record[key] for key in RECORDS}}
