"""Products under masks: who gets a gradient, what recomputation and compilation see, and how a
model is left."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from secateur.graph import Pattern, Program, Share, Sparse, capture
from secateur.graph.errors import PipelineError
from secateur.passes import Context
from secateur.passes.training.masks.choice import MaskScore, bake_mask, revive_weight, start_mask
from secateur.passes.training.masks.masked import (
    MaskedLinear,
    Way,
    linear_only,
    mask_straight_through,
    mask_weight,
    put_masks,
    take_masks,
    under_mask,
)
from secateur.runtime import to_transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from worker import sparse

P24 = Pattern(2, 4)
Made = tuple[Program, Context]


@pytest.fixture(scope="module")
def made() -> Made:
    torch.manual_seed(0)
    return sparse()


class Stack(nn.Module):
    """Three linear modules under masks."""

    def __init__(self, way: Way = "through", again: bool = False) -> None:
        super().__init__()
        self.layers, self.again = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)), again
        for layer in self.layers:
            under_mask(layer, P24.select_mask(layer.weight.detach().abs()), way)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(checkpoint(layer, x, use_reentrant=False) if self.again else layer(x))
        return x


@pytest.mark.parametrize("through", [True, False])
def test_the_gradient_goes_to_all_entries_or_to_those_that_are_kept(through: bool) -> None:
    weight, x, out = (
        torch.randn(6, 8, requires_grad=True),
        torch.randn(5, 8, requires_grad=True),
        torch.randn(5, 6),
    )
    mask = P24.select_mask(weight.detach().abs())
    y = torch.nn.functional.linear(
        x, (mask_straight_through if through else mask_weight)(weight, mask)
    )
    y.backward(out)
    assert torch.equal(y, x @ (weight * mask).T)
    assert weight.grad is not None and x.grad is not None
    torch.testing.assert_close(weight.grad, out.T @ x.detach() * (1 if through else mask))
    torch.testing.assert_close(x.grad, out @ (weight * mask).detach())


def test_recomputed_activations_give_the_same_gradients_also_after_masks_changed() -> None:
    torch.manual_seed(0)
    plain = Stack()
    again = copy.deepcopy(plain)
    again.again = True
    x = torch.randn(7, 16)
    for _ in range(3):
        for model in (plain, again):
            model.zero_grad()
            model(x).square().sum().backward()
            for layer in model.layers:
                with torch.no_grad():
                    layer.weight -= 0.1 * layer.weight.grad
                    layer.weight_mask.copy_(P24.select_mask(layer.weight.abs()))
        for one, two in zip(plain.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=0)


def test_a_new_mask_compiles_nothing_anew() -> None:
    torch.manual_seed(0)
    model, counter = Stack(), CompileCounterWithBackend("aot_eager")
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(7, 16)
    for step in range(30):
        losses = [run(x).square().sum() for run in (compiled, eager)]
        torch.testing.assert_close(*losses)
        for loss, stack in zip(losses, (model, eager), strict=True):
            stack.zero_grad()
            loss.backward()
            with torch.no_grad():
                for layer in stack.layers:
                    layer.weight -= 0.05 * layer.weight.grad
                    if step % 10 == 9:
                        layer.weight_mask.copy_(P24.select_mask(layer.weight.abs()))
    assert counter.frame_count == 1


def test_masks_are_put_in_and_taken_out_without_a_trace(made: Made) -> None:
    program, _ = made
    ids = torch.arange(20)[None]
    models = [(to_transformers(program), "stock"), (program.gm, "graph")]
    for model, kind in models:
        keys, expected = list(model.state_dict()), model(input_ids=ids).logits
        code = model.code if kind == "graph" else ""
        sites = put_masks(model, program, way="through")
        assert [site.name for site in sites] == list(program.sparse)
        assert all(
            site.mask.dtype == torch.bool and site.name + "_mask" in model.state_dict()
            for site in sites
        )
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            sites[3].mask.zero_()
        assert not torch.allclose(model(input_ids=ids).logits, expected)
        take_masks(model, sites)
        assert list(model.state_dict()) == keys and torch.equal(
            model(input_ids=ids).logits, expected
        )
        assert not any(isinstance(module, MaskedLinear) for module in model.modules())
        assert kind != "graph" or model.code == code


def test_what_is_no_plain_linear_module_is_refused(made: Made) -> None:
    program, _ = made
    model = to_transformers(program)
    assert linear_only(model, program) is None
    model.model.layers[0].mlp.up_proj.__class__ = type("Special", (nn.Linear,), {})
    assert "up_proj.weight is held by Special" in str(linear_only(model, program))
    with pytest.raises(PipelineError, match="expected one plain Linear"):
        put_masks(model, program, way="through")


@pytest.mark.parametrize("pattern", [P24, Pattern(1, 4), Pattern(4, 8), Share(0.5)], ids=str)
@pytest.mark.parametrize("metric", ["magnitude", "wanda", "ria"])
def test_what_was_removed_comes_back_next_in_line(pattern: Pattern | Share, metric: str) -> None:
    """The kept values were changed after the mask was chosen, so some removed ones would displace
    them at once."""
    dense, norms = torch.randn(12, 16), torch.rand(16) + 0.1
    mask = pattern.select_mask(torch.rand(12, 16))
    one = Sparse(pattern, metric, norms, dense.masked_fill(mask, 0))
    weight = dense.masked_fill(~mask, 0)
    assert torch.equal(start_mask(weight, one), mask)
    score = MaskScore("match")
    assert not torch.equal(pattern.select_mask(score(dense, one)), mask), (
        "or there is nothing to test"
    )
    back = revive_weight(weight, one, score)
    assert torch.equal(pattern.select_mask(score(back, one)), mask)
    assert torch.equal(back[mask], dense[mask]) and (back.abs() <= dense.abs()).all()
    assert ((back != 0) == (dense != 0)).all() and torch.equal(back.sign(), dense.sign())
    agreeing = Sparse(
        pattern, metric, norms, dense.masked_fill(pattern.select_mask(score(dense, one)), 0)
    )
    same = revive_weight(dense.masked_fill(agreeing.removed != 0, 0), agreeing, score)
    assert torch.equal(same, dense)


def test_zeros_are_positive_and_nothing_is_lost() -> None:
    weight, mask = torch.randn(6, 8), P24.select_mask(torch.rand(6, 8))
    weight[0, :4] = torch.tensor([-0.0, -0.0, -1.0, 2.0])
    left, gone = bake_mask(weight, mask)
    assert torch.equal(left + gone, weight) and not ((left == 0) & left.signbit()).any()
    assert not ((gone == 0) & gone.signbit()).any() and P24.describe_violations(left) is None


def test_a_score_that_matches_follows_what_the_mask_was_chosen_by() -> None:
    norms, match = torch.ones(4), MaskScore("match")
    assert match.metric_of(Sparse(P24)) == "magnitude"
    assert [
        match.metric_of(Sparse(P24, metric, norms)) for metric in ("wanda", "ria", "sparsegpt")
    ] == [
        "wanda",
        "ria",
        "wanda",
    ]
    assert match.metric_of(Sparse(P24, "sparsegpt")) == "magnitude"
    assert MaskScore("wanda").metric_of(Sparse(P24, "ria", norms)) == "wanda"
    assert "x has none" in str(MaskScore("wanda").incompatibility({"x": Sparse(P24)}))
    assert match.incompatibility({"x": Sparse(P24)}) is None


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_a_graph_that_reads_a_weight_twice_masks_it_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(torch.relu(self.inner(x)))

    x = torch.randn(2, 8)
    program = capture(Twice().eval(), {"x": x})
    mask = P24.select_mask(dict(program.named_parameters())["inner.weight"].detach().abs())
    with torch.no_grad():
        dict(program.named_parameters())["inner.weight"].mul_(mask)
    expected = program(x=x)
    program = program.replace(sparse={"inner.weight": Sparse(P24)})
    sites = put_masks(program.gm, program, way="through")
    with torch.no_grad():
        sites[0].weight.add_((~mask) * 5.0)
    assert torch.equal(program(x=x), expected)
    program(x=x).sum().backward()
    assert sites[0].weight.grad is not None and (sites[0].weight.grad[~mask] != 0).any()
    take_masks(program.gm, sites)
