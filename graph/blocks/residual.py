"""Residual steps: where a graph adds branches to a stream, found by the sums alone.

A step is a sum one of whose addends all the others are computed from: ``x + f(x)``, ``x + f(x) +
g(x)``.  A sum inside a branch of another step (a gate written out, a shortcut inside an expert) is
part of that branch and no step.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from secateur.graph.capture.calls import op_name

Order = Mapping[fx.Node, int]
MOVES = {
    "aten.to",
    "aten._to_copy",
    "aten.contiguous",
    "aten.clone",
    "aten.alias",
    "aten.detach",
    "aten.detach_",
}
CARRIES = MOVES | {"aten.dropout", "aten.dropout_"}
"""Ops that hand a value on as it is: dropout does nothing in a model that is captured in eval
mode."""
VIEWS = CARRIES | {"aten.view", "aten.reshape", "aten._unsafe_view"}
ADDS = {"aten.add", "aten.add_"}


class Addend(NamedTuple):
    """``operand`` stands as argument ``place`` of the sum ``add``."""

    operand: fx.Node
    add: fx.Node
    place: int


@dataclass(frozen=True, eq=False)
class Branch:
    """What a step adds: ``operand`` stands as argument ``place`` of ``add``.

    nodes: what is computed for it from the stream and from values known before, in no order.
    """

    operand: fx.Node
    add: fx.Node
    place: int
    nodes: frozenset[fx.Node]


@dataclass(frozen=True, eq=False)
class ResidualStep:
    """``end = start + sum of branches``.

    start: the value of the stream before, without the moves that hand it on.
    identity: the addend that it is.
    foreign: addends that are not computed from the stream.
    """

    start: fx.Node
    identity: fx.Node
    end: fx.Node
    branches: tuple[Branch, ...]
    foreign: tuple[fx.Node, ...]


def residual_steps(graph: fx.Graph) -> list[ResidualStep]:
    """The steps of a graph in its order; those inside a branch of another step are left out."""
    order = {node: at for at, node in enumerate(graph.nodes)}
    found: list[ResidualStep] = []
    inner: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if is_sum(node) and node not in inner:
            inner |= {addend.add for addend in _iterate_addends(node)} - {node}
            step = _make_step(node, order)
            found += [step] if step is not None else []
    found.reverse()
    within = set[fx.Node]().union(*(branch.nodes for step in found for branch in step.branches))
    return [step for step in found if step.end not in within]


def is_sum(node: Any) -> bool:
    """Whether a node adds two tensors as they are."""
    return bool(
        isinstance(node, fx.Node)
        and op_name(node) in ADDS
        and len(node.args) == 2
        and node.kwargs.get("alpha", 1) == 1
        and all(isinstance(arg, fx.Node) and is_tensor(arg) for arg in node.args)
    )


def is_tensor(node: fx.Node) -> bool:
    """Whether the value of a node is a tensor, or several."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and any(map(_is_tensor, value))
    )


def trace_to_origin(node: fx.Node, within: Iterable[fx.Node] | None = None) -> fx.Node:
    """The value that a node hands on as it is, back to where it was computed.

    within: if given, only moves among these nodes are gone through."""
    while op_name(node) in CARRIES and (within is None or node in within):
        source: Any = node.args[0]
        if not same_shape_and_dtype(node, source):
            break
        node = source
    return node


def iterate_reshapes(node: fx.Node) -> Iterator[fx.Node]:
    """A value and those that it is the same numbers of, in another shape."""
    yield node
    while op_name(node) in VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node


def same_shape_and_dtype(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have one shape and dtype; sizes are compared by name, without a guard."""
    return _describe_value(a) is not None and _describe_value(a) == _describe_value(b)


def tensor_ancestors(node: fx.Node, since: int, order: Order) -> frozenset[fx.Node]:
    """The tensors that a value is computed from, itself included, as far as they stand after
    position ``since``."""
    seen = {node}
    queue = [node]
    while queue:
        for source in queue.pop().all_input_nodes:
            if (
                source not in seen
                and order[source] > since
                and source.op == "call_function"
                and is_tensor(source)
            ):
                seen.add(source)
                queue.append(source)
    return frozenset(seen)


def any_reads(nodes: Iterable[fx.Node], value: fx.Node) -> bool:
    """Whether one of the nodes reads the value."""
    return any(value in node.all_input_nodes for node in nodes)


def _iterate_addends(node: fx.Node, closed: Container[fx.Node] = ()) -> Iterator[Addend]:
    """The addends of a tree of sums; a sum that is read twice is an addend, and so is one that is
    ``closed``."""
    for place, addend in enumerate(node.args):
        assert isinstance(addend, fx.Node)
        inner = _origin_of_moved(addend)
        if (
            is_sum(inner)
            and len(inner.users) == 1
            and same_shape_and_dtype(inner, node)
            and inner not in closed
        ):
            yield from _iterate_addends(inner, closed)
        else:
            yield Addend(addend, node, place)


def _find_nested_sums(addends: list[Addend], start: fx.Node, order: Order) -> set[fx.Node]:
    """The inner sums that are computed as ``y + f(y)`` from something else than the stream: part of
    one branch."""
    found = set[fx.Node]()
    for one, other in itertools.permutations(addends, 2):
        value = trace_to_origin(one.operand)
        if value is not start and value in tensor_ancestors(other.operand, order[start], order):
            found |= {one.add, other.add}
    return found


def sum_of(node: fx.Node) -> Addend:
    """Where a value that one sum reads, moved or not, stands in it."""
    while True:
        (user,) = node.users
        if is_sum(user):
            return Addend(node, user, user.args.index(node))
        node = user


def _origin_of_moved(node: fx.Node) -> fx.Node:
    """The value that a node hands on to its one reader alone."""
    while op_name(node) in CARRIES and len(node.users) == 1 and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _make_step(end: fx.Node, order: Order) -> ResidualStep | None:
    """The addend computed first is the stream, if another is computed from it."""
    addends = list(_iterate_addends(end))
    identity = min(
        (a.operand for a in addends), key=lambda operand: order[trace_to_origin(operand)]
    )
    start = trace_to_origin(identity)
    if not same_shape_and_dtype(start, end) or start.op == "get_attr":
        return None
    open_ = {addend.add for addend in addends if addend.operand is identity}
    addends = list(_iterate_addends(end, _find_nested_sums(addends, start, order) - open_))
    addends.remove(next(addend for addend in addends if addend.operand is identity))
    branches = list[Branch]()
    foreign = list[fx.Node]()
    for addend in addends:
        nodes = tensor_ancestors(addend.operand, order[start], order)
        if trace_to_origin(addend.operand) is not start and any_reads(nodes, start):
            branches.append(Branch(addend.operand, addend.add, addend.place, nodes))
        else:
            foreign.append(addend.operand)
    if branches:
        return ResidualStep(start, identity, end, tuple(branches), tuple(foreign))
    return None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _describe_value(node: fx.Node) -> str | None:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{[str(size) for size in value.shape]} {value.dtype}"
    return None
