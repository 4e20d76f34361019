"""The four forms of the Taylor score against autograd on the source model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.graph import Program, coupled_groups
from secateur.passes import Context, Score, samples
from secateur.passes.importance import Taylor
from secateur.passes.importance.gradients import loss_gradients
from secateur.passes.importance.taylor import SALIENCE

Named = dict[str, Tensor]
# (w, g, a) -> what an entry adds to its row or column; vector: the absolute value comes after the
# sum.
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "element": lambda w, g, a: (w * g).abs(),
    "vector": lambda w, g, a: w * g,
    "second": lambda w, g, a: w.square() * a,
    "mixed": lambda w, g, a: (w * g - w.square() * a / 2).abs(),
}


def autograd_gradients(model: Any, ids: Tensor) -> Named:
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    named = {n: p for n, p in model.named_parameters() if n.startswith(("up", "down"))}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_closed_form(two_layers: Program, ids: Tensor, form: Any) -> None:
    model: Any = two_layers.source.model
    mean = autograd_gradients(model, ids)
    each = [autograd_gradients(model, row[None]) for row in ids]
    squares = {name: torch.stack([g[name].square() for g in each]).mean(0) for name in mean}
    entries = {
        n: FORMS[form](p.detach(), mean[n], squares[n])
        for n, p in model.named_parameters()
        if n in mean
    }
    parts = [entries["up.weight"].sum(1), entries["up.bias"], entries["down.weight"].sum(0)]
    expected = sum(part.abs() for part in parts)
    (neurons,) = [g.name for g in coupled_groups(two_layers) if g.units == 5]
    found = Score(Taylor(form=form))(two_layers, Context(data=samples([ids], two_layers))).scores[
        neurons
    ]
    torch.testing.assert_close(found, expected)


def test_a_head_adds_its_vectors_after_their_absolute_value(llama: Program, ids: Tensor) -> None:
    data = samples([ids], llama)
    scored = Score(Taylor(form="vector"))(llama, Context(data=data)).scores[
        "kv_heads@model.layers.0.self_attn"
    ]
    names = {f"model.layers.0.self_attn.{n}_proj.weight": n for n in "qkvo"}
    found = loss_gradients(llama, set(names), Context(data=data), "next-token").mean
    expected = torch.zeros(2)
    for name, letter in names.items():
        entries = llama.source.model.get_parameter(name).detach() * found[name]
        expected += entries.sum(0 if letter == "o" else 1).abs().unflatten(0, (2, -1)).sum(1)
    torch.testing.assert_close(scored, expected)


def test_squares_are_of_each_sequence_whatever_its_length(two_layers: Program, ids: Tensor) -> None:
    rows = [ids[0, :12], ids[1, :5], ids[2, :8]]
    data = samples([row[None] for row in rows], two_layers)
    found = loss_gradients(
        two_layers, {"up.weight"}, Context(data=data), "next-token", squared=True
    )
    each = [autograd_gradients(two_layers.source.model, row[None])["up.weight"] for row in rows]
    torch.testing.assert_close(
        found.squares["up.weight"], torch.stack([g.square() for g in each]).mean(0)
    )
    weighted = sum(g * (len(row) - 1) for g, row in zip(each, rows, strict=True)) / (11 + 4 + 7)
    torch.testing.assert_close(found.mean["up.weight"], weighted)


def test_the_table_is_the_option() -> None:
    assert set(SALIENCE) == set(FORMS)
    assert Taylor() == Taylor(form="element")
