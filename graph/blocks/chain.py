"""The graph cut into a chain of stages, each runnable alone: what goes through a model block by
block stands on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx

from secateur.graph.blocks.find import Block, blocks
from secateur.graph.capture.calls import get_attribute, is_mutable, trace_alias
from secateur.graph.errors import UnsupportedOp
from secateur.graph.program import Program

Values = Mapping[str, Any]
"""What is known at one place of the chain, by the names of graph nodes."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A run of nodes.

    name: of its block; "input", "output" or "between" for what stands around the blocks.
    nodes: in graph order; tensors that they read by ``get_attr`` come along.
    inputs: names of the values that it reads.
    outputs: of those that later stages or the caller read.
    block: None where the stage is no block.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    block: Block | None = None

    @cached_property
    def module(self) -> fx.GraphModule:
        """Takes the inputs by position, gives the outputs as a tuple; holds the Program's own
        Parameter objects."""
        return stage_module(self)[0]

    @cached_property
    def mutated_inputs(self) -> frozenset[str]:
        """Inputs that an op of the stage writes into."""
        written = (node.args[0] for node in self.nodes if is_mutable(node))
        bases = (trace_alias(node).name for node in written if isinstance(node, fx.Node))
        return frozenset(bases) & frozenset(self.inputs)


class Chain:
    """A Program as stages: ``chain(**inputs)`` computes what the Program computes, bit for bit.

    Memory: ``run`` hands on only what later stages read.  Weights may be changed between two runs
        of a stage.
    """

    def __init__(self, program: Program, stages: Sequence[Stage]) -> None:
        self.gm, self.source, self.stages = program.gm, program.source, tuple(stages)
        self.place = {stage: at for at, stage in enumerate(self.stages)}
        self._output = next(iter(reversed(self.gm.graph.nodes)))
        self._needed = [frozenset(node.name for node in self._output.all_input_nodes)]
        for stage in reversed(self.stages[1:]):
            self._needed.insert(0, self._needed[0] | set(stage.inputs))

    @property
    def blocks(self) -> tuple[Stage, ...]:
        """The stages that are residual blocks."""
        return tuple(stage for stage in self.stages if stage.block is not None)

    def initial_values(self, inputs: Mapping[str, Any]) -> Values:
        """Values before the first stage.  inputs: as for the Program; what is left out has the
        captured value."""
        given = {**self.source.example_inputs, **inputs}
        placeholders = []
        for n in self.gm.graph.nodes:
            if n.op == "placeholder":
                placeholders.append(str(n.target))
        return {name: given.get(name) for name in placeholders}

    def run_stage(
        self, stage: Stage, values: Values, module: fx.GraphModule | None = None
    ) -> Values:
        """Values after a stage, from those before it, which stay as they are.  module: to run in
        place of its own."""
        given = [values[name] for name in stage.inputs]
        copied = []
        for n, v in zip(stage.inputs, given, strict=True):
            copied.append(v.clone() if n in stage.mutated_inputs else v)
        return self._values_after(
            stage, values, zip(stage.outputs, (module or stage.module)(*copied), strict=True)
        )

    def skip_block(self, stage: Stage, values: Values) -> Values:
        """Values after a block that is left out.

        Raises:
            UnsupportedOp: the block must stay; says why.
        """
        if stage.block is None or stage.block.locked is not None:
            raise UnsupportedOp(
                f"{stage.name} cannot be left out: "
                f"{stage.block.locked if stage.block else 'no block'}"
            )
        return self._values_after(
            stage, values, [(stage.block.end.name, values[stage.block.start.name])]
        )

    def final_output(self, values: Values) -> Any:
        """What the Program returns, from the values after the last stage."""
        outputs = fx.map_arg(self._output.args[0], lambda node: values[node.name])
        return self.gm.graph.process_outputs(outputs)

    def __call__(self, **inputs: Any) -> Any:
        values = self.initial_values(inputs)
        for stage in self.stages:
            values = self.run_stage(stage, values)
        return self.final_output(values)

    def _values_after(
        self, stage: Stage, values: Values, made: Iterable[tuple[str, Any]]
    ) -> Values:
        known = {**values, **dict(made)}
        return {name: known[name] for name in self._needed[self.place[stage]] if name in known}


_cache: WeakKeyDictionary[Program, Chain] = WeakKeyDictionary()


def chain(program: Program) -> Chain:
    """A Program as a chain of its residual blocks and what stands before, between and after them.

    Raises:
        UnsupportedOp: no residual block is found.
    """
    if program not in _cache:
        _cache[program] = Chain(program, list(_assign_stages(program)))
    return _cache[program]


def _assign_stages(program: Program) -> Iterable[Stage]:
    """Nodes in order, each to its block; what stands inside a block without being its own goes
    before it."""
    nodes = [node for node in program.gm.graph.nodes if node.op not in ("get_attr", "output")]
    order = {node: at for at, node in enumerate(nodes)}
    found = blocks(program)
    homes = {node: block for block in found for node in block.nodes}
    plain = sorted((node for node in nodes if node not in homes), key=order.__getitem__)
    for block in found:
        here = [node for node in plain if order[node] < order[block.nodes[-1]]]
        if here:
            yield make_stage("between" if here[0] is not nodes[0] else "input", here, None)
        yield make_stage(block.name, block.nodes, block)
        plain = plain[len(here) :]
    if plain:
        yield make_stage("output", plain, None)


def make_stage(name: str, nodes: Sequence[fx.Node], block: Block | None = None) -> Stage:
    """A stage of nodes that follow each other in their graph, which may hold ``get_attr`` nodes in
    between."""
    inside = set(nodes)
    read = dict.fromkeys(
        n for node in nodes for n in node.all_input_nodes if n.op != "get_attr" and n not in inside
    )
    given = [node for node in nodes if node.op == "placeholder"]
    handed = [node for node in nodes if any(user not in inside for user in node.users)]
    return Stage(
        name=name,
        nodes=tuple(nodes),
        inputs=tuple(node.name for node in (*given, *read)),
        outputs=tuple(node.name for node in handed),
        block=block,
    )


def stage_module(stage: Stage) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A stage as a module of its own, and the copy of each node in it."""
    owner = stage.nodes[0].graph.owning_module
    assert owner is not None
    graph = fx.Graph()
    copies = dict[fx.Node, fx.Node]()
    tensors = dict[str, Any]()
    by_name = {n.name: n for node in stage.nodes for n in (node, *node.all_input_nodes)}
    for name in stage.inputs:
        copies[by_name[name]] = graph.placeholder(name)
        copies[by_name[name]].meta = dict(by_name[name].meta)
    for node in stage.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                copies[source] = graph.node_copy(source)
                tensors[str(source.target)] = get_attribute(owner, str(source.target))
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[by_name[name]] for name in stage.outputs))
    module = fx.GraphModule(tensors, graph, class_name="Stage")
    return module.eval(), copies
