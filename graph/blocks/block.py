"""What a residual block is, and a sub-block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from secateur.graph.blocks.residual import Branch


@dataclass(frozen=True, eq=False)
class SubBlock:
    """A branch of a residual block: attention or MLP, for example.

    name: path of the module that holds its matrices; where it has none of its own, its modules in
        the layer, joined by "+".
    branch: where it is added.
    nodes: what it alone computes, the sum included.
    start, end: the stream before and after.
    alone: the step has no other branch; then a norm between the sum and the next step is part of
        the sub-block.
    parameters: names in the source model, of those that nothing else reads.
    locked: why it must stay, or None.
    """

    name: str
    branch: Branch
    nodes: frozenset[fx.Node]
    start: fx.Node
    end: fx.Node
    alone: bool
    parameters: tuple[str, ...]
    locked: str | None


@dataclass(frozen=True, eq=False)
class Block:
    """A residual layer.

    name: path of the module, ``model.layers.3``.
    sub_blocks: its branches in order.
    nodes: what it computes, in graph order; the tensors it owns are read by ``get_attr`` nodes
        beside these.
    inputs: values from before that it reads, the stream first.
    outputs: values that are read after it, the stream first.
    parameters: names in the source model, of those that nothing outside reads.
    locked: why it must stay, or None.
    """

    name: str
    sub_blocks: tuple[SubBlock, ...]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    locked: str | None

    @property
    def start(self) -> fx.Node:
        """The stream that enters."""
        return self.inputs[0]

    @property
    def end(self) -> fx.Node:
        """The stream that leaves."""
        return self.outputs[0]

    def __repr__(self) -> str:
        return f"Block({self.name}: {', '.join(sub.name for sub in self.sub_blocks)})"
