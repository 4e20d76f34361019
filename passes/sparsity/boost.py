"""A dense low-rank branch beside a sparse weight: y = x (m W)^T + (x A^T) B^T, in the graph.

N outputs, K inputs of a weight, R groups of its inputs.  The branch of ``P.weight`` is the
parameters ``P.boost_in`` [R, K] and ``P.boost_out`` [N, R].
Source: Huang et al. 2025 (SLoRB), arXiv:2407.20584.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.graph import Program, Sparse
from secateur.graph.capture.calls import accept_calls_of, get_attribute
from secateur.graph.edit.rewrite import copy_graph
from secateur.passes.lowering.layers import Layer, linear_layers

IN = "boost_in"
OUT = "boost_out"
Branch = tuple[Tensor, Tensor]


def group_sums(columns: int, width: int, like: Tensor) -> Tensor:
    """[K / width, K]: row i sums inputs i width to (i + 1) width - 1.

    Args:
        columns: K, a multiple of width.
        width: inputs of a group.
        like: for dtype and device.
    """
    return torch.eye(columns // width, dtype=like.dtype, device=like.device).repeat_interleave(
        width, 1
    )


def branch_names(weight: str) -> tuple[str, str]:
    """The names of a weight's branch.

    Args:
        weight: ``P.weight``.

    Returns:
        (name of A, name of B).
    """
    path = weight.rpartition(".")[0]
    return f"{path}.{IN}", f"{path}.{OUT}"


def branch_parameters(program: Program) -> dict[str, tuple[str, str]]:
    """The branches that a Program has: names of A and B by the name of the weight beside which they
    stand.

    Args:
        program: the model.
    """
    branches: dict[str, tuple[str, str]] = {}
    for name, state in program.sparse.items():
        if state.branch is not None:
            branches[name] = state.branch
    return branches


def add_branches(program: Program, branches: Mapping[str, Branch]) -> Program:
    """The Program with branches beside some weights; it shares all Parameters with the given one.

    Args:
        program: with sparse weights.
        branches: (A [R, K], B [N, R]) by the name of a sparse weight.
    """
    gm = program.gm
    graph, copies = copy_graph(gm)
    layers = {}
    for layer in linear_layers(program)[0]:
        layers[layer.parameter] = layer
    read = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            read.add(str(node.target))
    tensors: dict[str, Any] = {}
    for target in read:
        tensors[target] = get_attribute(gm, target)
    tensors |= dict(gm.named_parameters(remove_duplicate=False)) | dict(
        gm.named_buffers(remove_duplicate=False)
    )
    for name, branch in branches.items():
        for where, value in zip(branch_names(name), branch, strict=True):
            tensors[where] = nn.Parameter(
                value.detach().clone(memory_format=torch.contiguous_format)
            )
        _add_branch(graph, copies, layers[name], branch)
    sparse = {}
    for name, state in program.sparse.items():
        if name in branches:
            sparse[name] = replace(state, branch=branch_names(name))
    return _make_program(program, tensors, graph, sparse)


def remove_branches(program: Program) -> Program:
    """The Program without its branches; it shares all other Parameters with the given one.

    Args:
        program: with or without branches.
    """
    gm = program.gm
    names = set[str]()
    for pair in branch_parameters(program).values():
        names.update(pair)
    graph, copies = copy_graph(gm)
    for layer in linear_layers(program)[0]:
        if layer.parameter in names and layer.parameter.endswith("." + OUT):
            (total,) = copies[layer.node].users
            total.replace_all_uses_with(total.args[0])  # type: ignore[arg-type]
            graph.erase_node(total)
    _remove_unread(graph)
    read = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            read.add(str(node.target))
    tensors: dict[str, Any] = {}
    for target in read:
        tensors[target] = get_attribute(gm, target)
    tensors |= dict(gm.named_parameters(remove_duplicate=False)) | dict(
        gm.named_buffers(remove_duplicate=False)
    )
    sparse = {}
    for name, state in program.sparse.items():
        sparse[name] = replace(state, branch=None)
    return _make_program(
        program,
        {name: tensor for name, tensor in tensors.items() if name not in names},
        graph,
        sparse,
    )


def _add_branch(
    graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], layer: Layer, branch: Branch
) -> None:
    """y becomes y + linear(linear(x, A), B)."""
    node = copies[layer.node]
    x = copies[layer.x]
    value = layer.node.meta["val"]
    example = layer.x.meta["val"]
    linear = torch.ops.aten.linear.default
    narrow = example.new_empty((*example.shape[:-1], len(branch[0])))
    with graph.inserting_after(node):
        total = graph.call_function(torch.ops.aten.add.Tensor, (node, node))
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    with graph.inserting_before(total):
        name_a, name_b = branch_names(layer.parameter)
        a = graph.get_attr(name_a)
        b = graph.get_attr(name_b)
        small = graph.call_function(linear, (x, a))
        wide = graph.call_function(linear, (small, b))
    total.args = (node, wide)
    parts = [(a, example.new_empty(branch[0].shape)), (b, example.new_empty(branch[1].shape))]
    for node_made, claimed in [*parts, (small, narrow), (wide, value), (total, value)]:
        node_made.meta = {**layer.node.meta, "val": claimed}


def _remove_unread(graph: fx.Graph) -> None:
    """Take out what nothing reads any more."""
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users and not node.is_impure():
            graph.erase_node(node)


def _make_program(
    program: Program, tensors: Mapping[str, Any], graph: fx.Graph, sparse: Mapping[str, Sparse]
) -> Program:
    """The Program over another graph, its tensors, and states of sparse weights."""
    gm = fx.GraphModule(dict(tensors), graph, class_name=program.gm._get_name())
    gm.meta = dict(program.gm.meta)
    accept_calls_of(gm, program.gm)
    gm.graph.lint()
    return program.replace(gm=gm, sparse=MappingProxyType({**program.sparse, **sparse}))
