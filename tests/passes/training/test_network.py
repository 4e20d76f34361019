"""Where a model is cut before its head, and where it must stay whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo.models import tiny_model

from secateur.passes.training.network import Network
from secateur.passes.training.rows import HeadRows, LogitRows

IDS = {"input_ids": torch.arange(3, 15)[None]}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite", "cohere", "opt"])
def test_rows_are_the_models_logits(kind: str) -> None:
    """Untied and tied heads, scaled ones too: a scale before the head does what one after it
    did."""
    model = tiny_model(kind)
    with torch.no_grad():
        expected = model(**IDS).logits[0]
        network = Network(model, IDS)
        rows = network(IDS).rows
    assert isinstance(rows, HeadRows) and rows.count_rows == 12
    torch.testing.assert_close(rows.logits(slice(2, 7)), expected[2:7], rtol=1e-5, atol=1e-5)
    network.restore()
    with torch.no_grad():
        assert torch.equal(model(**IDS).logits[0], expected)


@pytest.mark.parametrize("kind", ["gemma2", "bert"])
def test_a_model_that_does_more_after_its_head_stays_whole(kind: str) -> None:
    model = tiny_model(kind)
    with torch.no_grad():
        expected = model(**IDS).logits[0]
        network = Network(model, IDS)
        rows = network(IDS).rows
    if kind == "gemma2":
        assert isinstance(rows, LogitRows) and network.head is None
    torch.testing.assert_close(rows.logits(slice(None)), expected, rtol=1e-5, atol=1e-5)


def test_the_parameters_stay_the_same_objects() -> None:
    model = tiny_model("llama")
    before = {id(p) for p in model.parameters()}
    network = Network(model, IDS)
    assert {id(p) for p in network.parameters()} == before
    network.restore()
    assert {id(p) for p in model.parameters()} == before


def test_a_head_without_which_the_model_does_not_run_stays() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(32, 4), nn.Linear(4, 32)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: Any) -> Any:
            return self.head(self.table(input_ids)).reshape(*input_ids.shape, 32)

    model = Picky()
    network = Network(model, IDS)
    assert network.head is None and isinstance(model.head, nn.Linear)
    assert isinstance(network(IDS).rows, LogitRows)
