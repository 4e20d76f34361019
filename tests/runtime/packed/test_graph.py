"""The graph with packed products against the program it came from."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from runtime_models import GPT2, SMALL, tiny
from torch import Tensor, nn
from zoo.sparse import made_24

from secateur.graph import Program, capture
from secateur.passes import Pipeline
from secateur.passes.lowering.lower import last_lowering
from secateur.runtime.packed.graph import lower_graph


class Branches(nn.Module):
    """Two layers on one input, one with its bias in addmm's place, and a weight that is read
    twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 8), nn.Linear(16, 12)
        self.last = nn.Linear(20, 4, bias=False)
        self.shared = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.one(x).relu(), self.two(x)], -1)
        z = self.last(y)
        return (
            torch.nn.functional.linear(torch.nn.functional.linear(z, self.shared), self.shared) + 1
        )


def ops(program: Program, text: str) -> Counter[str]:
    lowered = lower_graph(program, last_lowering(Pipeline.parse(text).run(program).history))
    return Counter(str(n.target) for n in lowered.graph.nodes if "secateur" in str(n.target))


@pytest.mark.parametrize(
    ("text", "op"),
    [
        ("lower{smallest=true}", "secateur.linear_24.default"),
        ("quantize{bits=8},lower{smallest=true}", "secateur.linear_24_int8.default"),
        ("quantize{bits=4},lower{smallest=true}", "secateur.linear_24_int4.default"),
    ],
)
def test_products_become_the_op_and_give_the_same(text: str, op: str) -> None:
    program = Pipeline.parse(text).run(made_24(capture(tiny("LlamaConfig", **SMALL))))
    before = str(program.gm.graph)
    lowered = lower_graph(program, last_lowering(program.history))
    assert Counter(str(n.target) for n in lowered.graph.nodes if "secateur" in str(n.target)) == {
        op: 8
    }
    assert str(program.gm.graph) == before, "the program stays as it is"
    held = {name for name, _ in lowered.named_parameters()}
    assert "lm_head.weight" in held and not any("proj" in name for name in held)
    ids = torch.randint(3, 96, (2, 9))
    with torch.no_grad():
        assert torch.allclose(
            lowered(input_ids=ids).logits, program(input_ids=ids).logits, atol=1e-4
        )


def test_plain_modules_with_biases_and_shared_weights() -> None:
    torch.manual_seed(1)
    program = made_24(capture(Branches().eval(), {"x": torch.randn(3, 16)}))
    program = Pipeline.parse("lower{smallest=true,head=auto}").run(program)
    lowered = lower_graph(program, last_lowering(program.history))
    assert sum("secateur" in str(n.target) for n in lowered.graph.nodes) == 2
    assert "shared" in dict(lowered.named_parameters()), "a weight that two ops read is not packed"
    for rows in (1, 5):
        x = torch.randn(rows, 16)
        with torch.no_grad():
            assert torch.allclose(lowered(x=x), program(x=x), atol=1e-5)


def test_the_lowered_graph_exports_again() -> None:
    program = made_24(capture(Branches().eval(), {"x": torch.randn(3, 16)}))
    program = Pipeline.parse("lower{smallest=true}").run(program)
    lowered = lower_graph(program, last_lowering(program.history))
    x = torch.randn(3, 16)
    again = torch.export.export(lowered, (x,), strict=False).module()
    assert torch.allclose(again(x), program(x=x), atol=1e-5)


def test_what_is_not_packed_stays_an_ordinary_product() -> None:
    program = capture(tiny("GPT2Config", **GPT2))
    assert not ops(program, "lower{smallest=true}")
