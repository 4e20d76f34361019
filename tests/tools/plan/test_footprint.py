"""Counts on the graph against counts by hand, and the same with and without weights."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo.models import ConvNet, NanoGPT, perturb, tiny_model

from secateur.graph import Program, capture, keep
from secateur.passes.calibration.observe import op_name
from secateur.tools.plan.footprint import FLOPS, measure_footprint
from secateur.tools.plan.plan import on_meta


def by_hand(
    hidden: int, neurons: int, heads: int, kv_heads: int, head_dim: int, sequence: int
) -> int:
    """FLOPs a token of a two-layer gated transformer with 128 tokens."""
    projections = 2 * hidden * head_dim * (2 * heads + 2 * kv_heads)
    attention = 2 * heads * sequence * 2 * head_dim
    return 2 * (projections + attention + 2 * 3 * hidden * neurons) + 2 * hidden * 128


def test_a_transformer(llama: Program) -> None:
    found = measure_footprint(llama, batch=3, sequence=50)
    assert found.parameters == sum(p.numel() for p in llama.source.model.parameters())
    assert found.bytes == 4 * found.parameters
    assert found.flops_per_token == by_hand(64, 96, 4, 2, 16, 50)
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert (found.batch, found.sequence) == (3, 50)
    assert found.uncounted == {}


def test_what_is_alive_at_once() -> None:
    """Two rows of ten, and where the third is made, three; views cost nothing, and the last product
    is left out."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 10, bias=False), nn.Linear(10, 1000, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            a = self.first(x)
            b = torch.relu(a).reshape(-1, 10).reshape(x.shape)
            return self.last(a + b)

    found = measure_footprint(capture(Rows(), {"x": torch.zeros(2, 7, 10)}), batch=1, sequence=7)
    assert found.live_bytes_per_token == 7 * 3 * 10 * 4  # of a sample, as this is no text
    assert found.largest_bytes_per_token == 7 * 1000 * 4


def test_a_pruned_one(llama: Program) -> None:
    cut = {f"mlp@model.layers.{i}.mlp": range(40) for i in range(2)}
    cut |= {f"kv_heads@model.layers.{i}.self_attn": range(1) for i in range(2)}
    found = measure_footprint(keep(llama, {**cut, "hidden": range(48)}), sequence=50)
    assert found.flops_per_token == by_hand(48, 40, 2, 1, 16, 50)
    assert found.kv_bytes_per_token == 2 * 2 * 16 * 4


def test_the_sequence_never_exceeds_the_model(llama: Program) -> None:
    assert measure_footprint(llama).sequence == 128


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_weights_are_not_needed(kind: str) -> None:
    program = capture(tiny_model(kind))
    with torch.device("meta"):
        weightless = capture(tiny_model(kind))
    found = measure_footprint(program)
    assert found == measure_footprint(on_meta(program)) == measure_footprint(weightless)
    assert found.flops_per_token > 2 * 64


def test_tied_parameters_count_once() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert measure_footprint(capture(model)).parameters == model.num_parameters()


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "vit"])
def test_against_the_counter_of_torch(kind: str) -> None:
    """Attention runs as products there, so that both count every pair of positions."""
    model = tiny_model(kind, attention="eager")
    program = capture(model)
    inputs = {n: v for n, v in program.source.example_inputs.items() if isinstance(v, Tensor)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    first = next(iter(inputs.values()))
    tokens = first.numel() if first.dim() == 2 else len(first)
    sizes = (
        {"batch": first.shape[0], "sequence": first.shape[1]}
        if first.dim() == 2
        else {"batch": first.shape[0]}
    )
    assert measure_footprint(program, **sizes).flops_per_token * tokens == counter.get_total_flops()


def test_convolutions_and_fixed_inputs() -> None:
    model, x = perturb(ConvNet()), torch.randn(2, 3, 16, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    program = capture(model, {"image": x})
    assert measure_footprint(program, batch=2).flops_per_token * 2 == counter.get_total_flops()
    assert measure_footprint(program).kv_bytes_per_token is None


def test_plain_modules_have_no_cache_to_count() -> None:
    program = capture(perturb(NanoGPT()), {"ids": torch.zeros(2, 7, dtype=torch.int64)})
    found = measure_footprint(program, sequence=7)
    assert found.kv_bytes_per_token is None
    assert found.parameters == sum(p.numel() for p in program.source.model.parameters())


class Einsum(nn.Module):
    """A product that is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ij->bj", x, self.weight)


def test_what_is_not_counted_is_told() -> None:
    program = capture(Einsum().eval(), {"x": torch.randn(2, 4)})
    assert measure_footprint(program).uncounted == Counter({"aten.einsum": 1})


def test_every_row_names_an_op(llama: Program) -> None:
    for name in FLOPS:
        library, op = name.split(".", 1)
        if library == "aten":
            assert hasattr(torch.ops.aten, op), name
    assert {op_name(node) for node in llama.gm.graph.nodes} & set(FLOPS)
