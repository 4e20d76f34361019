"""Forward KL and cross entropy of next-token distributions, chunk by chunk of rows.

The plain way holds logits, log probabilities and their gradients of student and teacher for all
rows at once.  Here a chunk's logits are made, compared, turned into the gradients of the hidden
states and of the head, and forgotten, all in the forward pass; the backward pass only scales.
Memory beyond inputs and their gradients is a few chunks.

T rows (tokens of a batch), V vocabulary, X width of the last hidden state, c rows of a chunk.
Source: the chunking is that of Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989, section 3.2; KL
and its gradient are Hinton et al. 2015, arXiv:1503.02531, eq. 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from secateur.passes.calibration.data import IGNORED
from secateur.passes.training.rows import (
    CHUNK_ELEMENTS,
    HeadRows,
    LogitRows,
    Rows,
    head_logits,
    row_chunks,
)


@dataclass(frozen=True)
class Weights:
    """loss = kl * KL(teacher || student) * temperature^2 + ce * cross entropy, each the mean over
    its rows, in nats."""

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class Losses:
    """total: scalar with a gradient.
    kl, ce: scalars without, unweighted means in nats (0 where there is no row).
    """

    total: Tensor
    kl: Tensor
    ce: Tensor


def compute_chunked_losses(
    student: HeadRows | LogitRows,
    teacher: Rows | None,
    labels_T: Tensor | None = None,
    counted_T: Tensor | None = None,
    weights: Weights = Weights(),
    *,
    elements: int = CHUNK_ELEMENTS,
) -> Losses:
    """KL to the teacher's rows and cross entropy of labels, with gradients to the student's hidden
    states and head.

    Args:
        student: T rows; gradients flow to ``hidden_TX``, ``weight_VX``, ``bias_V`` or to
            ``logits_TV``.
        teacher: T rows, or None: no KL.
        labels_T: [T] int64, -100 where not counted, or None: no cross entropy.
        counted_T: [T] bool, rows whose KL counts; None counts all.
        weights: of the two losses.
        elements: logits of one chunk.

    Raises:
        ValueError: the numbers of rows or of logits differ.
    """
    rows = student.count_rows
    for what, tensor in (
        ("teacher", teacher and teacher.count_rows),
        ("labels", labels_T is not None and len(labels_T)),
    ):
        if tensor not in (None, False, rows):
            raise ValueError(
                f"the {what} have {tensor} rows and the student has {rows}: give the same tokens "
                "to both"
            )
    source, *head = _differentiable_leaves(student)
    job = _Job(
        teacher=teacher,
        labels_T=None if labels_T is None else labels_T.to(source.device),
        kl_share_T=_row_shares(torch.ones(rows) if counted_T is None else counted_T, source.device),
        ce_share_T=_row_shares(
            torch.zeros(rows) if labels_T is None else labels_T != IGNORED, source.device
        ),
        weights=weights,
        dtype=student.dtype if isinstance(student, HeadRows) else None,
        elements=elements,
        differentiate=torch.is_grad_enabled(),
    )
    return Losses(*_ChunkedLosses.apply(source, *head, job))  # type: ignore[no-untyped-call]


def _differentiable_leaves(
    student: HeadRows | LogitRows,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(hidden states, weight, bias), or (logits, None, None)."""
    if isinstance(student, LogitRows):
        return student.logits_TV, None, None
    return student.hidden_TX, student.weight_VX, student.bias_V


def _row_shares(counted_T: Tensor, device: torch.device) -> Tensor:
    """Each row's part of a mean over the counted rows, [T] float32."""
    counted = counted_T.to(device, torch.float32)
    return counted / counted.sum().clamp_min(1)


@dataclass(frozen=True, eq=False)
class _Job:
    """What the student's logits are compared with, and how."""

    teacher: Rows | None
    labels_T: Tensor | None
    kl_share_T: Tensor
    ce_share_T: Tensor
    weights: Weights
    dtype: torch.dtype | None
    elements: int
    differentiate: bool

    def compare_chunk(self, part: slice, logits_cV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This chunk's part of the mean KL and of the mean cross entropy, and d loss / d logits [c,
        V]."""
        kl = logits_cV.new_zeros(())
        ce = logits_cV.new_zeros(())
        gradient_cV = torch.zeros_like(logits_cV)
        if self.teacher is not None:
            kl = self._add_kl(self.teacher, part, logits_cV, gradient_cV)
        if self.labels_T is not None:
            ce = self._add_cross_entropy(self.labels_T[part], part, logits_cV, gradient_cV)
        return kl, ce, gradient_cV

    def _add_kl(self, teacher: Rows, part: slice, logits_cV: Tensor, gradient_cV: Tensor) -> Tensor:
        """The chunk's part of the mean KL; its gradient is added in place."""
        temperature = self.weights.temperature
        share_c = self.kl_share_T[part]
        log_q_cV = torch.log_softmax(logits_cV / temperature, -1)
        kl_c, target_cV = teacher.divergence(part, log_q_cV, temperature)
        if self.differentiate and self.weights.kl:
            scale_c1 = (self.weights.kl * temperature * share_c).unsqueeze(-1)
            gradient_cV.add_(log_q_cV.exp_().sub_(target_cV).mul_(scale_c1))
        return (kl_c * share_c).sum()

    def _add_cross_entropy(
        self, labels_c: Tensor, part: slice, logits_cV: Tensor, gradient_cV: Tensor
    ) -> Tensor:
        """The chunk's part of the mean cross entropy; its gradient is added in place."""
        share_c1 = self.ce_share_T[part].unsqueeze(-1)
        index_c1 = labels_c.clamp_min(0).unsqueeze(-1)
        log_q_cV = torch.log_softmax(logits_cV, -1)
        loss = -(log_q_cV.gather(-1, index_c1) * share_c1).sum()
        if self.differentiate and self.weights.ce:
            log_q_cV.exp_().scatter_add_(-1, index_c1, torch.full_like(share_c1, -1.0))
            gradient_cV.add_(log_q_cV.mul_(self.weights.ce * share_c1))
        return loss


class _ChunkedLosses(torch.autograd.Function):
    """Losses forward; their gradients are made on the way, and handed out, once, by the backward
    pass."""

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, weight_VX: Tensor | None, bias_V: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Total loss, KL and cross entropy; gradients are kept for ``backward``."""
        wanted = []
        for needed in ctx.needs_input_grad[:3]:
            wanted.append(bool(job.differentiate and needed))
        gradients = _Gradients(source, weight_VX, bias_V, wanted, job.dtype)
        sums = torch.zeros(2, device=source.device)
        if weight_VX is None:
            vocabulary = source.shape[-1]
        else:
            vocabulary = weight_VX.shape[0]
        with torch.autocast(source.device.type, enabled=False):
            for part in row_chunks(len(source), vocabulary, job.elements):
                x_cX = source[part]
                if weight_VX is None:
                    logits_cV = x_cX.float()
                else:
                    logits_cV = head_logits(x_cX, weight_VX, bias_V, job.dtype)
                *parts, gradient_cV = job.compare_chunk(part, logits_cV)
                sums += torch.stack(parts)
                gradients.add_chunk(part, gradient_cV)
        ctx.gradients = gradients.made
        total = job.weights.kl * job.weights.temperature**2 * sums[0] + job.weights.ce * sums[1]
        kl, ce = sums.clone().unbind()
        ctx.mark_non_differentiable(kl, ce)
        return total, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        """The kept gradients, scaled by the gradient of the total."""
        gradients = ctx.gradients
        ctx.gradients = None
        if gradients is None:
            raise RuntimeError(
                "the gradients of a chunked loss are handed out once: compute the loss again"
            )
        return (*(None if g is None else g.mul_(d_total.to(g.dtype)) for g in gradients), None)


class _Gradients:
    """Of hidden states (or logits), weight and bias, gathered chunk by chunk; ``made`` holds None
    where not wanted."""

    def __init__(
        self,
        source: Tensor,
        weight_VX: Tensor | None,
        bias_V: Tensor | None,
        wanted: list[bool],
        dtype: torch.dtype | None,
    ) -> None:
        self.source = source
        self.weight = weight_VX
        self.dtype = dtype
        tensors = (source, weight_VX, bias_V)
        pairs = zip(tensors, wanted, strict=True)
        self.made = [torch.zeros_like(t) if t is not None and want else None for t, want in pairs]

    def add_chunk(self, part: slice, gradient_cV: Tensor) -> None:
        """Take in d loss / d logits of a chunk."""
        d_source, d_weight, d_bias = self.made
        if self.weight is None:
            if d_source is not None:
                d_source[part] = gradient_cV.to(d_source.dtype)
            return
        wide = self.dtype or self.weight.dtype
        narrow_cV = gradient_cV.to(wide)
        if d_source is not None:
            d_source[part] = (narrow_cV @ self.weight.to(wide)).to(d_source.dtype)
        if d_weight is not None:
            x_cX = self.source[part].to(wide)
            if wide == d_weight.dtype:
                d_weight.addmm_(narrow_cV.T, x_cX)
            else:
                d_weight.add_(narrow_cV.T @ x_cX)
        if d_bias is not None:
            d_bias.add_(gradient_cV.sum(0))
