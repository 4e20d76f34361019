"""Taylor: by how much the loss would move if an entry became zero, to first or second order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from secateur.graph import CoupledGroup, Program
from secateur.passes.base import Context
from secateur.passes.data import IGNORED, CalibrationError, Sample, main_input
from secateur.passes.importance.base import Importance, MemberScores, Needs, parameter_scores
from secateur.passes.quality import logits

LossKind = Literal["next-token", "labels"]


Form = Literal["element", "vector", "second", "mixed"]
SALIENCE: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "element": lambda w, g, a: (w * g).abs(),
    "vector": lambda w, g, a: w * g,
    "second": lambda w, g, a: (w * a * w).abs(),
    "mixed": lambda w, g, a: (w * g - 0.5 * w * a * w).abs(),
}
NEEDS_SQUARES = ("second", "mixed")


@dataclass(frozen=True)
class Taylor(Importance):
    """By how much the loss would move without a unit; L is the mean loss over all calibration tokens.

    loss: next-token (cross entropy of the token that follows) or labels (cross entropy of the given labels, unshifted:
        masked language models, classifiers, encoder-decoders).
    form: element (sum of |w * dL/dw|), vector (|sum of w * dL/dw| of each row or column of a unit), second
        (sum of |w * A * w| with A the mean over sequences of the squared gradient of a sequence's mean loss: the
        diagonal of the empirical Fisher matrix) or mixed (sum of |w * dL/dw - w * A * w / 2|).
    Source: Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627, eq. 3-5 (``param_first``, ``vectorize``, ``param_second``,
        ``param_mix`` in code).
    """

    name: ClassVar[str] = "taylor"
    needs: ClassVar[Needs] = "gradients"

    loss: LossKind = "next-token"
    form: Form = "element"

    def members(self, program: Program, groups: Sequence[CoupledGroup], context: Context) -> MemberScores:
        wanted = {member.parameter for group in groups for member in group.members}
        squared = self.form in NEEDS_SQUARES
        found = gradients(program, wanted, context, self.loss, squared)

        def salience(name: str, weight: Tensor) -> Tensor:
            squares = found.squares[name] if squared else found.mean[name]
            return SALIENCE[self.form](weight.float(), found.mean[name], squares)

        return parameter_scores(program, groups, salience, vectors=self.form == "vector")


@dataclass(frozen=True)
class Gradients:
    """Of the loss, by parameter name, float32, shape of the parameter; zeros where the loss does not reach.

    mean: of the mean loss over all calibration tokens.
    squares: mean over sequences of the squared gradient of the sequence's own mean loss; empty unless asked for.
    """

    mean: dict[str, Tensor]
    squares: dict[str, Tensor]


def mean_gradients(program: Program, wanted: set[str], context: Context, loss: LossKind) -> dict[str, Tensor]:
    """Gradient of the mean loss over all calibration tokens, see ``gradients``."""
    return gradients(program, wanted, context, loss).mean


def gradients(program: Program, wanted: set[str], context: Context, loss: LossKind, squared: bool = False) -> Gradients:
    """Gradients over the calibration data.

    Every sequence runs alone and adds its summed loss over the total count, so that batching changes nothing.
    Args: wanted: names of parameters.   squared: whether the squares are wanted, too.
    Raises: CalibrationError: nothing to predict, or labels are missing.
    """
    data = context.data or ()
    counts = [int((targets(sample, program, loss) != IGNORED).sum()) for sample in data]
    total, sequences = sum(counts), sum(count > 0 for count in counts)
    if total == 0:
        raise CalibrationError("the calibration data holds no token to predict: sequences need at least two tokens")
    leaves = {name: p.detach().requires_grad_() for name, p in program.named_parameters() if name in wanted}
    mean = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
    squares = {name: torch.zeros_like(sums) for name, sums in mean.items()} if squared else {}
    share = [0.0]
    for name, leaf in leaves.items():
        leaf.register_post_accumulate_grad_hook(_move_into(mean[name], squares.get(name), share, sequences))
    with torch.enable_grad():
        for sample, count in context.progress(list(zip(data, counts, strict=True)), "gradients", len(data)):
            if count:
                share[0] = count / total
                (summed_loss(program, leaves, sample, loss) / total).backward(inputs=list(leaves.values()))
    return Gradients(mean, squares)


def _move_into(
    total: Tensor, squares: Tensor | None, share: Sequence[float], sequences: int
) -> Callable[[Tensor], None]:
    """Add a gradient to running sums as soon as it is there and free it, so that no second set of gradients stands.

    share: holds the sequence's part of all tokens; its own mean loss has that much larger a gradient.
    """

    def add(leaf: Tensor) -> None:
        if leaf.grad is not None:
            total.add_(leaf.grad)
            if squares is not None:
                squares.add_((leaf.grad.float() / share[0]).square_(), alpha=1 / sequences)
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
