"""Sites of repair: the linear ops that consume pruned groups, and the target of each.

A site is one op ``y = x W^T (+ b)`` of the pruned graph.  Edits keep the names of nodes, so that
the same op of the dense graph is found by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from secateur.graph import Cut, Program, coupled_groups
from secateur.passes.calibration.observe import op_name, positional_arguments

Target = Literal["own", "stream"]
# Linear ops: argument of the activation, of the weight, of the bias; whether the weight stands [in,
# out].
LINEAR: Mapping[str, tuple[int, int, int | None, bool]] = {
    "aten.linear": (0, 1, 2, False),
    "aten.addmm": (1, 2, 0, True),
    "aten.mm": (0, 1, None, True),
    "aten.matmul": (0, 1, None, True),
}
TURNS = {"aten.t", "aten.numpy_T", "aten.mT", "aten.transpose", "aten.permute"}
MOVES = {"aten.to", "aten._to_copy", "aten.contiguous", "aten.clone", "aten.alias", "aten.detach"}
# Ops that hand a result on without changing a number of it (dropout is off).
CARRIES = MOVES | {
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.dropout",
    "aten.dropout_",
}
ADDS = {"aten.add", "aten.add_"}


@dataclass(frozen=True, eq=False)
class Site:
    """One consumer that can be refitted.

    parameter, bias: names in the source model.
    node: the op.
    turned: the parameter stands [in, out].
    chain: nodes from the weight's get_attr to the op, all to be run again when the weight changes.
    keep_in, keep_out: positions of the dense weight's columns and rows that stayed.
    target: name of the dense node whose value is wanted: the op itself, or an addition after it.
    others: pruned nodes that are added to the op's result on the way to ``target``.
    """

    parameter: str
    node: fx.Node
    x: fx.Node
    turned: bool
    chain: tuple[fx.Node, ...]
    keep_in: Tensor
    keep_out: Tensor
    target: str
    others: tuple[fx.Node, ...] = ()
    bias: str | None = None
    bias_chain: tuple[fx.Node, ...] = ()


def find_sites(program: Program, target: Target, bias: bool) -> tuple[list[Site], dict[str, str]]:
    """The consumers of the pruned groups in graph order, and by parameter why others cannot be
    refitted.

    Args:
        program: pruned, with its cut.
        target: own or stream, see ``Repair``.
        bias: whether biases may change.

    Returns:
        (sites, reasons by parameter).
    """
    assert program.cut is not None
    remaining = remaining_positions(program.cut)
    uses = weight_uses(program)
    order = {}
    for position, node in enumerate(program.gm.graph.nodes):
        order[node] = position
    sites = list[Site]()
    refused = dict[str, str]()
    parameters = {name for name, _ in program.named_parameters()}
    for name in consumed_parameters(program.cut):
        if name not in parameters:  # it was dropped with its block
            continue
        new_site = _make_site(program, name, uses, remaining, bias)
        if isinstance(new_site, Site):
            sites.append(new_site)
        else:
            refused[name] = new_site
    sites.sort(key=lambda site: order[site.node])
    known = {node.name for node in program.cut.dense.gm.graph.nodes}
    for site in [site for site in sites if site.target not in known]:
        sites.remove(site)
        refused[site.parameter] = "the dense graph has no such op"
    if target == "stream":
        aimed = _towards_stream(sites, order)
        sites = [new if new.target in known else old for old, new in zip(sites, aimed, strict=True)]
    return sites, refused


def consumed_parameters(cut: Cut) -> list[str]:
    """The parameters that sum over units of groups that lost some.

    Args:
        cut: the dense program and the kept units.

    Returns:
        names, each once.
    """
    names = dict[str, None]()
    for group in coupled_groups(cut.dense):
        if group.name in cut.kept:
            for member in group.members:
                if member.role == "consumes":
                    names[member.parameter] = None
    return list(names)


def remaining_positions(cut: Cut) -> dict[tuple[str, int], Tensor]:
    """By (parameter, dim): the dense positions that stayed, ascending; dims that were not cut are
    left out.

    Args:
        cut: the dense program and the kept units.

    Returns:
        positions along the dim, ascending.
    """
    shapes = {}
    for name, p in cut.dense.named_parameters():
        shapes[name] = p.shape
    masks: dict[tuple[str, int], Tensor] = {}
    for group in coupled_groups(cut.dense):
        if group.name not in cut.kept:
            continue
        for member in group.members:
            key = (member.parameter, member.dim)
            mask = masks.setdefault(
                key, torch.ones(shapes[member.parameter][member.dim], dtype=torch.bool)
            )
            mask[member.positions_of(~group.mask(cut.kept[group.name]))] = False
    return {key: mask.nonzero()[:, 0] for key, mask in masks.items()}


# From a weight to the op that uses it
@dataclass(frozen=True, eq=False)
class WeightUse:
    """One op that reads a parameter, through moves and transpositions.  turns: how many of the
    latter."""

    node: fx.Node
    chain: tuple[fx.Node, ...]
    turns: int


def weight_uses(program: Program) -> dict[str, list[WeightUse]]:
    """Every op that reads each parameter; a tied one goes by its first name.

    Args:
        program: the model.

    Returns:
        uses by parameter name.
    """
    names = {id(p): name for name, p in program.named_parameters()}
    by_target = dict(program.gm.named_parameters(remove_duplicate=False))
    uses: dict[str, list[WeightUse]] = {}
    for node in program.gm.graph.nodes:
        if node.op == "get_attr" and str(node.target) in by_target:
            uses.setdefault(names[id(by_target[str(node.target)])], []).extend(
                _follow_uses(node, (node,), 0)
            )
    return uses


def _follow_uses(node: fx.Node, chain: tuple[fx.Node, ...], turns: int) -> Iterator[WeightUse]:
    """The ops that read a weight below a node, through moves and transpositions."""
    for user in node.users:
        name = op_name(user)
        if name in TURNS | MOVES and user.args[0] is node and user.meta["val"].dim() == 2:
            yield from _follow_uses(
                user, (*chain, user), turns + (name in TURNS and not _moves_nothing(user))
            )
        else:
            yield WeightUse(user, chain, turns)


def _moves_nothing(node: fx.Node) -> bool:
    """A permutation or transposition that moves nothing."""
    dims: Any = node.args[1:]
    return op_name(node) == "aten.permute" and [d % 2 for d in dims[0]] == [0, 1]


def _make_site(
    program: Program,
    name: str,
    uses: Mapping[str, list[WeightUse]],
    kept: Mapping[tuple[str, int], Tensor],
    bias: bool,
) -> Site | str:
    """The site of a weight, or the reason why there is none."""
    weight = program.gm.get_parameter(name)
    if len(uses[name]) != 1:
        return f"{len(uses[name])} ops share it"
    if weight.dim() != 2 or not weight.is_floating_point():
        return (
            f"it is no matrix of numbers but {list(weight.shape)} "
            f"{str(weight.dtype).removeprefix('torch.')}"
        )
    (use,) = uses[name]
    op = op_name(use.node)
    if op not in LINEAR:
        return f"{op or use.node.target} is no linear op"
    x_arg, w_arg, b_arg, stands_in_out = LINEAR[op]
    operands = positional_arguments(use.node)
    if operands[w_arg] is not use.chain[-1] or not isinstance(operands[x_arg], fx.Node):
        return f"{op} does not read it as a weight matrix"
    if op == "aten.addmm" and set(operands[3:]) - {1, None}:
        return "addmm scales its operands"
    if open_rows(operands[x_arg]):
        return "its rows depend on the data (routing)"
    turned = stands_in_out != bool(use.turns % 2)
    if program.cut:
        shape = dict(program.cut.dense.named_parameters())[name].shape
    else:
        shape = weight.shape
    if turned:
        rows = 1
        columns = 0
    else:
        rows = 0
        columns = 1
    if bias:
        bias_name, bias_chain = _bias_parameter(
            operands[b_arg] if b_arg is not None else None, uses
        )
    else:
        bias_name = None
        bias_chain = ()
    return Site(
        parameter=name,
        node=use.node,
        x=operands[x_arg],
        turned=turned,
        chain=use.chain,
        keep_in=kept.get((name, columns), torch.arange(shape[columns])),
        keep_out=kept.get((name, rows), torch.arange(shape[rows])),
        target=use.node.name,
        bias=bias_name,
        bias_chain=bias_chain,
    )


def _bias_parameter(
    operand: object, uses: Mapping[str, list[WeightUse]]
) -> tuple[str | None, tuple[fx.Node, ...]]:
    """The parameter that is added as bias, unless others read it too."""
    for name, chains in uses.items():
        if len(chains) == 1 and isinstance(operand, fx.Node) and chains[0].chain[-1] is operand:
            dims = operand.meta["val"].dim()
            if dims == 1:
                return (name, chains[0].chain)
            return (None, ())
    return None, ()


def open_rows(x: fx.Node) -> bool:
    """Whether the number of rows is known only with the data, as in a mixture of experts.

    Args:
        x: an activation.
    """
    for size in x.meta["val"].shape:
        if isinstance(size, torch.SymInt):
            symbols = size.node.expr.free_symbols
            if any(str(symbol).startswith("u") for symbol in symbols):
                return True
    return False


# From the op to the residual stream
def _towards_stream(found: list[Site], order: Mapping[fx.Node, int]) -> list[Site]:
    """Sites whose result is added to what is known by then aim at the sum; the others stay with
    their own output.

    A sum that stands after the next site would need dense values that are gone by the time the next
    site is reached.
    """
    aimed = []
    for position, site in enumerate(found):
        if position + 1 < len(found):
            limit = order[found[position + 1].node]
        else:
            limit = len(order)
        end, others = _sum_after(site.node, order, limit)
        aimed.append(Site(**{**vars(site), "target": end.name, "others": others}))
    return aimed


def _sum_after(
    start: fx.Node, order: Mapping[fx.Node, int], limit: int
) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The last sum that an op's result goes into before ``limit``, and the other addends."""
    end = start
    others = tuple[fx.Node, ...]()
    node = start
    while len(node.users) == 1:
        (user,) = node.users
        if op_name(user) in CARRIES and user.args[0] is node:
            node = user
            continue
        other = _other_addend(user, node)
        if other is None or order[other] >= order[start] or order[user] >= limit:
            break
        end = user
        node = user
        others = (*others, other)
    return end, others


def _other_addend(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """What an unscaled addition of equal shapes adds to node."""
    if op_name(user) not in ADDS or user.kwargs.get("alpha", 1) != 1 or len(user.args) != 2:
        return None
    pair = []
    for arg in user.args:
        if isinstance(arg, fx.Node) and arg is not node:
            pair.append(arg)
    fits = len(pair) == 1 and isinstance(pair[0].meta.get("val"), Tensor)
    if fits and _shape_as_text(pair[0]) == _shape_as_text(node):
        return pair[0]
    return None


def _shape_as_text(node: fx.Node) -> list[str]:
    """Sizes as text: symbols are compared by name, without a guard."""
    return [str(size) for size in node.meta["val"].shape]
