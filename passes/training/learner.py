"""The learner: a network and the losses that compare it with a teacher.

b sequences, t positions, X width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.passes.training.chunked import Weights, compute_chunked_losses
from secateur.passes.training.network import Network, Output
from secateur.passes.training.rows import Rows

Pair = tuple[int, int]
Batch = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class TeacherTargets:
    """The teacher's output for a batch: token distributions, and hidden states if compared."""

    rows: Rows | None
    states: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class StepLosses:
    """total: with a gradient.
    kl, ce, states: means without, 0 where not asked for.
    """

    total: Tensor
    kl: Tensor
    ce: Tensor
    states: Tensor


class Learner(nn.Module):
    """A network with its losses.

    weights: of KL and cross entropy.
    pairs: (teacher, student) numbers of hidden states to bring together; 0 is the embeddings,
        negative ones count from the end.
    widths: (student, teacher) width of the hidden states; where they differ, one learned projection
        serves all pairs.
    """

    def __init__(
        self,
        network: Network,
        weights: Weights,
        pairs: Sequence[Pair] = (),
        widths: Pair | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.weights = weights
        self.pairs = tuple(pairs)
        self.projection = (
            nn.Linear(*widths, bias=False) if pairs and widths and widths[0] != widths[1] else None
        )
        inner = {type(module).__name__ for module in network.modules()}
        self._no_split_modules = sorted(
            inner & set(getattr(network.body, "_no_split_modules", None) or ())
        )

    def forward(self, batch: Batch, lesson: TeacherTargets) -> StepLosses:
        """The losses of a batch.

        Args:
            batch: ``inputs`` of the model; ``labels`` [b, t] of each position or None; ``counted``
                [b, t] bool or None (all).
            lesson: what the teacher says about it.
        """
        output = self.network(batch["inputs"], bool(self.pairs))
        labels = batch.get("labels")
        counted = batch.get("counted")
        losses = compute_chunked_losses(
            output.rows,
            lesson.rows,
            None if labels is None else labels.reshape(-1),
            None if counted is None else counted.reshape(-1),
            self.weights,
        )
        if not self.pairs:
            return StepLosses(losses.total, losses.kl, losses.ce, torch.zeros_like(losses.kl))
        apart = self._hidden_distance(output, lesson, counted)
        # Minitron's dynamic weight: the two losses count the same, whatever their scales; the KL as
        # it stands in the total, with its weight and the square of its temperature.
        logits = self.weights.kl * self.weights.temperature**2 * losses.kl
        share = logits / apart.detach().clamp_min(1e-8)
        return StepLosses(losses.total + share * apart, losses.kl, losses.ce, apart.detach())

    def _hidden_distance(
        self, output: Output, lesson: TeacherTargets, counted: Tensor | None
    ) -> Tensor:
        """Mean over pairs and tokens of 1 - cosine.

        Source:
            Muralidharan et al. 2024, arXiv:2407.14679, section 3.
        """
        losses = []
        for teacher, student in self.pairs:
            mine = output.states[student].float()
            theirs = lesson.states[teacher].to(mine.device, torch.float32)
            mine = mine if self.projection is None else self.projection(mine)
            far = 1 - F.cosine_similarity(mine, theirs, dim=-1)
            losses.append(far.mean() if counted is None else far[counted].mean())
        return torch.stack(losses).mean()
