"""The property that everything stands on: pruned equals masked, for random architectures, groups
and units."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo.checks import captured, compare, logits, other_inputs

import secateur.graph as graph

KINDS = [
    "llama",
    "gpt2",
    "qwen3",
    "mixtral",
    "gemma2",
    "bloom",
    "falcon",
    "phi3",
    "t5",
    "bert",
    "nano_gpt",
    "conv_net",
]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10_000), data=st.data())
def test_pruned_equals_masked(kind: str, seed: int, data: st.DataObject) -> None:
    _, program = captured(kind)
    free = [g for g in graph.coupled_groups(program) if not g.locked]
    chosen = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=len(free), unique=True))
    generator = torch.Generator().manual_seed(seed)
    edit = {}
    for group in chosen:
        count = data.draw(st.integers(group.min_units, group.units))
        edit[group] = torch.randperm(group.units, generator=generator)[:count].tolist()
    difference, _ = compare(program, edit, other_inputs(program, seed))
    assert difference <= 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "nano_gpt"])
def test_masking_neurons_is_zeroing_their_weights(kind: str) -> None:
    """The oracle itself against plain zeroing of the source model's parameters, where no norm sees
    the units."""
    model, program = captured(kind)
    group = next(g for g in graph.coupled_groups(program) if g.family == "mlp")
    dropped = list(range(0, group.units, 3))
    zeroed = {n: p.detach().clone() for n, p in model.named_parameters()}
    for member in group.members:
        for unit in dropped:
            zeroed[member.parameter].index_fill_(member.dim, member.indices(unit), 0)
    inputs = other_inputs(program)
    with torch.no_grad():
        expected = logits(torch.func.functional_call(model, zeroed, (), inputs))
        kept = [u for u in range(group.units) if u not in dropped]
        masked = logits(graph.masked_call(program, {group: kept}, **inputs))
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-5)


def test_an_absent_channel_does_not_count_in_a_norm() -> None:
    """A hidden channel that goes leaves a norm over the others: the same model built narrow
    agrees."""
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 5))
    program = graph.capture(wide, torch.randn(2, 6))
    group = next(g for g in graph.coupled_groups(program) if g.units == 8)
    kept = [0, 2, 3, 5, 7]
    narrow = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 5)
    )
    with torch.no_grad():
        narrow[0].weight.copy_(wide[0].weight[kept])
        narrow[0].bias.copy_(wide[0].bias[kept])
        narrow[2].weight.copy_(wide[2].weight[:, kept])
        narrow[2].bias.copy_(wide[2].bias)
        x = torch.randn(3, 6)
        torch.testing.assert_close(graph.masked_call(program, {group: kept}, x), narrow(x))
        torch.testing.assert_close(graph.keep(program, {group: kept})(x), narrow(x))
