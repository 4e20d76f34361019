"""Retraining of a sparse model whose masks may move; its sparsity stays exactly the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.graph import Program, Sparse
from secateur.graph.errors import PipelineError
from secateur.passes.base import Context, Cost
from secateur.passes.sparsity.boost import add_branches, branch_parameters, group_sums
from secateur.passes.training.distill import JSON, Distill, PreparedModel, Share
from secateur.passes.training.masks.choice import MaskScore, bake_mask, revive_weight
from secateur.passes.training.masks.decay import Moment
from secateur.passes.training.masks.masked import (
    MaskedWeight,
    Way,
    add_branch,
    add_scales,
    linear_only,
    put_masks,
    scale_row_parts,
    take_masks,
)
from secateur.passes.training.masks.schedule import RECORDS, MaskPlan, MaskSchedule, ramp_steps
from secateur.passes.training.plan import plan_steps
from secateur.passes.training.text import TrainingText

WAYS: dict[str, Way] = {"adaptive": "through", "fixed": "kept", "cast": "dense"}


@dataclass(frozen=True)
class RetrainSparse(Distill):
    """Train a model under its masks, which may move between steps (Adaptive Sparse Trainer).
    Numerics: lossy.

    The product of every sparse weight takes m W.  It starts from the masks and weights that the
    Program has, and what it leaves is m W, with exact zeros.

    kl, ce, temperature: as in the paper.  kl=1, ce=0, temperature=1 is Minitron's loss; kl=0 needs
        no dense model.
    mode: fixed: the masks stay and only what is kept is trained.  adaptive: the gradient goes to
        all of W, kept and removed entries alike, what is removed is pulled towards zero beside the
        momentum, and every few optimizer steps the entries of highest score become the mask.  cast:
        products take all of W until the end, what is removed moves more and more towards zero at a
        constant speed (strength counts by the gradient alone then, and moment is sum), and two
        factors a row make up for what is lost.
    strength: of the pull when it is full, lambda = strength * rms(gradient) / rms(weight) of each
        weight; no number of the model's scale.  With Adam a pull that outweighs the gradient moves
        a weight by lr a step, whatever its size: the strength decides where that happens.
    ramp: part of the steps in which the pull grows from nothing to full; 0 for a static one
        (SR-STE).
    refresh: optimizer steps from one choice of masks to the next.
    score: what entries are chosen by: match (by what the weight's first mask was chosen; where that
        was sparsegpt, whose score holds for its own order of pruning alone, by wanda, or by
        magnitude without norms of the inputs), magnitude, wanda (times the norm of the input) or
        ria.  The figure ``ranked_by`` says what it came to.
    revive: what removed entries start from: removed, their values, made smaller where one would
        displace a kept one at once; or zero.
    moment: what the optimizer's second moment is made of, see SideDecayAdamW.
    boost: inputs of a group for a dense branch beside each sparse weight (SLoRB), which starts from
        the mean of what was removed in each group; 0 for none.  It stays in the model: N K / boost
        more parameters, and no plain checkpoint has a place for it.
        boost_trained: whether the sums of a group's inputs are trained, too.

    Source:
        Huang et al. 2025 (AST), arXiv:2407.20584, eq. 2-3 and section 3.2; cast: Huang et al. 2025,
        arXiv:2509.25996.  The score that matches the start, the strength without dimension and the
        values that removed entries start from are ours.
    """

    name: ClassVar[str] = "retrain-sparse"
    uses: ClassVar[frozenset[str]] = frozenset({"sparse"})
    bars: ClassVar[Mapping[str, str]] = {}

    lr: Annotated[float, Field(gt=0)] = 5e-4
    kl: Share = 0.67
    ce: Share = 0.33
    temperature: Annotated[float, Field(gt=0)] = 2.0
    mode: Literal["fixed", "adaptive", "cast"] = "fixed"
    strength: Annotated[float, Field(ge=0)] = 3.0
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.25
    refresh: Annotated[int, Field(ge=1)] = 10
    score: Literal["match", "magnitude", "wanda", "ria"] = "match"
    revive: Literal["removed", "zero"] = "removed"
    moment: Moment = "gradient"
    boost: Annotated[int, Field(ge=0)] = 0
    boost_trained: bool = False

    @property
    def cost(self) -> Cost:
        """Of distillation, and the masks with what they were at the start."""
        return replace(super().cost, bytes_per_parameter=super().cost.bytes_per_parameter + 2.0)

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run: those of distillation, and branches or scores that
        do not fit.
        """
        reasons = super().requires(program)
        widths = {}
        for name, p in program.named_parameters():
            if name in program.sparse:
                widths[name] = p.shape[1]
        odd = []
        for name, width in widths.items():
            if self.boost and width % self.boost:
                odd.append(name)
        reasons += [
            f"boost={self.boost} does not divide the {widths[name]} inputs of {name}"
            for name in odd[:1]
        ]
        if branch_parameters(program):
            reasons.append(
                "the weights have branches (boost) already: train from the model without them"
            )
        if self.mode != "fixed" and (
            misfit := MaskScore(self.score).incompatibility(program.sparse)
        ):
            reasons.append(misfit)
        return reasons

    def _student_module(self, student: Program, context: Context) -> tuple[nn.Module, bool]:
        """The stock model, or the graph where masks need it."""
        model, stays = super()._student_module(student, context)
        if not stays and (reason := linear_only(model, student)):
            context.log.warning("the graph itself is trained: %s", reason)
            return student.gm, True
        return model, stays

    def _prepare_model(
        self, model: nn.Module, student: Program, stays: bool, text: TrainingText, context: Context
    ) -> PreparedModel:
        """Put the weights under masks; finishing bakes them."""
        steps = plan_steps(self, text.window, self.tokens).steps
        adaptive = self.mode != "fixed"
        cast = self.mode == "cast"
        sites = put_masks(model, student, way=WAYS[self.mode])
        if adaptive:
            ranked_by = _ranked_by(student, MaskScore(self.score), context)
        else:
            ranked_by = {}
        if adaptive and self.revive == "removed":
            _revive_removed(student, MaskScore(self.score))
        plan = MaskPlan(
            strength=self.strength if adaptive else 0.0,
            ramp=ramp_steps(self.ramp, steps),
            refresh=self.refresh if adaptive else 0,
            steps=steps,
            score=self.score,
            moment="sum" if cast else self.moment,
            mixed=cast,
        )
        masks = MaskSchedule(sites, plan)
        branches = self._branch_parameters(sites, stays)
        if cast:
            scales = add_scales(sites)
        else:
            scales = {}

        def finish_training() -> tuple[Program, JSON]:
            last = [(site, site.mask) for site in sites]
            take_masks(model, sites)
            _fold_scales(student, scales)
            baked = _bake_masks(student, last, adaptive)
            metrics = {"weights_under_masks": len(sites), **_mask_movement(last, masks)}
            metrics |= {"ranked_by": ranked_by} if adaptive else {}
            if branches:
                branch_figures = {}
                for name, (a, b) in branches.items():
                    branch_figures[name] = (_branch_sums(a, b, self.boost), b)
                baked = add_branches(baked, branch_figures)
                metrics["branch_parameters"] = sum(
                    a.numel() + b.numel() for a, b in branch_figures.values()
                )
            return baked, metrics

        return PreparedModel(finish_training, masks)

    def _branch_parameters(
        self, sites: Sequence[MaskedWeight], stays: bool
    ) -> dict[str, tuple[nn.Parameter | None, nn.Parameter]]:
        """The branches of masked modules, by weight; their Parameters are trained along."""
        if not self.boost:
            return {}
        if stays:
            raise PipelineError(
                "boost: branches go into plain linear modules of a stock model, and the graph "
                "itself is trained here: "
                "leave boost=0"
            )
        result: dict[str, tuple[nn.Parameter | None, nn.Parameter]] = {}
        for site in sites:
            result[site.name] = add_branch(site, self.boost, self.boost_trained)
        return result


def _ranked_by(student: Program, score: MaskScore, context: Context) -> dict[str, int]:
    """By what the entries of how many weights are ranked; told where it is not what chose their
    first mask."""
    rows = []
    for state in student.sparse.values():
        rows.append((state.metric, score.metric_of(state)))
    for (metric, row), count in Counter(rows).items():
        if score.metric == "match" and metric != row:
            context.log.info(
                "score=match: %d weights that %s made sparse are ranked by %s", count, metric, row
            )
    return dict(Counter(row for _, row in rows))


def _branch_sums(a: Tensor | None, b: Tensor, width: int) -> Tensor:
    """A [R, K] of a branch."""
    if a is None:
        return group_sums(b.shape[1] * width, width, b)
    return a


@torch.no_grad()
def _fold_scales(student: Program, scales: Mapping[str, Tensor]) -> None:
    """Multiply factors of rows into their weights."""
    parameters = dict(student.named_parameters())
    for name, scale in scales.items():
        parameters[name].copy_(scale_row_parts(parameters[name].detach(), scale))


@torch.no_grad()
def _revive_removed(student: Program, score: MaskScore) -> None:
    """Put back what was removed, where it was kept."""
    parameters = dict(student.named_parameters())
    for name, state in student.sparse.items():
        if state.removed is not None:
            parameters[name].copy_(revive_weight(parameters[name].detach(), state, score))


@torch.no_grad()
def _bake_masks(
    student: Program, masks: Sequence[tuple[MaskedWeight, Tensor]], trained: bool
) -> Program:
    """The Program whose weights are m W, and which remembers (1 - m) W where it did before and that
    was trained."""
    parameters = dict(student.named_parameters())
    sparse = dict[str, Sparse](student.sparse)
    for site, mask in masks:
        parameter = parameters[site.name]
        weight, gone = bake_mask(parameter.detach(), mask)
        parameter.copy_(weight)
        if trained and site.sparse.removed is not None:
            sparse[site.name] = replace(site.sparse, removed=gone)
    return student.replace(sparse=MappingProxyType(sparse))


def _mask_movement(masks: Sequence[tuple[MaskedWeight, Tensor]], schedule: MaskSchedule) -> JSON:
    """How far the masks went, and how they were at the last refresh."""
    bits = sum(mask.numel() for _, mask in masks)
    changed = sum(int((site.first.to(mask.device) != mask).sum()) for site, mask in masks)
    return {
        "mask_bits": bits,
        "mask_bits_changed": changed,
        **{key: schedule.record[key] for key in RECORDS},
    }
