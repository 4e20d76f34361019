"""The losses of a learner, by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.passes.training.chunked import Weights
from secateur.passes.training.learner import Learner, TeacherTargets
from secateur.passes.training.network import Output
from secateur.passes.training.rows import LogitRows


class Still(nn.Module):
    """A network that always says the same."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.logits = nn.Parameter(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)))
        self.state = nn.Parameter(torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)))

    def forward(self, inputs: Mapping[str, Any], states: bool = False) -> Output:
        return Output(LogitRows(self.logits), (self.state,) if states else ())


@pytest.mark.parametrize(
    ("kl", "ce", "temperature"), [(1.0, 0.0, 1.0), (0.5, 0.5, 2.0), (3.0, 1.0, 0.5)]
)
def test_states_count_as_much_as_the_divergence_does_in_the_total(
    kl: float, ce: float, temperature: float
) -> None:
    teacher = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    state = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3))
    network, labels = Still(), torch.arange(6).view(2, 3)
    learner = Learner(network, Weights(kl, ce, temperature), [(0, 0)])  # type: ignore[arg-type]
    losses = learner({"inputs": {}, "labels": labels}, TeacherTargets(LogitRows(teacher), (state,)))
    q, p = ((logits / temperature).log_softmax(-1) for logits in (network.logits, teacher))
    divergence = kl * temperature**2 * float((p.exp() * (p - q)).sum(-1).mean())
    text = ce * float(F.cross_entropy(network.logits, labels.flatten()))
    assert float(losses.total) == pytest.approx(2 * divergence + text, rel=1e-5)
    losses.total.backward()
    assert network.state.grad is not None
    apart = Tensor(1 - F.cosine_similarity(network.state, state, dim=-1).detach()).mean()
    (alone,) = torch.autograd.grad(
        (1 - F.cosine_similarity(network.state, state, dim=-1)).mean(), network.state
    )
    torch.testing.assert_close(network.state.grad, divergence / apart * alone)
