"""Each check of the verifier against a Program that breaks it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo.checks import captured
from zoo.models import tiny_model

import secateur.graph as graph
from secateur.graph import Program
from secateur.graph.errors import VerificationError
from secateur.graph.oracle.verifier import CHECKS


def _program(kind: str = "llama") -> Program:
    return graph.capture(tiny_model(kind))


def test_sound_programs_pass() -> None:
    for kind in ("llama", "gpt2", "t5", "conv_net"):
        graph.verify(captured(kind)[1])


def _broken(program: Program, check: str) -> None:
    with pytest.raises(VerificationError, match=check):
        graph.verify(program)


def test_a_parameter_of_the_wrong_shape() -> None:
    program = _program()
    mlp = program.gm.get_submodule("model.layers.0.mlp.down_proj")
    mlp.weight = nn.Parameter(torch.randn(64, 95))
    _broken(program, "shapes propagate: linear")


def test_a_shape_that_the_graph_only_claims() -> None:
    program = _program()
    node = next(n for n in program.gm.graph.nodes if n.target is torch.ops.aten.silu.default)
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(2, 11, 95)
    _broken(
        program, r"shapes propagate: silu .* gives \[2, 11, 96\], the graph claims \[2, 11, 95\]"
    )


def test_a_parameter_that_nothing_reads() -> None:
    program = _program()
    program.gm.register_parameter("stray", nn.Parameter(torch.ones(2)))
    _broken(program, "parameter stray is not used by the graph")


def test_a_parameter_that_is_missing() -> None:
    program = _program()
    del program.gm.get_submodule("model.layers.1.mlp.up_proj").weight
    _broken(program, "model.layers.1.mlp.up_proj.weight")


def test_a_broken_tie() -> None:
    program = _program("gpt2")
    node = next(
        n
        for n in program.gm.graph.nodes
        if n.op == "call_function" and "embedding" in str(n.target)
    )
    head = nn.Module()
    head.weight = nn.Parameter(program.gm.get_parameter("transformer.wte.weight").detach().clone())
    program.gm.add_module("lm_head", head)
    with program.gm.graph.inserting_before(node):
        own = program.gm.graph.get_attr("lm_head.weight")
    own.meta = dict(node.args[0].meta)
    node.update_arg(0, own)
    program.gm.recompile()
    _broken(program, "lm_head.weight is tied to transformer.wte.weight")


def test_heads_that_do_not_divide() -> None:
    program = _program("llama")
    node = next(n for n in program.gm.graph.nodes if "scaled_dot_product" in str(n.target))
    with node.args[1].meta["val"].fake_mode:
        node.args[1].meta["val"] = torch.empty(2, 3, 11, 16)
    _broken(program, "heads divide: .* 4 query heads of 16 on 3 key/value heads of 16")


def test_a_graph_that_is_not_well_formed() -> None:
    program = _program()
    nodes = list(program.gm.graph.nodes)
    nodes[-1].append(nodes[-2])  # a value after its use
    _broken(program, "the graph is well formed")


def test_an_unknown_op_is_a_fault_of_the_groups() -> None:
    class Solver(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.pinv(x)

    _broken(graph.capture(Solver(), torch.randn(3, 3)), "groups are legal: no axis rule")


def test_the_checks_are_these() -> None:
    assert list(CHECKS) == [
        "the graph is well formed",
        "parameters are used",
        "ties hold",
        "sparse weights are sparse",
        "heads divide",
        "shapes propagate",
        "groups are legal",
    ]
