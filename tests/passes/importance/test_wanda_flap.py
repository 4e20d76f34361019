"""Wanda-sp and FLAP in closed form, and their independence of batching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.graph import Program, coupled_groups
from secateur.graph.errors import EditError
from secateur.passes import Context, PruneWidth, Score, samples
from secateur.passes.importance import Flap, Importance, Wanda

ByKind = Callable[[str], Program]
FORMULAS: list[tuple[Importance, Callable[[Tensor], Tensor]]] = [
    (Wanda(), lambda x_TK: x_TK.square().mean(0)),
    (Flap(), lambda x_TK: x_TK.var(0, correction=0)),
]


def scores(metric: Importance, program: Program, data: Any) -> dict[str, Tensor]:
    return dict(Score(metric)(program, Context(data=samples(data, program))).scores)


def input_of(model: nn.Module, module: nn.Module, ids: Tensor) -> Tensor:
    """What a module of the source model reads: [tokens, channels]."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize(("metric", "statistic"), FORMULAS, ids=["wanda", "flap"])
def test_neurons_and_heads(
    metric: Importance, statistic: Callable[[Tensor], Tensor], llama: Program, ids: Tensor
) -> None:
    model, found = llama.source.model, scores(metric, llama, [ids])
    for name, path, units in (
        ("mlp@model.layers.1.mlp", "model.layers.1.mlp.down_proj", 96),
        ("kv_heads@model.layers.0.self_attn", "model.layers.0.self_attn.o_proj", 2),
    ):
        module: Any = model.get_submodule(path)
        by_channel = statistic(input_of(model, module, ids)) * module.weight.detach().square().sum(
            0
        )
        torch.testing.assert_close(found[name], by_channel.unflatten(0, (units, -1)).sum(1))


@pytest.mark.parametrize(("metric", "statistic"), FORMULAS, ids=["wanda", "flap"])
def test_channels_add_over_all_their_readers(
    metric: Importance, statistic: Callable[[Tensor], Tensor], llama: Program, ids: Tensor
) -> None:
    model: Any = llama.source.model
    readers = [model.lm_head]
    for layer in model.model.layers:
        readers += [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        readers += [layer.mlp.gate_proj, layer.mlp.up_proj]
    expected = sum(
        statistic(input_of(model, r, ids)) * r.weight.detach().square().sum(0) for r in readers
    )
    torch.testing.assert_close(scores(metric, llama, [ids])["hidden"], expected)


def test_a_constant_unit_matters_to_wanda_and_not_to_flap(two_layers: Program, ids: Tensor) -> None:
    model: Any = two_layers.source.model
    before = [p.detach().clone() for p in model.up.parameters()]
    with torch.no_grad():
        model.up.weight[2], model.up.bias[2] = 0, 7
    (name,) = [g.name for g in coupled_groups(two_layers) if g.units == 5]
    wanda, flap = (scores(metric, two_layers, [ids])[name] for metric in (Wanda(), Flap()))
    with torch.no_grad():
        for parameter, value in zip(model.up.parameters(), before, strict=True):
            parameter.copy_(value)
    assert float(wanda[2]) == pytest.approx(49 * float(model.down.weight[:, 2].square().sum()))
    assert float(flap[2]) == 0 and float(flap[[0, 1, 3, 4]].max()) > 0


@pytest.mark.parametrize("metric", [Wanda(), Flap()], ids=lambda m: m.name)
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_batching_changes_nothing(
    kind: str, metric: Importance, ids: Tensor, program_of: ByKind
) -> None:
    program = program_of(kind)
    whole, parts = (
        scores(metric, program, [ids]),
        scores(metric, program, list(ids.split([2, 2, 1]))),
    )
    assert any(name.startswith("mlp") for name in whole)
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_heads_and_neurons_rank_together_as_published(llama: Program, ids: Tensor) -> None:
    """The authors' rule: channels standardised in each matrix, heads as means, one ranking by
    parameters."""
    model: Any = llama.source.model
    by_unit, cost = dict[tuple[str, int], float](), dict[str, int]()
    for at, layer in enumerate(model.model.layers):
        for family, path, module, units in (
            ("kv_heads", "self_attn", layer.self_attn.o_proj, 2),
            ("mlp", "mlp", layer.mlp.down_proj, 96),
        ):
            spread = input_of(model, module, ids).var(
                0, correction=0
            ) * module.weight.detach().square().sum(0)
            scaled = (spread - spread.mean()) / spread.std()
            name = f"{family}@model.layers.{at}.{path}"
            values = scaled.unflatten(0, (units, -1)).mean(1).tolist()
            by_unit |= {(name, unit): value for unit, value in enumerate(values)}
            weights = (
                (2 + 2 * 2) * 16 * 64 if family == "kv_heads" else 3 * 64
            )  # of q, o and k, v; of gate, up, down
            cost[name] = weights
    budget, kept = 0.7 * sum(cost[name] for name, _ in by_unit), dict.fromkeys(cost, 0)
    for (name, _), _ in sorted(by_unit.items(), key=lambda item: -item[1]):
        budget -= cost[name]
        if budget < 0:
            break
        kept[name] += 1
    scored = Score(Flap(joint=True))(llama, Context(data=samples([ids], llama)))
    options: dict[str, Any] = {
        "families": ("kv_heads", "mlp"),
        "uniform": False,
        "ranking": "global",
    }
    smaller = PruneWidth(ratio=0.3, normalize="none", **options)(scored)
    left = {group.name: group.units for group in coupled_groups(smaller) if group.name in kept}
    assert min(kept.values()) >= 1 and len({*kept.values()}) > 2
    assert (
        sum(abs(left.get(name, 1) - count) for name, count in kept.items()) <= 2
    )  # the budget's last unit
    with pytest.raises(EditError, match="normalize=mean says nothing"):
        PruneWidth(ratio=0.3, **options)(scored)
