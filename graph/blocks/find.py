"""Residual blocks and their sub-blocks, found in the graph.

A block is the run of residual steps that belong to one layer, from the value of the stream that
enters it to the one that leaves it.  The steps are found by their sums (``residual``); which of
them belong together, and what they are called, is read off the names of the parameters and modules
in them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

from torch import fx

from secateur.graph.axes.analysis import layer_path, module_path
from secateur.graph.blocks.block import Block, SubBlock
from secateur.graph.blocks.residual import (
    Branch,
    Order,
    ResidualStep,
    is_tensor,
    iterate_reshapes,
    residual_steps,
    same_shape_and_dtype,
    trace_to_origin,
)
from secateur.graph.capture.calls import get_attribute, is_mutable, trace_alias
from secateur.graph.errors import UnsupportedOp
from secateur.graph.program import Program

__all__ = ["Block", "SubBlock", "blocks"]
_cache: WeakKeyDictionary[Program, tuple[Block, ...]] = WeakKeyDictionary()


def blocks(program: Program) -> tuple[Block, ...]:
    """The residual blocks of a Program in order; of every stack where it has several.

    Raises:
        UnsupportedOp: the graph adds nothing to a stream.
    """
    if program not in _cache:
        _cache[program] = tuple(_Finder(program).find_blocks())
    if not _cache[program]:
        raise UnsupportedOp(
            "no residual block is found: nowhere does the graph add to a value what was computed "
            "from it (a stream "
            "that is scaled before the sum is none)"
        )
    return _cache[program]


@dataclass(eq=False)
class _Layer:
    """Steps that belong together.

    path: "" where nothing names the layer.
    ends: the stream after each step.
    used: the parameters that the branches read.
    broken: the layer has other steps, which the stream does not join to these.
    """

    path: str
    steps: list[ResidualStep]
    ends: list[fx.Node]
    used: set[str]
    broken: bool


class _Finder:
    """Finds the blocks of one Program."""

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, program.gm.graph
        self.nodes = [node for node in self.graph.nodes if node.op != "get_attr"]
        self.order: Order = {node: at for at, node in enumerate(self.graph.nodes)}
        self.steps = residual_steps(self.graph)

    @cached_property
    def parameter_names(self) -> dict[str, str]:
        """By the target of a get_attr node, the first name of that parameter."""
        first = {id(p): name for name, p in self.program.named_parameters()}
        targets = set()
        for node in self.graph.nodes:
            if node.op == "get_attr":
                targets.add(str(node.target))
        held = {target: first.get(id(get_attribute(self.program.gm, target))) for target in targets}
        return {target: name for target, name in held.items() if name is not None}

    @cached_property
    def parameter_readers(self) -> dict[str, set[fx.Node]]:
        """By parameter, the nodes that read it."""
        found: dict[str, set[fx.Node]] = defaultdict(set)
        for node in self.graph.nodes:
            if node.op == "get_attr" and str(node.target) in self.parameter_names:
                found[self.parameter_names[str(node.target)]] |= set(node.users)
        return found

    def read_by(self, nodes: Iterable[fx.Node]) -> list[str]:
        """The parameters that these nodes read, in order."""
        sources = (
            source
            for node in sorted(nodes, key=self.order.__getitem__)
            for source in node.all_input_nodes
        )
        found = (
            self.parameter_names.get(str(source.target))
            for source in sources
            if source.op == "get_attr"
        )
        return list(dict.fromkeys(name for name in found if name is not None))

    def exclusive_parameters(self, nodes: set[fx.Node]) -> tuple[str, ...]:
        """The parameters that these nodes read and no other does."""
        return tuple(name for name in self.read_by(nodes) if self.parameter_readers[name] <= nodes)

    # Layers
    def find_blocks(self) -> Iterator[Block]:
        """The blocks of the stream, in order."""
        layers = self._group_steps()
        names = _make_unique([layer.path or f"residual.{at}" for at, layer in enumerate(layers)])
        before: fx.Node | None = None
        for layer, name in zip(layers, names, strict=True):
            yield self._make_block(layer, name, before)
            before = layer.ends[-1]

    def _group_steps(self) -> list[_Layer]:
        layers: list[_Layer] = []
        for at, step in enumerate(self.steps):
            used = set(
                self.read_by(set[fx.Node]().union(*(branch.nodes for branch in step.branches)))
            )
            path = self._layer_path(step, used)
            last = None
            if layers:
                last = layers[-1]
            if not (
                last
                and path
                and path == last.path
                and last.ends[-1] is step.start
                and not used & last.used
            ):
                broken = bool(path) and any(
                    path == other.path and not used & other.used for other in layers
                )
                last = _Layer(path, [], [], set(), broken)
                layers.append(last)
            last.steps.append(step)
            last.ends.append(
                self._end_of_layer(
                    step, last, self.steps[at + 1].start if at + 1 < len(self.steps) else None
                )
            )
            last.used |= used
        return layers

    def _layer_path(self, step: ResidualStep, used: set[str]) -> str:
        """The layer that a step belongs to: the one of all its parameters, else that of the module
        that sums."""
        paths = {layer_path(name) for name in used}
        if len(paths) == 1:
            return next(iter(paths))
        return layer_path(module_path(step.end))

    def _end_of_layer(self, step: ResidualStep, layer: _Layer, bound: fx.Node | None) -> fx.Node:
        """The last value to which the layer alone carries the stream on after a sum: past a norm,
        for example.

        bound: the stream that the next step starts from."""
        end = best = step.end
        seen = {end}
        likes = [end, layer.steps[0].start]
        if bound is not None and self.order[bound] >= self.order[end]:
            stop = self.order[bound]
        else:
            stop = len(self.order)
        for node in self.nodes:
            if not self.order[end] < self.order[node] <= stop or not layer.path:
                continue
            if layer_path(module_path(node)) != layer.path:
                break
            seen.add(node)
            fits = node is bound or any(same_shape_and_dtype(node, like) for like in likes)
            if fits and all(user in seen for other in seen - {node} for user in other.users):
                best = node
        return best

    # One block
    def _make_block(self, layer: _Layer, name: str, before: fx.Node | None) -> Block:
        first = layer.steps[0]
        own = {first.end}.union(*(branch.nodes for step in layer.steps for branch in step.branches))
        moves = [
            node for node in own if not layer.path or layer_path(module_path(node)) == layer.path
        ]
        if before is first.start:
            start = first.start
        else:
            start = trace_to_origin(first.identity, moves)
        end = layer.ends[-1]
        if start is before:
            begin = self.order[start] + 1
        else:
            begin = min(self.order[u] for u in start.users if u in own)
        nodes = [node for node in self.nodes if begin <= self.order[node] <= self.order[end]]
        nodes = self._without_shared([*self._prologue_nodes(nodes, layer.path), *nodes], start)
        inside = set(nodes)
        inputs = {
            source for node in nodes for source in node.all_input_nodes if source.op != "get_attr"
        } - inside
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        return Block(
            name=name,
            sub_blocks=tuple(self._sub_blocks(layer, name, inside)),
            nodes=tuple(nodes),
            inputs=(start, *sorted(inputs - {start}, key=self.order.__getitem__)),
            outputs=(end, *(node for node in outputs if node is not end)),
            parameters=self.exclusive_parameters(inside),
            locked=self._block_locked(layer, start, end, outputs),
        )

    def _prologue_nodes(self, nodes: list[fx.Node], path: str) -> list[fx.Node]:
        """What the layer makes for itself before it reads the stream: of its parameters, for
        example."""
        inside = set(nodes)
        for node in reversed(self.nodes[: self.nodes.index(nodes[0])]):
            if (
                path
                and layer_path(module_path(node)) == path
                and node.users
                and inside >= set(node.users)
            ):
                inside.add(node)
        return [
            node
            for node in self.nodes
            if node in inside and self.order[node] < self.order[nodes[0]]
        ]

    def _without_shared(self, nodes: list[fx.Node], start: fx.Node) -> list[fx.Node]:
        """What the layer computes for all layers, not from its stream (sizes, a table of
        positions), is not its own."""
        inside = set(nodes)
        own = self.descendants_of(start, nodes)
        shared = set()
        for n in nodes:
            if n not in own and any(user not in inside for user in n.users):
                shared.add(n)
        for node in reversed(nodes):
            if shared & set(node.users) and node not in own:
                shared.add(node)
        written = {
            trace_alias(node.args[0])
            for node in own
            if is_mutable(node) and isinstance(node.args[0], fx.Node)
        }
        if written & shared:
            return nodes
        return [node for node in nodes if node not in shared]

    def _block_locked(
        self, layer: _Layer, start: fx.Node, end: fx.Node, outputs: Sequence[fx.Node]
    ) -> str | None:
        late = [node.name for node in outputs if node is not end and is_tensor(node)]
        foreign = [node.name for step in layer.steps for node in step.foreign]
        reasons = {
            f"later parts of the model read {', '.join(late[:3])} of it": late,
            f"it adds {', '.join(foreign[:3])}, not computed from the stream": foreign,
            "the stream that leaves it has another shape": not same_shape_and_dtype(start, end),
            "another part of its layer stands apart": layer.broken,
        }
        return "; ".join(reason for reason, holds in reasons.items() if holds) or None

    # Its branches
    def _sub_blocks(self, layer: _Layer, name: str, inside: set[fx.Node]) -> Iterator[SubBlock]:
        pairs = [
            (step, end, branch)
            for step, end in zip(layer.steps, layer.ends, strict=True)
            for branch in step.branches
        ]
        names = _make_unique([self._branch_name(branch, name) for _, _, branch in pairs])
        for (step, tail, branch), own in zip(pairs, names, strict=True):
            others = set[fx.Node]().union(*(b.nodes for b in step.branches if b is not branch))
            nodes = (branch.nodes & inside) - others | {branch.add}
            start, end = self._stream_around(step, tail)
            alone = len(step.branches) == 1 and not step.foreign
            if alone:
                nodes |= {
                    n
                    for n in self.nodes
                    if self.order[step.end] <= self.order[n] <= self.order[end]
                }
            yield SubBlock(
                name=own,
                branch=branch,
                nodes=nodes,
                start=start,
                end=end,
                alone=alone,
                parameters=self.exclusive_parameters(set(nodes)),
                locked=self._branch_locked(step, branch, others),
            )

    def _stream_around(self, step: ResidualStep, tail: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The stream before a step and after its tail, where both have one shape."""
        ends = []
        for node in iterate_reshapes(tail):
            if self.order[node] >= self.order[step.end]:
                ends.append(node)
        pairs = ((start, end) for end in ends for start in iterate_reshapes(step.identity))
        return next(
            (pair for pair in pairs if same_shape_and_dtype(*pair)), (step.identity, step.end)
        )

    def _branch_name(self, branch: Branch, layer: str) -> str:
        """The module that holds the branch's matrices, or all its tensors where it has none."""
        held = dict(self.program.named_parameters())
        names = self.read_by(branch.nodes)
        matrices = [name for name in names if held[name].dim() > 1] or names
        paths = [name.split(".")[:-1] for name in matrices] or [
            module_path(branch.operand).split(".")
        ]
        shared = [
            parts[0]
            for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*paths, strict=False))
        ]
        path = ".".join(shared)
        if path and path != layer:
            return path
        children = dict.fromkeys(parts[len(shared)] for parts in paths if len(parts) > len(shared))
        return f"{layer}.{'+'.join(children) or 'branch'}"

    def _branch_locked(
        self, step: ResidualStep, branch: Branch, others: set[fx.Node]
    ) -> str | None:
        """Values of the branch that come from the stream must not be read after the sum."""
        streamed = []
        for n in self.descendants_of(step.start, branch.nodes):
            if trace_to_origin(n) is not step.start:
                streamed.append(n)
        allowed = branch.nodes | others | {branch.add, step.end}
        late = []
        for node in streamed:
            if any(self._is_after(user, step, allowed) for user in node.users):
                late.append(node.name)
        if late:
            return f"later parts of the model read {', '.join(late[:3])} of it"
        return None

    def _is_after(self, user: fx.Node, step: ResidualStep, allowed: frozenset[fx.Node]) -> bool:
        return is_tensor(user) and user not in allowed and self.order[user] > self.order[step.end]

    def descendants_of(self, start: fx.Node, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Those of the nodes that are computed from a value."""
        found = {start}
        for node in sorted(nodes, key=self.order.__getitem__):
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found - {start}


def _make_unique(names: list[str]) -> list[str]:
    """Names with a number after those that appeared before."""
    taken: dict[str, int] = defaultdict(int)
    found = []
    for name in names:
        taken[name] += 1
        found.append(name if taken[name] == 1 else f"{name}#{taken[name]}")
    return found
