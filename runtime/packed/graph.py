"""Carrying a plan out in the graph: matrix products become the packed op, and what they no longer
need goes.

For plain modules, which no stock class holds, and for whoever wants the graph itself.  Dims: N
outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from secateur.graph.capture.calls import accept_calls_of, get_attribute
from secateur.graph.edit.rewrite import copy_graph
from secateur.graph.program import Program
from secateur.kernels.sparse24 import PackedLinear
from secateur.passes.lowering.layers import Layer, linear_layers
from secateur.passes.lowering.lower import LayerPlan, Lowering
from secateur.runtime.packed.store import op_name, pack_weight
from secateur.runtime.packed.weights import PackedLayer, stack_layers

aten = torch.ops.aten


def lower_graph(program: Program, plan: Lowering) -> fx.GraphModule:
    """The graph of a program with packed products, callable like the program; the program stays as
    it is.

    Layers that read one value become one product and slices of it.  Weights that only packed
    products read are gone.

    Args:
        program: with weights.
        plan: which layers are packed, and how.

    Raises:
        ArtifactError: a weight is not in its planned form any more.
    """
    gm = program.gm
    graph, copies = copy_graph(gm)
    layers = {layer.parameter: layer for layer in linear_layers(program)[0]}
    parameters = dict(program.named_parameters())
    groups: dict[str, list[LayerPlan]] = {}
    for row in plan.packed_layers:
        groups.setdefault(row.shares or row.layer, []).append(row)
    buffers: dict[str, torch.Tensor] = {}
    for place, rows in enumerate(groups.values()):
        group = [layers[row.layer] for row in rows]
        packed = list[PackedLayer]()
        biases = list[torch.Tensor | None]()
        for row, layer in zip(rows, group, strict=True):
            weight = parameters[row.layer].detach()
            packed.append(pack_weight(row, weight, weight.dtype))
            bias = None
            if layer.bias is not None:
                bias = parameters[layer.bias].detach()
            biases.append(bias)
        module = stack_layers(packed, biases)[0]
        assert isinstance(module, PackedLinear)
        _replace_products(graph, copies, group, module, f"packed_{place}", buffers)
    read = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            read.add(str(node.target))
    tensors = {}
    for name in sorted(read):
        if name in buffers:
            tensors[name] = buffers[name]
        else:
            tensors[name] = get_attribute(gm, name)
    lowered = fx.GraphModule(tensors, graph, class_name=gm._get_name())
    lowered.meta = dict(gm.meta)
    accept_calls_of(lowered, gm)
    lowered.graph.lint()
    return lowered


def _replace_products(
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
    group: Sequence[Layer],
    module: PackedLinear,
    name: str,
    buffers: dict[str, torch.Tensor],
) -> None:
    """One op in place of the products of a group, and a slice of it for each."""
    first = copies[group[0].node]
    x = copies[group[0].x]
    with graph.inserting_before(first):
        operands = [
            _add_buffer(graph, f"{name}_{key}", t, buffers) for key, t in _module_operands(module)
        ]
        bias = None
        if module.bias is not None:
            bias = _add_buffer(graph, f"{name}_bias", module.bias.detach(), buffers)
        op = getattr(torch.ops.secateur, op_name(module)).default
        result = graph.call_function(op, (x, *operands, bias))
        value = first.meta["val"]
        result.meta["val"] = value.new_empty(*value.shape[:-1], sum(module.sizes))
        start = 0
        for layer in group:
            part = result
            stop = start + layer.shape[0]
            if len(group) > 1:
                part = graph.call_function(aten.slice.Tensor, (result, -1, start, stop))
            part.meta = dict(layer.node.meta)
            copies[layer.node].replace_all_uses_with(part)
            start = stop
    for layer in group:
        _erase_unread(graph, copies[layer.node])


def _module_operands(module: PackedLinear) -> list[tuple[str, torch.Tensor]]:
    named = (("values", module.values), ("mask", module.mask), ("scale", module.scale))
    return [(name, tensor) for name, tensor in named if tensor is not None]


def _add_buffer(
    graph: fx.Graph, name: str, tensor: torch.Tensor, buffers: dict[str, torch.Tensor]
) -> fx.Node:
    """A tensor of the new graph, and the node that reads it."""
    buffers[name] = nn.Buffer(tensor, persistent=True)
    node = graph.get_attr(name)
    node.meta["val"] = tensor
    return node


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a node that nothing reads, and then those that only it read, but for what the caller
    gives."""
    operands = node.all_input_nodes
    if node.users or node.op == "placeholder":
        return
    graph.erase_node(node)
    for operand in operands:
        _erase_unread(graph, operand)
