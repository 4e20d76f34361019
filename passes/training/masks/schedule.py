"""The mask schedule of a run: refreshes, scores, and the pull on removed weights.

L masked weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from secateur.graph.errors import PatternError, SecateurError
from secateur.passes.storage.journal import JSON, hash_tensor
from secateur.passes.training.masks.choice import MaskScore
from secateur.passes.training.masks.decay import DecayPull, SideDecayAdamW, local_part
from secateur.passes.training.masks.masked import MaskedWeight

RECORDS = ("flip_rate", "changed", "removed_mass", "decay_to_gradient")
"""What every step's record says: the part of all mask bits that the last refresh flipped; the part
that differs from the first mask; the part of sum |W| that is under the mask; and, over removed
entries, the root mean square of lambda W by that of the weight's gradient, mean over weights, at
the last refresh."""


class MaskError(SecateurError):
    """Masks cannot be chosen: a score is no number."""


@dataclass(frozen=True)
class MaskPlan:
    """How masks are kept.

    strength: of the pull when it is full: lambda = strength * rms(g) / rms(W), each weight by its
        own gradient, since scales differ by orders of magnitude between layers; 0 for none.
    ramp: optimizer steps in which the pull grows from nothing to full.
    refresh: steps from one choice of masks to the next, 0 for never.
    steps: of the run; masks stay as they are after its last.
    moment: see SideDecayAdamW.
    mixed: CAST: what is removed moves less by its gradient and more by a constant, strength *
        rms(g) towards zero, from step to step; the ramp plays no part.
    """

    strength: float
    ramp: int
    refresh: int
    steps: int
    score: str = "match"
    moment: str = "gradient"
    mixed: bool = False


class MaskSchedule:
    """The masks of one training run; its optimizer calls it before and after each update.

    sites: weights under masks, in the model that is trained.
    record: see RECORDS.
    step: optimizer steps so far.
    """

    def __init__(self, sites: Sequence[MaskedWeight], plan: MaskPlan) -> None:
        self.sites = list(sites)
        self.plan = plan
        self.score = MaskScore(plan.score)
        self.step = 0
        self.record = dict.fromkeys(RECORDS, 0.0)
        self._removed: dict[str, Tensor] = {}

    @property
    def optimizer_class(self) -> tuple[type[SideDecayAdamW], JSON]:
        """Its class and what it is made with, as Trainer takes them."""
        return SideDecayAdamW, {"masks": self, "moment": self.plan.moment}

    def fingerprint(self) -> str:
        """Of plan and masks at the start, and of all that new ones are chosen by."""
        digest = hashlib.sha256(repr(self.plan).encode())
        for site in self.sites:
            if site.sparse.norms is None:
                norms = ""
            else:
                norms = hash_tensor(site.sparse.norms)
            digest.update(
                f"{site.name} {site.sparse.pattern} {hash_tensor(site.first)} {norms} ".encode()
            )
        return digest.hexdigest()

    # The optimizer's questions
    @torch.no_grad()
    def before_update(self) -> dict[int, DecayPull]:
        """The pull on each weight, from gradients as they are now (clipped)."""
        full = self._current_strength()
        if not full and self.plan.moment == "gradient":
            return {}
        taking = []
        for site in self.sites:
            if site.weight.grad is not None:
                taking.append(site)
        weights = [site.weight for site in taking]
        squares = _sums_of_squares(weights, [p.grad for p in weights if p.grad is not None])
        ratio = torch.where(squares[0] > 0, (squares[1] / squares[0]).sqrt(), 0.0)
        share = None
        if self.plan.mixed:
            sizes = squares.new_tensor([site.mask.numel() for site in taking])
            ratio = (squares[1] / sizes).sqrt()
            share = self.step / self.plan.steps
        strengths = (full * ratio).unbind()
        pulls: dict[int, DecayPull] = {}
        for site, strength in zip(taking, strengths, strict=True):
            pulls[id(site.weight)] = DecayPull(self._removed_locally(site), strength, share)
        return pulls

    @torch.no_grad()
    def after_update(self) -> None:
        """Count the step, and choose masks anew where it is time."""
        self.step += 1
        if self.plan.refresh and self.step % self.plan.refresh == 0 and self.step < self.plan.steps:
            self._refresh_masks()

    def _current_strength(self) -> float:
        """The strength of the pull at this step of the ramp."""
        if self.plan.mixed:
            ramp = 0
        else:
            ramp = self.plan.ramp
        return self.plan.strength * (min(1.0, self.step / ramp) if ramp else 1.0)

    def _refresh_masks(self) -> None:
        """New masks, written over the old ones."""
        sums = torch.stack([self._choose_mask(site) for site in self.sites]).sum(0).tolist()
        bits = sum(site.first.numel() for site in self.sites)
        shares = (
            sums[0] / bits,
            sums[1] / bits,
            sums[2] / sums[3] if sums[3] else 0.0,
            sums[4] / len(self.sites),
        )
        self.record = dict(zip(RECORDS, shares, strict=True))
        self._removed.clear()

    def _choose_mask(self, site: MaskedWeight) -> Tensor:
        """A weight's new mask.

        Returns:
            [5] float64: bits flipped, bits unlike the first mask, sum |W| removed, sum |W|, decay
            to gradient.
        """
        full_weight = _full_weight(site.weight)
        old = site.mask
        try:
            new = site.sparse.pattern.select_mask(self.score(full_weight.float(), site.sparse))
        except PatternError as error:
            raise MaskError(
                f"step {self.step}: {site.name}: {error}; nothing of this step was kept: lower lr, "
                "or precision=float32"
            ) from error
        site.first = site.first.to(new.device)
        size = full_weight.abs()
        masked_weight = full_weight * old.view(torch.uint8)
        total = size.sum()
        energy = _sum_of_squares(full_weight)
        gone = 1 - old.count_nonzero() / old.numel()
        loose = (energy - _sum_of_squares(masked_weight)) / energy.clamp_min(
            torch.finfo(energy.dtype).tiny
        )
        ratio = (loose.clamp_min(0) / gone.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt()
        removed = total - (size * new.view(torch.uint8)).sum()
        flips = (new ^ old).count_nonzero()
        unlike = (new ^ site.first).count_nonzero()
        counts = (flips, unlike, removed, total, self._current_strength() * ratio)
        figures = torch.stack([part.double() for part in counts]).cpu()
        old.copy_(new)
        return figures

    def _removed_locally(self, site: MaskedWeight) -> Tensor:
        """[rows here, K] 1 or 0: what the mask of a weight removes of this process's part."""
        if site.name not in self._removed:
            self._removed[site.name] = (~local_part(_distribute_mask(site.mask, site.weight))).view(
                torch.uint8
            )
        return self._removed[site.name]

    # What outlives a kill
    def facts(self) -> JSON:
        """All but the masks, which are buffers of the model, as JSON."""
        return {"step": self.step, "record": self.record}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """The inverse of ``facts``; the model's buffers are put back by who keeps the model.

        Args:
            facts: as returned by ``facts``.
        """
        self.step = int(facts["step"])
        self.record = dict(facts["record"])
        self._removed.clear()


def _sums_of_squares(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """[2, L] float32: sums of squares of weights and of gradients, over all processes that share
    them."""
    sums = torch.stack(
        [
            torch.stack(torch._foreach_norm([local_part(t) for t in tensors])).square()
            for tensors in (weights, gradients)
        ]
    )
    mesh: Any = getattr(weights[0], "device_mesh", None)
    if mesh is not None:
        torch.distributed.all_reduce(sums, group=mesh.get_group())
    return sums


def _sum_of_squares(weight: Tensor) -> Tensor:
    """Sum of squares, without a tensor of them."""
    flat = weight.flatten()
    return flat.dot(flat)


def _full_weight(weight: Tensor) -> Tensor:
    """The full tensor of a weight, where it lies."""
    full: Any = getattr(weight, "full_tensor", None)
    return weight.detach() if full is None else full().detach()


def _distribute_mask(mask: Tensor, like: Tensor) -> Tensor:
    """A full mask laid out as a weight; every process has all of it, so nothing is sent."""
    if not hasattr(like, "full_tensor"):
        return mask
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def ramp_steps(share: float, steps: int) -> int:
    """Steps of a ramp that takes a share of a run.

    Args:
        share: of the run, 0..1.
        steps: of the run.

    Returns:
        number of steps, rounded up.
    """
    return math.ceil(share * steps)
