"""All nine (batch, sequence) aggregations of the activation score, in closed form."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.graph import Program, coupled_groups
from secateur.passes import Context, Pipeline, Score, samples
from secateur.passes.importance import Activation
from secateur.passes.importance.activation import BATCH, SEQUENCE

# x: [batch, seq, units] -> [batch, units], and [batch, units] -> [units].
OVER_SEQUENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.abs().mean(1),
    "l2": lambda x: x.square().sum(1).sqrt(),
    "var": lambda x: x.var(1, correction=0),
}
OVER_BATCH: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda x: x.square().sum(0).sqrt(),
    "mean": lambda x: x.mean(0),
    "var": lambda x: x.var(0, correction=0),
}


@pytest.mark.parametrize(("batch", "sequence"), list(itertools.product(OVER_BATCH, OVER_SEQUENCE)))
def test_closed_form(two_layers: Program, ids: Tensor, batch: Any, sequence: Any) -> None:
    """The channels between embedding and first layer: signed, read once."""
    metric = Activation(batch=batch, sequence=sequence)
    found = Score(metric)(two_layers, Context(data=samples([ids], two_layers))).scores
    model: Any = two_layers.source.model
    with torch.no_grad():
        embedded, hidden = model.tokens(ids).double(), model.hidden(ids).double()
    (channels,) = [
        g
        for g in coupled_groups(two_layers)
        if any(m.parameter == "up.weight" and m.dim for m in g.members)
    ]
    (neurons,) = [g for g in coupled_groups(two_layers) if g.units == 5]
    for group, x in ((channels, embedded), (neurons, hidden)):
        expected = OVER_BATCH[batch](OVER_SEQUENCE[sequence](x))
        torch.testing.assert_close(found[group.name].double(), expected, rtol=1e-5, atol=1e-7)


def test_heads_vary_by_their_norm(llama: Program, ids: Tensor) -> None:
    metric = Activation(batch="mean", sequence="var")
    found = Score(metric)(llama, Context(data=samples([ids], llama))).scores
    seen: list[Tensor] = []
    module = llama.source.model.get_submodule("model.layers.0.self_attn.o_proj")
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        llama.source.model(input_ids=ids)
    handle.remove()
    norms = seen[0].unflatten(-1, (2, 32)).norm(dim=-1)
    torch.testing.assert_close(
        found["kv_heads@model.layers.0.self_attn"], norms.var(1, correction=0).mean(0)
    )


def test_the_tables_are_the_options() -> None:
    assert set(SEQUENCE) == set(OVER_SEQUENCE) and set(BATCH) == set(OVER_BATCH)
    for batch, sequence in itertools.product(BATCH, SEQUENCE):
        (score,) = Pipeline.parse(
            f"score{{metric=activation{{batch={batch},sequence={sequence}}}}}"
        ).passes
        assert score == Score(Activation(batch=batch, sequence=sequence))  # type: ignore[arg-type]
    assert Activation() == Activation(batch="l2", sequence="mean")
