"""Linear layers of a graph, why other matrices are none, and which layers share their input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from secateur.graph import Program
from secateur.passes.calibration.observe import op_name, positional_arguments
from secateur.passes.repair.sites import CARRIES, LINEAR, WeightUse, weight_uses

# Ops between the last matrix product and what a model returns, when that product is a head.
TAILS = CARRIES | {
    "aten.slice",
    "aten.mul",
    "aten.div",
    "aten.tanh",
    "aten.split",
    "aten.squeeze",
    "aten.to",
}
LOOK_UPS = {"aten.embedding"}


@dataclass(frozen=True, eq=False)
class Layer:
    """One op ``y = x W^T (+ b)`` whose weight is a parameter.  N outputs, K inputs.

    parameter, bias: names in the source model.
    node: the op.
    x: its input.
    chain: nodes from get_attr to the op.
    shape: (N, K).
    head: the product is what the model returns.
    looked_up: the weight is a table of embeddings, too.
    """

    parameter: str
    bias: str | None
    node: fx.Node
    x: fx.Node
    chain: tuple[fx.Node, ...]
    shape: tuple[int, int]
    head: bool
    looked_up: bool


def linear_layers(program: Program) -> tuple[list[Layer], dict[str, str]]:
    """The linear layers in graph order, and by parameter why other matrices are none.

    Vectors are left out: nothing is lost where a norm or a bias stays as it is.

    Args:
        program: the model.

    Returns:
        (layers, reasons by parameter).
    """
    uses = weight_uses(program)
    order = {}
    for position, node in enumerate(program.gm.graph.nodes):
        order[node] = position
    layers = list[Layer]()
    refused = dict[str, str]()
    for name, parameter in program.named_parameters():
        new_layer = _make_layer(name, parameter, uses)
        if isinstance(new_layer, Layer):
            layers.append(new_layer)
        elif new_layer:
            refused[name] = new_layer
    return sorted(layers, key=lambda layer: order[layer.node]), refused


def _make_layer(
    name: str, parameter: nn.Parameter, uses: Mapping[str, list[WeightUse]]
) -> Layer | str:
    """The layer of a weight, or the reason why there is none; "" where there is nothing to tell."""
    if parameter.dim() < 2:
        return ""
    looks = [use for use in uses.get(name, ()) if op_name(use.node) in LOOK_UPS]
    others = [use for use in uses.get(name, ()) if use not in looks]
    if len(others) != 1:
        if looks and not others:
            return "it is only looked up in"
        return f"{len(others)} ops share it"
    (use,) = others
    op = op_name(use.node)
    if op not in LINEAR or parameter.dim() != 2 or not parameter.is_floating_point():
        return (
            f"{op or use.node.target} reads it as {list(parameter.shape)}: no linear op "
            "with one matrix"
        )
    x_arg, w_arg, b_arg, stands_in_out = LINEAR[op]
    operands = positional_arguments(use.node)
    if operands[w_arg] is not use.chain[-1] or not isinstance(operands[x_arg], fx.Node):
        return f"{op} does not read it as a weight matrix"
    if stands_in_out != bool(use.turns % 2):
        return "it stands [inputs, outputs]; packed forms want [outputs, inputs]"
    if op == "aten.addmm" and set(operands[3:]) - {1, None}:
        return "addmm scales its operands"
    rows, columns = parameter.shape
    return Layer(
        parameter=name,
        bias=_bias_parameter(operands[b_arg] if b_arg is not None else None, uses),
        node=use.node,
        x=operands[x_arg],
        chain=use.chain,
        shape=(rows, columns),
        head=_is_returned(use.node),
        looked_up=bool(looks),
    )


def _bias_parameter(operand: object, uses: Mapping[str, list[WeightUse]]) -> str | None:
    """The parameter that is added as bias."""
    for name, chains in uses.items():
        if any(use.chain[-1] is operand for use in chains):
            return name
    return None


def _is_returned(node: fx.Node) -> bool:
    """Whether a value goes to the output through nothing that mixes it with weights again."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.op == "output":
            return True
        if op_name(user) not in TAILS:
            return False
        node = user
    return any(user.op == "output" for user in node.users)


def sharing_input(layers: Iterable[Layer]) -> list[list[Layer]]:
    """The layers, those that read one and the same value together: they can be one product of
    stacked rows.

    A value that is changed in place on the way is not the same value, so its readers stay alone.

    Args:
        layers: in graph order.

    Returns:
        groups in graph order.
    """
    groups: dict[Layer | fx.Node, list[Layer]] = {}
    for layer in layers:
        changed = any(op_name(user).endswith("_") for user in layer.x.users)
        groups.setdefault(layer if changed else layer.x, []).append(layer)
    return list(groups.values())


def not_24(weight: Tensor) -> str | None:
    """Why a weight [N, K] is not 2:4 along K, or None where every group of four has two zeros at
    least.

    Args:
        weight: [N, K].
    """
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4))
    over = (padded.reshape(len(weight), -1, 4) != 0).sum(-1) > 2
    count = int(over.sum())
    if not count:
        return None
    row, group = (int(i) for i in over.nonzero()[0])
    which = f"the first in row {row}, inputs {4 * group} to {4 * group + 3}"
    return f"{count:,} of {over.numel():,} groups of four have more than two non-zeros, {which}"


def names_of(layers: Iterable[Layer]) -> set[str]:
    """The weights of some layers.

    Args:
        layers: of a program.
    """
    return {layer.parameter for layer in layers}


def parameter_values(program: Program) -> dict[str, Tensor]:
    """Every parameter's values by name, without gradient.

    Args:
        program: the model.
    """
    values: dict[str, Tensor] = {}
    for name, parameter in program.named_parameters():
        values[name] = parameter.detach()
    return values


def on_meta(program: Program) -> bool:
    """Whether the program has shapes but no numbers.

    Args:
        program: the model.
    """
    return any(p.device == torch.device("meta") for _, p in program.named_parameters())
