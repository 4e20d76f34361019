"""First-order Taylor against autograd on the source model, and its independence of batching and
padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from zoo.models import tiny_model

from secateur.graph import Program, capture
from secateur.passes import CalibrationError, Context, Score, samples
from secateur.passes.importance import Taylor
from secateur.passes.importance.gradients import mean_gradients

ByKind = Callable[[str], Program]


def scores(program: Program, data: Any, **options: Any) -> dict[str, Tensor]:
    return dict(Score(Taylor(**options))(program, Context(data=samples(data, program))).scores)


def test_closed_form(two_layers: Program, ids: Tensor) -> None:
    model = two_layers.source.model
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    named = {n: p for n, p in model.named_parameters() if n.startswith(("up", "down"))}
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    salience = {name: (p * gradients[name]).abs().detach() for name, p in named.items()}
    expected = salience["up.weight"].sum(1) + salience["up.bias"] + salience["down.weight"].sum(0)
    found = scores(two_layers, [ids])
    torch.testing.assert_close(found["mlp#2"], expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_loss_is_that_of_the_model(kind: str, program_of: ByKind) -> None:
    program = program_of(kind)
    model = program.source.model
    ids = torch.randint(0, 128, (3, 9))
    name = next(
        n for n, p in model.named_parameters() if p.dim() > 1 and ("down" in n or "mlp.c_proj" in n)
    )
    parameter = dict(model.named_parameters())[name]
    (gradient,) = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, [parameter])
    found = mean_gradients(program, {name}, Context(data=samples([ids], program)), "next-token")
    torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("split", [[5], [1, 4], [2, 2, 1], [1] * 5])
def test_batching_changes_nothing(llama: Program, ids: Tensor, split: list[int]) -> None:
    whole, parts = scores(llama, [ids]), scores(llama, list(ids.split(split)))
    assert set(whole) == set(parts)
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_sequences_of_other_lengths_weigh_by_their_tokens(two_layers: Program, ids: Tensor) -> None:
    model, a, b = two_layers.source.model, ids[:1], ids[1:2, :5]
    losses = [F.cross_entropy(model(x)[0, :-1], x[0, 1:], reduction="sum") for x in (a, b)]
    (gradient,) = torch.autograd.grad(sum(losses) / 15, [model.down.weight])
    found = mean_gradients(
        two_layers, {"down.weight"}, Context(data=samples([a, b], two_layers)), "next-token"
    )
    torch.testing.assert_close(found["down.weight"], gradient)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(llama: Program, ids: Tensor, side: str) -> None:
    pad, ones = torch.full((5, 4), 9), torch.ones_like(ids)
    parts = [(pad, pad * 0), (ids, ones)] if side == "left" else [(ids, ones), (pad, pad * 0)]
    batch = {
        "input_ids": torch.cat([p[0] for p in parts], 1),
        "attention_mask": torch.cat([p[1] for p in parts], 1),
    }
    plain, padded = scores(llama, [ids]), scores(llama, [batch])
    assert all(plain[name].equal(padded[name]) for name in plain)


def test_ignored_labels_do_not_count(two_layers: Program, ids: Tensor) -> None:
    labels = ids.clone()
    labels[:, :6] = -100
    model = two_layers.source.model
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(loss, [model.down.weight])
    data = samples([{"input_ids": ids, "labels": labels}], two_layers)
    found = mean_gradients(two_layers, {"down.weight"}, Context(data=data), "next-token")
    torch.testing.assert_close(found["down.weight"], gradient)


@pytest.mark.parametrize(
    ("kind", "targets"), [("bert", "tokens"), ("vit", "classes"), ("t5", "tokens")]
)
def test_labels_as_the_target(kind: str, targets: str, program_of: ByKind) -> None:
    program = program_of(kind)
    inputs = {n: v for n, v in program.source.example_inputs.items() if isinstance(v, Tensor)}
    labels = (
        torch.zeros(2, dtype=torch.int64) if targets == "classes" else list(inputs.values())[-1]
    )
    found = scores(program, [{**inputs, "labels": labels}], loss="labels")
    assert any(name.startswith("mlp") for name in found)
    assert all(bool((score >= 0).all()) and float(score.sum()) > 0 for score in found.values())


def test_the_model_is_left_as_it_was(llama: Program, ids: Tensor) -> None:
    for _, parameter in llama.named_parameters():
        parameter.requires_grad_(False)
    try:
        scores(llama, [ids])
        assert all(p.grad is None and not p.requires_grad for _, p in llama.named_parameters())
    finally:
        for _, parameter in llama.named_parameters():
            parameter.requires_grad_(True)


def test_half_precision_accumulates_in_float32() -> None:
    program = capture(tiny_model("llama").to(torch.bfloat16))
    found = scores(program, [torch.randint(0, 128, (2, 8))])
    assert {score.dtype for score in found.values()} == {torch.float32}


def test_nothing_to_predict(llama: Program) -> None:
    with pytest.raises(CalibrationError, match="at least two tokens"):
        scores(llama, [torch.ones(3, 1, dtype=torch.int64)])
    with pytest.raises(CalibrationError, match="needs labels"):
        scores(llama, [torch.ones(3, 4, dtype=torch.int64)], loss="labels")
