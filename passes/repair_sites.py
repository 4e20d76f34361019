"""Where repair works: the linear ops that consume pruned groups, and what each should give.

A site is one op ``y = x W^T (+ b)`` of the pruned graph.  Edits keep the names of nodes, so that the same op of the
dense graph is found by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from secateur.graph import Cut, Program, coupled_groups
from secateur.passes.importance.observe import arguments, op_name

Target = Literal["own", "stream"]
# Linear ops: argument of the activation, of the weight, of the bias; whether the weight stands [in, out].
LINEAR: Mapping[str, tuple[int, int, int | None, bool]] = {
    "aten.linear": (0, 1, 2, False),
    "aten.addmm": (1, 2, 0, True),
    "aten.mm": (0, 1, None, True),
    "aten.matmul": (0, 1, None, True),
}
TURNS = {"aten.t", "aten.numpy_T", "aten.mT", "aten.transpose", "aten.permute"}
MOVES = {"aten.to", "aten._to_copy", "aten.contiguous", "aten.clone", "aten.alias", "aten.detach"}
# Ops that hand a result on without changing a number of it (dropout is off).
CARRIES = MOVES | {"aten.view", "aten.reshape", "aten._unsafe_view", "aten.dropout", "aten.dropout_"}
ADDS = {"aten.add", "aten.add_"}


@dataclass(frozen=True, eq=False)
class Site:
    """One consumer that can be refitted.

    parameter, bias: names in the source model.   node: the op.   turned: the parameter stands [in, out].
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


def sites(program: Program, target: Target, bias: bool) -> tuple[list[Site], dict[str, str]]:
    """The consumers of the pruned groups in graph order, and by parameter why others cannot be refitted.

    Args: target: own or stream, see ``Repair``.   bias: whether biases may change.
    """
    assert program.cut is not None
    kept = kept_positions(program.cut)
    uses, order = weight_uses(program), {node: at for at, node in enumerate(program.gm.graph.nodes)}
    found, refused = list[Site](), dict[str, str]()
    left = {name for name, _ in program.named_parameters()}
    for name in (name for name in consumed(program.cut) if name in left):  # the others went with their blocks
        made = _site(program, name, uses, kept, bias)
        if isinstance(made, Site):
            found.append(made)
        else:
            refused[name] = made
    found.sort(key=lambda site: order[site.node])
    known = {node.name for node in program.cut.dense.gm.graph.nodes}
    for site in [site for site in found if site.target not in known]:
        found.remove(site)
        refused[site.parameter] = "the dense graph has no such op"
    if target == "stream":
        aimed = _towards_stream(found, order)
        found = [new if new.target in known else old for old, new in zip(found, aimed, strict=True)]
    return found, refused


def consumed(cut: Cut) -> list[str]:
    """The parameters that sum over units of groups that lost some."""
    groups = [group for group in coupled_groups(cut.dense) if group.name in cut.kept]
    return list(dict.fromkeys(m.parameter for group in groups for m in group.members if m.role == "consumes"))


def kept_positions(cut: Cut) -> dict[tuple[str, int], Tensor]:
    """By (parameter, dim): the dense positions that stayed, ascending; dims that were not cut are left out."""
    shapes = {name: p.shape for name, p in cut.dense.named_parameters()}
    masks: dict[tuple[str, int], Tensor] = {}
    for group in (group for group in coupled_groups(cut.dense) if group.name in cut.kept):
        for member in group.members:
            key = (member.parameter, member.dim)
            mask = masks.setdefault(key, torch.ones(shapes[member.parameter][member.dim], dtype=torch.bool))
            mask[member.positions_of(~group.mask(cut.kept[group.name]))] = False
    return {key: mask.nonzero()[:, 0] for key, mask in masks.items()}


# ---------------------------------------------------------------------- from a weight to the op that uses it
@dataclass(frozen=True, eq=False)
class Use:
    """One op that reads a parameter, through moves and transpositions.  turns: how many of the latter."""

    node: fx.Node
    chain: tuple[fx.Node, ...]
    turns: int


def weight_uses(program: Program) -> dict[str, list[Use]]:
    """Every op that reads each parameter; a tied one goes by its first name."""
    names = {id(p): name for name, p in program.named_parameters()}
    by_target = dict(program.gm.named_parameters(remove_duplicate=False))
    found: dict[str, list[Use]] = {}
    for node in program.gm.graph.nodes:
        if node.op == "get_attr" and str(node.target) in by_target:
            found.setdefault(names[id(by_target[str(node.target)])], []).extend(_uses(node, (node,), 0))
    return found


def _uses(node: fx.Node, chain: tuple[fx.Node, ...], turns: int) -> Iterator[Use]:
    for user in node.users:
        name = op_name(user)
        if name in TURNS | MOVES and user.args[0] is node and user.meta["val"].dim() == 2:
            yield from _uses(user, (*chain, user), turns + (name in TURNS and not _straight(user)))
        else:
            yield Use(user, chain, turns)


def _straight(node: fx.Node) -> bool:
    """A permutation or transposition that moves nothing."""
    dims: Any = node.args[1:]
    return op_name(node) == "aten.permute" and [d % 2 for d in dims[0]] == [0, 1]


def _site(
    program: Program, name: str, uses: Mapping[str, list[Use]], kept: Mapping[tuple[str, int], Tensor], bias: bool
) -> Site | str:
    """The site of a weight, or the reason why there is none."""
    weight = program.gm.get_parameter(name)
    if len(uses[name]) != 1:
        return f"{len(uses[name])} ops share it"
    if weight.dim() != 2 or not weight.is_floating_point():
        return f"it is no matrix of numbers but {list(weight.shape)} {str(weight.dtype).removeprefix('torch.')}"
    (use,) = uses[name]
    op = op_name(use.node)
    if op not in LINEAR:
        return f"{op or use.node.target} is no linear op"
    x_arg, w_arg, b_arg, stands_in_out = LINEAR[op]
    operands = arguments(use.node)
    if operands[w_arg] is not use.chain[-1] or not isinstance(operands[x_arg], fx.Node):
        return f"{op} does not read it as a weight matrix"
    if op == "aten.addmm" and set(operands[3:]) - {1, None}:
        return "addmm scales its operands"
    if open_rows(operands[x_arg]):
        return "its rows depend on the data (routing)"
    turned = stands_in_out != bool(use.turns % 2)
    shape = dict(program.cut.dense.named_parameters())[name].shape if program.cut else weight.shape
    rows, columns = (1, 0) if turned else (0, 1)
    bias_name, bias_chain = _bias(operands[b_arg] if b_arg is not None else None, uses) if bias else (None, ())
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


def _bias(operand: Any, uses: Mapping[str, list[Use]]) -> tuple[str | None, tuple[fx.Node, ...]]:
    """The parameter that is added as bias, unless others read it too."""
    for name, found in uses.items():
        if len(found) == 1 and isinstance(operand, fx.Node) and found[0].chain[-1] is operand:
            dims = operand.meta["val"].dim()
            return (name, found[0].chain) if dims == 1 else (None, ())
    return None, ()


def open_rows(x: fx.Node) -> bool:
    """Whether the number of rows is known only with the data, as in a mixture of experts."""
    sizes = [s.node.expr for s in x.meta["val"].shape if isinstance(s, torch.SymInt)]
    return any(str(symbol).startswith("u") for size in sizes for symbol in size.free_symbols)


# ---------------------------------------------------------------------- from the op to the residual stream
def _towards_stream(found: list[Site], order: Mapping[fx.Node, int]) -> list[Site]:
    """Sites whose result is added to what is known by then aim at the sum; the others stay with their own output.

    A sum that stands after the next site would need dense values that are gone by the time the next site is reached.
    """
    aimed = []
    for at, site in enumerate(found):
        limit = order[found[at + 1].node] if at + 1 < len(found) else len(order)
        end, others = _sum_after(site.node, order, limit)
        aimed.append(Site(**{**vars(site), "target": end.name, "others": others}))
    return aimed


def _sum_after(start: fx.Node, order: Mapping[fx.Node, int], limit: int) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    end, others, node = start, tuple[fx.Node, ...](), start
    while len(node.users) == 1:
        (user,) = node.users
        if op_name(user) in CARRIES and user.args[0] is node:
            node = user
            continue
        other = _other(user, node)
        if other is None or order[other] >= order[start] or order[user] >= limit:
            break
        end, node, others = user, user, (*others, other)
    return end, others


def _other(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """What an unscaled addition of equal shapes adds to node."""
    if op_name(user) not in ADDS or user.kwargs.get("alpha", 1) != 1 or len(user.args) != 2:
        return None
    pair = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not node]
    fits = len(pair) == 1 and isinstance(pair[0].meta.get("val"), Tensor)
    return pair[0] if fits and _shape(pair[0]) == _shape(node) else None


def _shape(node: fx.Node) -> list[str]:
    """Sizes as text: symbols are compared by name, without a guard."""
    return [str(size) for size in node.meta["val"].shape]
