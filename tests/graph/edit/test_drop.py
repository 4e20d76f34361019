"""A dropped block is a block whose contribution is absent; what is left is a sound Program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from zoo.checks import captured, logits, other_inputs, random_edit
from zoo.models import NAMED, PLAIN, tiny_model

from secateur.graph import Program, SubBlock, blocks, capture, coupled_groups, drop, keep, verify
from secateur.graph.errors import EditError
from secateur.graph.oracle.masked import _order_inputs


def passing(model: nn.Module, path: str, inputs: dict[str, Any]) -> Tensor:
    """What the eager model computes when a module hands its first input on."""

    def hand_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream, *out[1:]) if isinstance(out, tuple) else stream

    handle = model.get_submodule(path).register_forward_hook(hand_on, with_kwargs=True)
    try:
        return logits(model(**inputs))
    finally:
        handle.remove()


class _Silent(fx.Interpreter):
    """The full graph with a branch that adds zeros."""

    def __init__(self, gm: fx.GraphModule, branch: fx.Node) -> None:
        super().__init__(gm)
        self.branch = branch

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return torch.zeros_like(value) if n is self.branch else value


def silenced(program: Program, sub: SubBlock, inputs: dict[str, Any]) -> Tensor:
    (bind,) = program.gm._forward_pre_hooks.values()
    hook: Callable[..., Any] = bind
    _, bound = hook(program.gm, (), inputs)
    return logits(_Silent(program.gm, sub.branch.operand).run(*_order_inputs(program.gm, bound)))


@pytest.mark.parametrize("kind", [*NAMED, *PLAIN])
@torch.no_grad()
def test_the_full_model_with_a_block_absent_is_the_dropped_one(kind: str) -> None:
    model, program = captured(kind)
    inputs = other_inputs(program)
    named = (
        inputs
        if kind not in PLAIN
        else {next(iter(program.source.example_inputs)): next(iter(inputs.values()))}
    )
    for block in (blocks(program)[0], blocks(program)[-1]):
        smaller = drop(program, [block.name])
        verify(smaller)
        found = logits(smaller(**inputs))
        assert torch.equal(found, passing(model, block.name, named)), block.name
        assert not torch.equal(found, logits(program(**inputs)))
        gone = {n for n, _ in program.named_parameters()} - {
            n for n, _ in smaller.named_parameters()
        }
        assert gone == set(block.parameters)


@pytest.mark.parametrize(
    "kind", [kind for kind in (*NAMED, *PLAIN) if kind not in ("bert", "conv_net")]
)
@torch.no_grad()
def test_the_full_model_with_a_branch_absent_is_the_dropped_one(kind: str) -> None:
    _, program = captured(kind)
    inputs = other_inputs(program)
    for sub in blocks(program)[-1].sub_blocks:
        smaller = drop(program, [sub.name])
        assert torch.equal(logits(smaller(**inputs)), silenced(program, sub, inputs)), sub.name
        gone = {n for n, _ in program.named_parameters()} - {
            n for n, _ in smaller.named_parameters()
        }
        assert gone == set(sub.parameters)


@torch.no_grad()
def test_a_norm_after_the_sum_goes_with_its_branch() -> None:
    model, program = captured("bert")
    inputs = other_inputs(program)
    name = "bert.encoder.layer.0.attention"
    smaller = drop(program, [name])
    verify(smaller)
    assert torch.equal(logits(smaller(**inputs)), passing(model, name, inputs))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "falcon"])
@torch.no_grad()
def test_all_branches_are_the_block(kind: str) -> None:
    _, program = captured(kind)
    block, inputs = blocks(program)[0], other_inputs(program)
    by_parts = drop(program, [sub.name for sub in block.sub_blocks])
    assert torch.equal(logits(by_parts(**inputs)), logits(drop(program, [block.name])(**inputs)))
    assert [b.name for b in blocks(by_parts)] == [blocks(program)[1].name]


@pytest.fixture(scope="module")
def four() -> Program:
    return capture(tiny_model("llama", num_hidden_layers=4))


@torch.no_grad()
def test_dropping_and_narrowing_commute_and_the_record_says_both(four: Program) -> None:
    inputs = other_inputs(four)
    edit = {
        g.name: units
        for g, units in random_edit([g for g in coupled_groups(four) if not g.locked]).items()
    }
    names = ["model.layers.1", "model.layers.3.mlp"]
    smaller = drop(four, names)
    left = {
        name: units
        for name, units in edit.items()
        if name in {g.name for g in coupled_groups(smaller)}
    }
    one, other = keep(smaller, left), drop(keep(four, edit), names)
    assert torch.equal(logits(one(**inputs)), logits(other(**inputs)))
    assert one.cut is not None and other.cut is not None
    assert one.cut.dropped == other.cut.dropped == tuple(names)
    assert {n: u.tolist() for n, u in one.cut.kept.items()} == {
        n: u.tolist() for n, u in other.cut.kept.items()
    }
    assert one.cut.dense is other.cut.dense is four
    again = drop(keep(four, one.cut.kept), one.cut.dropped)
    assert torch.equal(logits(again(**inputs)), logits(one(**inputs))), (
        "the record alone rebuilds the Program"
    )


def test_names_outlive_a_drop(four: Program) -> None:
    smaller = drop(drop(four, ["model.layers.0"]), ["model.layers.2", "model.layers.3"])
    known = {node.name for node in four.gm.graph.nodes}
    assert {node.name for node in smaller.gm.graph.nodes} < known
    assert {group.name for group in coupled_groups(smaller)} < {
        group.name for group in coupled_groups(four)
    }
    assert smaller.cut is not None and smaller.cut.dropped == (
        "model.layers.0",
        "model.layers.2",
        "model.layers.3",
    )
    assert [block.name for block in blocks(smaller)] == ["model.layers.1"]


def test_what_cannot_be_dropped_is_said(four: Program) -> None:
    with pytest.raises(EditError, match=r"no block 'model.layers.7'.*model.layers.0.self_attn"):
        drop(four, ["model.layers.7"])
    with pytest.raises(EditError, match="one must stay"):
        drop(four, [f"model.layers.{i}" for i in range(4)])
    assert drop(four, []).gm is four.gm


def test_a_drop_needs_no_weights() -> None:
    with torch.device("meta"):
        program = capture(tiny_model("llama"))
    smaller = drop(program, ["model.layers.0"])
    verify(smaller)
    assert smaller.num_parameters < program.num_parameters
