"""Programs small enough to check scores by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo.models import tiny_model

from secateur.graph import Program, capture


class TwoLayers(nn.Module):
    """Embedding, one hidden layer with a rectifier, a head: three groups, every score a short
    formula."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 5)
        self.down = nn.Linear(5, 6, bias=False)
        self.head = nn.Linear(6, 11)

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.relu(self.up(self.tokens(ids)))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.down(self.hidden(input_ids)))


@pytest.fixture(scope="session")
def two_layers() -> Program:
    torch.manual_seed(3)
    return capture(TwoLayers().eval(), {"input_ids": torch.zeros(2, 7, dtype=torch.int64)})


@pytest.fixture(scope="session")
def program_of() -> Callable[[str], Program]:
    """Tiny models of named architectures, each captured once."""
    return functools.cache(lambda kind: capture(tiny_model(kind)))


@pytest.fixture(scope="session")
def llama(program_of: Callable[[str], Program]) -> Program:
    """Two layers, hidden 64, 96 neurons, 4 heads over 2 key/value heads."""
    return program_of("llama")


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """[5, 12] tokens below 11."""
    return torch.randint(0, 11, (5, 12), generator=torch.Generator().manual_seed(5))
