"""Minitron's score against hooks on the source model, in closed form, and its independence of
batching and padding."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.graph import Program, coupled_groups
from secateur.passes import Context, Score, samples
from secateur.passes.calibration.observe import readers
from secateur.passes.importance import Activation
from secateur.passes.importance.activation import unit_activity

ByKind = Callable[[str], Program]


def scores(program: Program, data: Any) -> dict[str, Tensor]:
    return dict(Score(Activation())(program, Context(data=samples(data, program))).scores)


def inputs_of(model: nn.Module, wanted: dict[str, nn.Module], ids: Tensor) -> dict[str, Tensor]:
    """What some modules of the source model read."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, args: seen.__setitem__(name, args[0].detach())

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in wanted.items()]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def minitron(x: Tensor) -> Tensor:
    """x: [batch, seq, units] -> [units]: mean of |x| over the sequence, L2 over the batch."""
    return x.abs().mean(1).square().sum(0).sqrt()


def test_formula_on_a_hand_made_activation() -> None:
    x = torch.tensor(
        [
            [[1.0, -3.0, 0.0, 4.0], [3.0, 1.0, 2.0, 0.0]],
            [[0.0, 0.0, -2.0, 1.0], [2.0, 4.0, 0.0, -1.0]],
        ]
    )
    single = SimpleNamespace(dim=-1, positions=torch.tensor([[0], [1], [2], [3]]))
    paired = SimpleNamespace(dim=-1, positions=torch.tensor([[0, 1], [2, 3]]))
    first = unit_activity(x, single, 2)  # type: ignore[arg-type]
    assert first.tolist() == [[2, 2, 1, 2], [1, 2, 1, 1]]
    torch.testing.assert_close(first.square().sum(0).sqrt().float(), minitron(x))
    second = unit_activity(x, paired, 2)  # type: ignore[arg-type]
    expected = [[(10**0.5 + 10**0.5) / 2, (4 + 2) / 2], [(0 + 20**0.5) / 2, (5**0.5 + 1) / 2]]
    torch.testing.assert_close(second, torch.tensor(expected, dtype=torch.float64))
    flat = unit_activity(x.flatten(0, 1), paired, 2)  # type: ignore[arg-type]
    torch.testing.assert_close(flat, second)


def test_neurons_heads_and_channels(llama: Program, ids: Tensor) -> None:
    model = llama.source.model
    layers: Any = model.get_submodule("model.layers")
    down = {f"down.{i}": layer.mlp.down_proj for i, layer in enumerate(layers)}
    out = {f"o.{i}": layer.self_attn.o_proj for i, layer in enumerate(layers)}
    reads = {
        f"{what}.{i}": getattr(layer, where)
        for i, layer in enumerate(layers)
        for what, where in BRANCHES
    }
    firsts = {name: next(m for m in branch.children()) for name, branch in reads.items()}
    seen = inputs_of(model, {**down, **out, **firsts, "head": model.get_submodule("lm_head")}, ids)
    found = scores(llama, [ids])
    torch.testing.assert_close(found["mlp@model.layers.1.mlp"], minitron(seen["down.1"]))
    heads = seen["o.0"].unflatten(-1, (2, 32)).norm(dim=-1)
    torch.testing.assert_close(found["kv_heads@model.layers.0.self_attn"], minitron(heads))
    channels = sum(minitron(seen[name]) for name in firsts)
    torch.testing.assert_close(found["hidden"], channels)


BRANCHES = (("attention", "self_attn"), ("feed", "mlp"))


@pytest.mark.parametrize("split", [[1, 4], [2, 2, 1]])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_batching_changes_nothing(
    kind: str, ids: Tensor, split: list[int], program_of: ByKind
) -> None:
    program = program_of(kind)
    whole, parts = scores(program, [ids]), scores(program, list(ids.split(split)))
    assert any(name.startswith("mlp") for name in whole)
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_padding_does_not_count(llama: Program, ids: Tensor) -> None:
    padded = torch.cat([ids, torch.full((5, 3), 9)], 1)
    mask = torch.ones_like(padded)
    mask[:, 12:] = 0
    plain, with_mask = (
        scores(llama, [ids]),
        scores(llama, [{"input_ids": padded, "attention_mask": mask}]),
    )
    assert all(plain[name].equal(with_mask[name]) for name in plain)
    counted = scores(llama, [padded])
    assert not plain["hidden"].equal(counted["hidden"])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "t5", "vit", "phi3"])
def test_every_group_with_a_consumer_is_seen(kind: str, program_of: ByKind) -> None:
    """Each group that some weight consumes has readers, whose channels match its positions."""
    program = program_of(kind)
    groups = [
        g
        for g in coupled_groups(program)
        if g.locked is None and any(m.role == "consumes" for m in g.members)
    ]
    assert {"mlp", "hidden"} <= {group.family for group in groups}
    for group in groups:
        found = readers(program, group)
        assert found, group.name
        for reader in found:
            channels = reader.node.meta["val"].shape[reader.dim]
            assert int(reader.positions.max()) < channels, group.name


def test_a_group_that_no_weight_reads_is_left_out(llama: Program, ids: Tensor) -> None:
    scored = Score(Activation())(llama, Context(data=samples([ids], llama)))
    rotary = [
        g.name
        for g in coupled_groups(llama)
        if all(m.role != "consumes" for m in g.members) and not g.locked
    ]
    assert rotary
    assert scored.history[-1].figures["unscored"] == sorted(rotary)
    assert not set(rotary) & set(scored.scores)
