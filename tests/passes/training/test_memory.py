"""What a run remembers comes back bit for bit."""

from __future__ import annotations

import json
import random

import numpy as np
import torch
from torch import nn

from secateur.passes.training.memory import (
    add_prefix,
    isolate_randomness,
    optimizer_state,
    put_optimizer_state,
    put_random_state,
    put_weights,
    random_state,
    weights_of,
    with_prefix,
)


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_generators_come_back_through_json() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draws()
    tensors, facts = random_state()
    expected = draws()
    draws()
    put_random_state(tensors, json.loads(json.dumps(facts)))
    assert draws() == expected
    put_random_state(tensors, json.loads(json.dumps(facts)))
    with isolate_randomness():
        torch.manual_seed(5)
        draws()
    assert draws() == expected


def test_weights_and_moments_come_back() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1, bias=False)),
        torch.randn(8, 4),
    )
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95)
    )

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    kept = {name: value.clone() for name, value in weights_of(model).items()}
    assert "2.weight" not in kept and "1.running_mean" in kept, (
        "what is trained, and what changes by itself"
    )
    tensors, facts = optimizer_state(optimizer)
    tensors = {name: value.clone() for name, value in tensors.items()}
    facts = json.loads(json.dumps(facts))
    step()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    step()
    put_weights(model, kept)
    put_optimizer_state(optimizer, with_prefix("o", add_prefix("o", tensors)), facts)
    step()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
