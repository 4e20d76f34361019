"""First-order Taylor: by how much the loss would move if an entry became zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from secateur.graph import CoupledGroup, Program
from secateur.passes.base import Context
from secateur.passes.data import IGNORED, CalibrationError, Sample, main_input
from secateur.passes.importance.base import Importance, MemberScores, Needs, parameter_scores

LossKind = Literal["next-token", "labels"]


@dataclass(frozen=True)
class Taylor(Importance):
    """Sum of |w * dL/dw| over the entries of a unit; L is the mean loss over all calibration tokens.

    loss: next-token (cross entropy of the token that follows) or labels (cross entropy of the given labels, unshifted:
        masked language models, classifiers, encoder-decoders).
    Source: Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627, eq. 5 (element-wise, first order; ``param_first`` in code).
    """

    name: ClassVar[str] = "taylor"
    needs: ClassVar[Needs] = "gradients"

    loss: LossKind = "next-token"

    def members(self, program: Program, groups: Sequence[CoupledGroup], context: Context) -> MemberScores:
        wanted = {member.parameter for group in groups for member in group.members}
        gradients = mean_gradients(program, wanted, context, self.loss)

        def salience(name: str, weight: Tensor) -> Tensor:
            return (weight.float() * gradients[name]).abs()

        return parameter_scores(program, groups, salience)


def mean_gradients(program: Program, wanted: set[str], context: Context, loss: LossKind) -> dict[str, Tensor]:
    """Gradient of the mean loss over all calibration tokens.

    Every sequence runs alone and adds its summed loss over the total count, so that batching changes nothing.
    Args: wanted: names of parameters.
    Returns: by name, float32, shape of the parameter; zeros where the loss does not reach it.
    Raises: CalibrationError: nothing to predict, or labels are missing.
    """
    data = context.data or ()
    total = sum(int((targets(sample, program, loss) != IGNORED).sum()) for sample in data)
    if total == 0:
        raise CalibrationError("the calibration data holds no token to predict: sequences need at least two tokens")
    leaves = {name: p.detach().requires_grad_() for name, p in program.named_parameters() if name in wanted}
    found = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        leaf.register_post_accumulate_grad_hook(_move_into(found[name]))
    with torch.enable_grad():
        for sample in context.progress(data, "gradients", len(data)):
            (summed_loss(program, leaves, sample, loss) / total).backward(inputs=list(leaves.values()))
    return found


def _move_into(total: Tensor) -> Callable[[Tensor], None]:
    """Add a gradient to a running sum as soon as it is there and free it, so that no second set of gradients stands."""

    def add(leaf: Tensor) -> None:
        if leaf.grad is not None:
            total.add_(leaf.grad)
            leaf.grad = None

    return add


def targets(sample: Sample, program: Program, loss: LossKind) -> Tensor:
    """What the logits of a sample are compared with: [1, seq - 1] for next-token, else the labels as given."""
    if loss == "labels":
        if sample.labels is None:
            raise CalibrationError("taylor{loss=labels} needs labels in the calibration data")
        return sample.labels
    labels = sample.labels if sample.labels is not None else sample.inputs[main_input(program)]
    return labels[:, 1:]


def summed_loss(program: Program, leaves: Mapping[str, Tensor], sample: Sample, loss: LossKind) -> Tensor:
    """Cross entropy in nats, summed over the tokens of a sample, float32."""
    scores = logits(functional_call(program.gm, dict(leaves), (), dict(sample.inputs)))
    wanted = targets(sample, program, loss).to(scores.device)
    if loss == "next-token":
        scores = scores[:, :-1]
    if scores.dim() < 2 or scores.shape[:-1] != wanted.shape:
        found = f"logits {list(scores.shape)} and targets {list(wanted.shape)}"
        raise CalibrationError(f"the loss {loss!r} does not fit {found}: choose taylor{{loss=...}} or give labels")
    flat = scores.reshape(-1, scores.shape[-1]).float()
    return F.cross_entropy(flat, wanted.reshape(-1), ignore_index=IGNORED, reduction="sum")


def logits(output: Any) -> Tensor:
    """The logits of a model's output: its attribute of that name, or its first tensor."""
    found = getattr(output, "logits", output)
    if isinstance(found, Mapping):
        found = next(iter(found.values()))
    return found[0] if isinstance(found, tuple | list) else found  # type: ignore[no-any-return]
