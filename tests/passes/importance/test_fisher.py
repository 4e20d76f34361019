"""Fisher against autograd on the source model, and against the KL that a small step really
costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.graph import Program, coupled_groups
from secateur.passes import Context, Score, samples
from secateur.passes.importance.fisher import Fisher


def neurons(program: Program) -> str:
    (name,) = [g.name for g in coupled_groups(program) if g.units == 5]
    return name


def scores(program: Program, data: list[Tensor], **options: Any) -> dict[str, Tensor]:
    return dict(
        Score(Fisher(**options))(program, Context(data=samples(data, program), seed=1)).scores
    )


def test_closed_form_with_given_labels(two_layers: Program, ids: Tensor) -> None:
    model: Any = two_layers.source.model
    expected = torch.zeros(5)
    for row in ids:
        x = model.hidden(row[None]).detach().requires_grad_()
        loss = F.cross_entropy(model.head(model.down(x))[0, :-1], row[1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        expected += (x * gradient)[0].square().sum(0).detach()
    found = scores(two_layers, [ids], labels="data")[neurons(two_layers)]
    torch.testing.assert_close(found, expected / (2 * ids.numel()))


def test_with_drawn_labels_it_is_the_kl_of_a_small_step(two_layers: Program, ids: Tensor) -> None:
    model: Any = copy.deepcopy(two_layers.source.model).double()
    step, expected = 1e-2, []
    with torch.no_grad():
        x = model.hidden(ids)
        dense = model.head(model.down(x)).log_softmax(-1)
        for unit in range(5):
            factor = torch.ones(5, dtype=torch.float64)
            factor[unit] -= step
            moved = model.head(model.down(x * factor)).log_softmax(-1)
            expected.append((dense.exp() * (dense - moved)).sum(-1).mean() / step**2)
    found = scores(two_layers, [ids], draws=600)[neurons(two_layers)]
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=0.1, atol=1e-6)


def test_batching_changes_nothing(llama: Program, ids: Tensor) -> None:
    whole, single = scores(llama, [ids]), scores(llama, [row[None] for row in ids])
    assert whole.keys() == single.keys() and len(whole) > 3
    assert all(torch.equal(whole[name], single[name]) for name in whole)


def test_heads_and_the_residual_stream_are_seen_and_weights_get_no_gradient(
    llama: Program, ids: Tensor
) -> None:
    found = scores(llama, [ids[:2]])
    families = {group.family for group in coupled_groups(llama) if group.name in found}
    assert {"mlp", "kv_heads", "hidden"} <= families
    assert all(bool((value > 0).any()) for value in found.values())
    assert all(p.grad is None for _, p in llama.named_parameters())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_draws_the_labels(llama: Program, ids: Tensor, seed: int) -> None:
    data = samples([ids[:2]], llama)
    name = "mlp@model.layers.0.mlp"
    first, again, other = (
        Score(Fisher())(llama, Context(data=data, seed=s)).scores[name]
        for s in (seed, seed, seed + 7)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
