"""Capturing a deep stack from a few of its layers gives the very graph that a whole export
gives."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import AutoModelForCausalLM
from zoo.models import tiny_config, tiny_model

import secateur.graph as graph
from secateur.graph.capture.repeat import find_stack

CAPTURE = sys.modules["secateur.graph.capture.export"]


def _deep(kind: str, layers: int) -> dict[str, int]:
    config = tiny_config(kind)
    return {
        n: layers for n in ("num_hidden_layers", "n_layer", "n_layers") if n in config.to_dict()
    }


def _canonical(gm: fx.GraphModule) -> list[str]:
    """The graph's calls with operands by number; a constant goes by nothing, a parameter by its
    name."""
    number: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            number[node] = "constant" if "lifted" in str(node.target) else str(node.target)
            continue
        number[node] = f"%{len(lines)}"
        arguments = fx.map_arg((node.args, node.kwargs), lambda x: number[x])
        value: Any = node.meta.get("val")
        lines.append(
            f"{node.op} {node.target} {arguments} "
            f"{tuple(value.shape) if hasattr(value, 'shape') else ''}"
        )
    return lines


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "gemma2", "deepseek_v3", "mixtral"])
def test_the_laid_graph_is_the_exported_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind, **_deep(kind, 14))
    stack = find_stack(model)
    assert stack is not None and stack.prefix <= 7
    laid = graph.capture(model)
    monkeypatch.setattr(CAPTURE, "find_stack", lambda _: None)
    whole = graph.capture(model)
    assert _canonical(laid.gm) == _canonical(whole.gm)
    assert {n: id(p) for n, p in laid.named_parameters()} == {
        n: id(p) for n, p in whole.named_parameters()
    }
    assert [g.name for g in graph.coupled_groups(laid)] == [
        g.name for g in graph.coupled_groups(whole)
    ]
    graph.verify(laid)


def test_a_pattern_of_kinds_is_followed() -> None:
    stack = find_stack(tiny_model("gemma2", **_deep("gemma2", 14)))
    assert stack is not None and stack.kinds == [0, 1] * 7 and stack.prefix == 6


def test_a_short_stack_is_exported_whole() -> None:
    assert find_stack(tiny_model("llama")) is None


class _Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.linear = index, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return x + (y.relu() if self.index == 9 else y.tanh())


class _Odd(nn.Module):
    """Layers that look alike, but the tenth computes something else by its number alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(i) for i in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_layer_that_only_looks_alike_is_found_out() -> None:
    """What was laid is compared with the model, so a difference that no attribute shows cannot
    pass."""
    model, x = _Odd(), torch.randn(2, 6)
    assert find_stack(model) is not None
    program = graph.capture(model, x)
    assert torch.equal(program(x), model(x))
    assert sum("relu" in str(n.target) for n in program.gm.graph.nodes) == 1


def test_it_is_found_out_without_weights_too() -> None:
    """Nothing can be compared on the meta device but the ops that each layer runs."""
    with torch.device("meta"):
        model, x = _Odd(), torch.randn(2, 6)
    program = graph.capture(model, x)
    assert sum("relu" in str(n.target) for n in program.gm.graph.nodes) == 1


def test_a_stack_with_a_side_channel_is_exported_whole() -> None:
    class Skips(_Odd):
        def forward(self, x: Tensor) -> Tensor:
            before = x
            for layer in self.layers:
                x, before = layer(x) + before, x
            return x

    model, x = Skips(), torch.randn(2, 6)
    program = graph.capture(model, x)
    assert torch.equal(program(x), model(x))


@pytest.mark.parametrize(
    ("layers", "hidden", "inner", "seconds"), [(32, 4096, 14336, 8), (126, 16384, 53248, 20)]
)
def test_capture_and_groups_of_large_shapes(
    layers: int, hidden: int, inner: int, seconds: float
) -> None:
    """Llama-3 8B and 405B shapes on the meta device; CPU seconds of capture and groups together."""
    import time

    heads = hidden // 128
    config = tiny_config(
        "llama", num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, head_dim=128
    )
    config.num_attention_heads, config.num_key_value_heads, config.vocab_size = heads, 8, 128256
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    started = time.process_time()
    groups = graph.coupled_groups(graph.capture(model))
    assert time.process_time() - started <= seconds
    assert sum(g.family == "mlp" for g in groups) == layers
    hidden_group = next(g for g in groups if g.family == "hidden")
    assert hidden_group.units == hidden and len(hidden_group.members) == 9 * layers + 3
