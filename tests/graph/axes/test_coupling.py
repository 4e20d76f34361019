"""The groups of known architectures, against a hand-written list."""

from __future__ import annotations

import itertools

import networkx as nx
import pytest
from zoo.checks import captured

import secateur.graph as graph
from secateur.graph import CoupledGroup


def _groups(kind: str) -> dict[str, CoupledGroup]:
    return {g.name: g for g in graph.coupled_groups(captured(kind)[1])}


def _members(group: CoupledGroup) -> set[tuple[str, int, str]]:
    return {(m.parameter.removeprefix("model.layers.0."), m.dim, m.role) for m in group.members}


def test_a_gated_mlp() -> None:
    group = _groups("llama")["mlp@model.layers.0.mlp"]
    assert group.units == 96 and group.block == "model.layers.0" and group.locked is None
    assert _members(group) == {
        ("mlp.gate_proj.weight", 0, "produces"),
        ("mlp.up_proj.weight", 0, "produces"),
        ("mlp.down_proj.weight", 1, "consumes"),
    }


def test_a_key_value_head_takes_its_query_heads_along() -> None:
    group = _groups("llama")["kv_heads@model.layers.0.self_attn"]
    assert group.units == 2
    rows = {m.parameter.split(".")[-2]: m.indices(1).tolist() for m in group.members}
    assert rows["k_proj"] == rows["v_proj"] == list(range(16, 32))
    assert rows["q_proj"] == rows["o_proj"] == list(range(32, 64))


def test_rotary_pairs_stay_whole_and_run_through_all_layers() -> None:
    group = _groups("llama")["head_dim@model.layers"]
    assert group.units == 8 and group.block == ""
    assert {m.parameter for m in group.buffers} == {"model.rotary_emb.inv_freq"}
    assert group.members[0].indices(0).tolist()[:2] == [0, 8]


def test_the_residual_stream_is_one_group() -> None:
    group = _groups("llama")["hidden"]
    assert group.units == 64
    assert {m.role for m in group.members} == {"produces", "consumes", "scales", "looks_up"}
    assert len(group.members) == 21  # embedding, head, final norm, and nine in each of two layers


def test_the_vocabulary_is_locked_with_the_reason() -> None:
    group = _groups("gpt2")["vocabulary@transformer.wte"]
    assert group.locked and "input" in group.locked and "output" in group.locked


def test_a_fused_projection_is_taken_apart() -> None:
    """Query, key and value lie side by side in one matrix: a head has rows in each third."""
    group = _groups("gpt2")["kv_heads@transformer.h.0.attn"]
    fused = next(m for m in group.members if m.parameter.endswith("c_attn.weight"))
    assert fused.dim == 1
    assert fused.indices(0).tolist() == [*range(16), *range(64, 80), *range(128, 144)]


def test_an_expert_takes_its_router_row_along() -> None:
    group = _groups("mixtral")["experts@model.layers.0.mlp"]
    assert group.min_units == 2
    assert {(m.parameter.split(".")[-1], m.dim) for m in group.members} == {
        ("weight", 0),
        ("gate_up_proj", 0),
        ("down_proj", 0),
    }


def test_experts_that_zeroing_cannot_silence_are_locked() -> None:
    experts = [g for g in _groups("deepseek_v3").values() if g.family == "experts"]
    assert experts and all("could still be chosen" in (g.locked or "") for g in experts)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "t5", "bloom", "conv_net"])
def test_groups_are_the_components_of_the_coupling_graph(kind: str) -> None:
    _, program = captured(kind)
    components = [
        {(p.name, p.leaf) for p in component if p.kind == "parameter"}
        for component in nx.connected_components(graph.coupling_graph(program))
    ]
    expected = [
        {(m.parameter, g.leaf.number) for m in g.members} for g in graph.coupled_groups(program)
    ]
    key = sorted
    assert sorted((key(c) for c in components if c), key=str) == sorted(
        (key(e) for e in expected), key=str
    )


def test_the_graph_says_why_two_parameters_are_coupled() -> None:
    _, program = captured("llama")
    coupling = graph.coupling_graph(program)
    group = _groups("llama")["mlp@model.layers.0.mlp"]
    ends = [
        p
        for p in coupling
        if p.leaf == group.leaf.number and p.name.endswith(("gate_proj.weight", "down_proj.weight"))
    ]
    path = nx.shortest_path(coupling, *ends)
    ops = [coupling.edges[edge]["target"] for edge in itertools.pairwise(path)]
    assert "aten.mul.Tensor" in ops and "aten.linear.default" in ops


def test_names_are_unique_and_stable_over_edits() -> None:
    _, program = captured("qwen3")
    before = [g.name for g in graph.coupled_groups(program)]
    assert len(set(before)) == len(before)
    edit = {g: range(g.units // 2) for g in graph.coupled_groups(program) if g.family == "mlp"}
    assert [g.name for g in graph.coupled_groups(graph.keep(program, edit))] == before


def test_every_family_is_described() -> None:
    for kind in ("llama", "mixtral", "deepseek_v3", "conv_net", "t5", "vit"):
        assert {g.family for g in graph.coupled_groups(captured(kind)[1])} <= set(graph.FAMILIES)
