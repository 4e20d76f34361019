"""The chain of blocks computes what the graph computes, stage by stage."""

from __future__ import annotations

import pytest
import torch
from zoo.checks import captured, logits, other_inputs
from zoo.models import NAMED, PLAIN

from secateur.graph import chain, drop
from secateur.graph.edit.drop import module_without
from secateur.graph.errors import UnsupportedOp


@pytest.mark.parametrize("kind", [*NAMED, *PLAIN])
@torch.no_grad()
def test_the_chain_is_the_graph_bit_for_bit(kind: str) -> None:
    _, program = captured(kind)
    cut, inputs = chain(program), other_inputs(program)
    names = [stage.name for stage in cut.stages]
    assert names[0] == "input" and names[-1] == "output" and len(cut.blocks) >= 2
    held = sum(len(stage.nodes) for stage in cut.stages)
    assert held == sum(node.op not in ("get_attr", "output") for node in program.gm.graph.nodes), (
        "every node once"
    )
    assert torch.equal(logits(cut(**inputs)), logits(program(**inputs)))


@torch.no_grad()
def test_a_stage_runs_alone_and_only_what_is_read_later_is_handed_on() -> None:
    _, program = captured("llama")
    cut = chain(program)
    values = cut.run_stage(cut.stages[0], cut.initial_values(other_inputs(program)))
    first, second = cut.blocks
    after = cut.run_stage(first, values)
    assert set(after) == set(second.inputs) | {
        name for name in after if name in cut.stages[-1].inputs
    }
    assert first.block is not None
    made = first.module(*(values[name] for name in first.inputs))
    assert torch.equal(made[0], after[first.block.end.name])
    parameters = dict(program.named_parameters())
    assert {name for name, _ in first.module.named_parameters()} == set(first.block.parameters)
    assert all(parameter is parameters[name] for name, parameter in first.module.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "bert", "opt", "t5"])
@torch.no_grad()
def test_a_block_that_is_skipped_is_a_block_that_is_dropped(kind: str) -> None:
    _, program = captured(kind)
    cut, inputs = chain(program), other_inputs(program)
    values = cut.initial_values(inputs)
    for stage in cut.stages:
        values = (
            cut.skip_block(stage, values)
            if stage is cut.blocks[1]
            else cut.run_stage(stage, values)
        )
    assert torch.equal(
        logits(cut.final_output(values)), logits(drop(program, [cut.blocks[1].name])(**inputs))
    )


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "bert", "falcon"])
@torch.no_grad()
def test_a_stage_without_a_sub_block_is_that_of_the_dropped_program(kind: str) -> None:
    _, program = captured(kind)
    cut, inputs = chain(program), other_inputs(program)
    stage = cut.blocks[0]
    assert stage.block is not None
    values = cut.run_stage(cut.stages[0], cut.initial_values(inputs))
    for sub in stage.block.sub_blocks:
        made = module_without(stage, [sub.name])(
            *(
                values[name].clone() if torch.is_tensor(values[name]) else values[name]
                for name in stage.inputs
            )
        )
        smaller = chain(drop(program, [sub.name]))
        after = smaller.run_stage(
            smaller.blocks[0], smaller.run_stage(smaller.stages[0], smaller.initial_values(inputs))
        )
        assert smaller.blocks[0].block is not None
        assert torch.equal(made[0], after[smaller.blocks[0].block.end.name])


def test_what_is_no_block_cannot_be_skipped() -> None:
    _, program = captured("llama")
    cut = chain(program)
    with pytest.raises(UnsupportedOp, match="cannot be left out"):
        cut.skip_block(cut.stages[0], cut.initial_values(other_inputs(program)))


def test_gradients_flow_through_the_chain() -> None:
    _, program = captured("llama")
    cut, inputs = chain(program), other_inputs(program)
    weight = program.gm.get_parameter("model.layers.0.mlp.down_proj.weight")
    (through,) = torch.autograd.grad(logits(cut(**inputs)).square().mean(), [weight])
    (whole,) = torch.autograd.grad(logits(program(**inputs)).square().mean(), [weight])
    assert torch.equal(through, whole)
