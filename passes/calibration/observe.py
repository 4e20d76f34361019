"""The activations that a group's consumers read, and their observation on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from secateur.graph import CoupledGroup, Program, analyse
from secateur.graph.axes.analysis import OUTPUT
from secateur.passes.base import Context

aten = torch.ops.aten

# Ops that multiply an activation by a weight: argument of the activation, argument of the weight,
# dim of the weight that is summed over, dim of the activation that it meets.
CONSUMERS: dict[str, tuple[int, int, int, int]] = {
    "aten.linear": (0, 1, -1, -1),
    "aten.mm": (0, 1, -2, -1),
    "aten.bmm": (0, 1, -2, -1),
    "aten.matmul": (0, 1, -2, -1),
    "aten.addmm": (1, 2, -2, -1),
    "aten.baddbmm": (1, 2, -2, -1),
    "aten._grouped_mm": (0, 1, -2, -1),
    "transformers.grouped_mm_fallback": (0, 1, -2, -1),
    "aten.convolution": (0, 1, 1, 1),
    "aten.conv1d": (0, 1, 1, 1),
    "aten.conv2d": (0, 1, 1, 1),
    "aten.conv3d": (0, 1, 1, 1),
}


# Ops through which a weight may go before it is used: dims of the result, as dims of the operand
# (None: not one dim).
Dims = list[int | None]
CARRIERS: dict[str, Callable[[fx.Node, Dims], Dims]] = {
    "aten.to": lambda node, dims: dims,
    "aten._to_copy": lambda node, dims: dims,
    "aten.contiguous": lambda node, dims: dims,
    "aten.clone": lambda node, dims: dims,
    "aten.alias": lambda node, dims: dims,
    "aten.detach": lambda node, dims: dims,
    "aten.t": lambda node, dims: dims[::-1],
    "aten.numpy_T": lambda node, dims: dims[::-1],
    "aten.mT": lambda node, dims: _swap_dims(dims, -1, -2),
    "aten.transpose": lambda node, dims: _swap_dims(dims, *_as_integers(node.args[1:3])),
    "aten.permute": lambda node, dims: [dims[d] for d in _as_integers(node.args[1])],
    "aten.select": lambda node, dims: _remove_dim(dims, _as_integers(node.args[1:2])[0]),
    "aten.unsqueeze": lambda node, dims: _insert_dim(dims, _as_integers(node.args[1:2])[0]),
    "aten.index": lambda node, dims: (
        [None, *dims[1:]] if len(_as_list(node.args[1])) == 1 else [None] * len(dims)
    ),
    "aten.index_select": lambda node, dims: [
        None if d == node.args[1] else v for d, v in enumerate(dims)
    ],
}


# Ops that hand their first operand's numbers on, or some rows of them, with the channels in the
# last dim.
SAME_DIMS = {
    "aten.to",
    "aten._to_copy",
    "aten.contiguous",
    "aten.clone",
    "aten.alias",
    "aten.detach",
    "aten.dropout",
}
SAME_ROWS = {
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.squeeze",
    "aten.unsqueeze",
}
SOME_ROWS = {"aten.index", "aten.index_select", "aten.repeat_interleave"}
READS = ("consumes", "looks_up")  # a table of embeddings may be the head as well


@dataclass(frozen=True, eq=False)
class Reader:
    """One activation that a group's consumers read.

    node: what produces the activation.  dim: its dim that holds the units.  positions: [units, k]
        along that dim.
    """

    node: fx.Node
    dim: int
    positions: Tensor


def readers(program: Program, group: CoupledGroup, head: bool = True) -> list[Reader]:
    """The distinct activations that the consumers of a group read; empty where no weight consumes
    it.

    What several consumers take from one value, whole or some rows of it (a router, experts), is
    that value, once.

    Args:
        program: the model.
        group: whose consumers are wanted.
        head: whether what the head reads counts where other weights read the group, too.
    """
    readers_by_key: dict[tuple[fx.Node, int, bytes], Reader] = {}
    only_head = dict[tuple[fx.Node, int, bytes], bool]()
    for member in group.members:
        if member.role not in READS:
            continue
        for node, dim in consumers(program.gm, member.parameter, member.dim):
            node, dim = source_of(node, dim)
            key = (node, dim, member.positions.contiguous().numpy().tobytes())
            readers_by_key.setdefault(key, Reader(node, dim, member.positions))
            only_head[key] = only_head.get(key, True) and is_head(program, member.parameter)
    if not head and not all(only_head.values()):
        return [reader for key, reader in readers_by_key.items() if not only_head[key]]
    return list(readers_by_key.values())


def is_head(program: Program, parameter: str) -> bool:
    """Whether a weight makes what the model returns, or the scores of a vocabulary.

    Args:
        program: the model.
        parameter: name of a weight.
    """
    for axis in analyse(program).tensors[parameter][0]:
        for leaf in axis.leaves():
            if "vocabulary" in leaf.marks or OUTPUT in leaf.locks:
                return True
    return False


def source_of(node: fx.Node, dim: int) -> tuple[fx.Node, int]:
    """The value that a node holds in another form, or of which it holds some rows, and its dim of
    channels.

    Args:
        node: an activation.
        dim: its dim of channels.

    Returns:
        (source node, its dim of channels).
    """
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        before = node.args[0]
        name = op_name(node)
        rank = node.meta["val"].dim()
        last = dim % rank == rank - 1
        if name in SAME_ROWS | SOME_ROWS:
            widths = []
            for value_node in (before, node):
                if value_node.meta["val"].dim():
                    widths.append(value_node.meta["val"].shape[-1])
            same_width = len(widths) == 2 and isinstance(widths[0], int) and widths[0] == widths[1]
            if not (last and same_width and _leaves_channels(node, before)):
                break
            dim = -1
        elif name not in SAME_DIMS:
            break
        node = before
    return node, dim


def _leaves_channels(node: fx.Node, before: fx.Node) -> bool:
    """Whether an op that picks or repeats entries picks whole rows: its dim is not the last."""
    if op_name(node) not in SOME_ROWS:
        return True
    rank: int = before.meta["val"].dim()
    if op_name(node) == "aten.index":
        return rank > 1 and len(_as_list(node.args[1])) < rank
    dim = positional_arguments(node)[1 if op_name(node) == "aten.index_select" else 2]
    return isinstance(dim, int) and dim % rank != rank - 1


def consumers(gm: fx.GraphModule, parameter: str, dim: int) -> list[tuple[fx.Node, int]]:
    """(activation node, its dim) wherever the graph sums over this dim of this parameter.

    Args:
        gm: the graph.
        parameter: name.
        dim: of the parameter.
    """
    wanted = gm.get_parameter(parameter)
    consuming = []
    for node in gm.graph.nodes:
        if node.op == "get_attr" and _get_attribute(gm, node.target) is wanted:
            consuming += _follow_weight(node, list(range(wanted.dim())), dim)
    return consuming


def _follow_weight(node: fx.Node, dims: Dims, dim: int) -> list[tuple[fx.Node, int]]:
    """Uses of a weight downstream of node; dims says which dim of the parameter each dim of node
    is."""
    consuming = []
    for user in node.users:
        name = op_name(user)
        if name in CONSUMERS:
            x_arg, w_arg, w_dim, x_dim = CONSUMERS[name]
            operands = positional_arguments(user)
            if operands[w_arg] is node and len(dims) >= abs(w_dim) and dims[w_dim] == dim:
                consuming.append((operands[x_arg], x_dim))
        elif name in CARRIERS and user.args[0] is node:
            consuming += _follow_weight(user, CARRIERS[name](user, dims), dim)
    return consuming


def observe(
    program: Program,
    context: Context,
    wanted: Collection[Reader],
    see: Callable[[Reader, Tensor, int], None],
) -> None:
    """Run every calibration sequence and show each wanted activation to ``see(reader, value,
    batch)``.

    Values are freed as soon as their last user ran, so that memory stays that of a plain forward
    pass.

    Args:
        program: the model.
        context: with calibration data.
        wanted: activations.
        see: called with reader, value and batch size.
    """
    by_node: dict[fx.Node, list[Reader]] = {}
    for reader in wanted:
        by_node.setdefault(reader.node, []).append(reader)
    data = context.data or ()
    with torch.no_grad():
        for sample in context.progress(data, "activations", len(data)):
            _Observer(program, by_node, see).run_inputs(sample.inputs)


class _Observer(fx.Interpreter):
    """Interprets the graph and shows values of chosen nodes."""

    def __init__(
        self,
        program: Program,
        wanted: Mapping[fx.Node, Sequence[Reader]],
        see: Callable[[Reader, Tensor, int], None],
    ) -> None:
        super().__init__(program.gm, garbage_collect_values=True)
        self.program = program
        self.wanted = wanted
        self.see = see
        self.batch = 1

    def run_inputs(self, inputs: Mapping[str, Any]) -> None:
        """One forward pass; inputs that are not given have the value they were captured with."""
        feed = {**self.program.source.example_inputs, **inputs}
        tensors = []
        for v in inputs.values():
            if isinstance(v, Tensor) and v.dim() > 0:
                tensors.append(v)
        if tensors:
            self.batch = tensors[0].shape[0]
        else:
            self.batch = 1
        placeholders = []
        for node in self.program.gm.graph.nodes:
            if node.op == "placeholder":
                placeholders.append(node)
        self.run(*(feed.get(node.target) for node in placeholders), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and show its value to ``see`` for every reader."""
        value = super().run_node(n)
        for reader in self.wanted.get(n, ()):
            self.see(reader, value, self.batch)
        return value


def op_name(node: fx.Node) -> str:
    """``aten.linear`` for any overload of that op, or the empty string.

    Args:
        node: of any kind.
    """
    packet = getattr(node.target, "overloadpacket", None)
    if packet is not None and node.op == "call_function":
        return str(packet)
    return ""


def positional_arguments(node: fx.Node) -> list[Any]:
    """Positional arguments of an op, with those given by keyword put in their places.

    Args:
        node: call of an op with a schema.
    """
    schema = node.target._schema  # type: ignore[union-attr]
    names = [a.name for a in schema.arguments]
    arguments: list[Any] = []
    for i, name in enumerate(names):
        arguments.append(node.args[i] if i < len(node.args) else node.kwargs.get(name))
    return arguments


def _get_attribute(gm: fx.GraphModule, target: object) -> object:
    """The attribute of the module that a get_attr names, or None."""
    owner, _, name = str(target).rpartition(".")
    return getattr(gm.get_submodule(owner), name, None)


def _swap_dims(dims: Dims, a: int, b: int) -> Dims:
    """The dims with two of them exchanged."""
    dims = list(dims)
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def _remove_dim(dims: Dims, dim: int) -> Dims:
    """The dims without one of them."""
    remaining = []
    for d, v in enumerate(dims):
        if d != dim % len(dims):
            remaining.append(v)
    return remaining


def _insert_dim(dims: Dims, dim: int) -> Dims:
    """The dims with a new one at a place."""
    place = dim % (len(dims) + 1)
    return [*dims[:place], None, *dims[place:]]


def _as_list(values: object) -> list[Any]:
    """A list of one or several values."""
    if isinstance(values, tuple | list):
        return list(values)
    return [values]


def _as_integers(values: object) -> list[int]:
    """A list of one or several integers."""
    return [int(v) for v in _as_list(values)]
