"""What a Program weighs: parameters, bytes, FLOPs a token and key/value cache, counted on its graph
by shapes alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from secateur.graph import Program
from secateur.graph.program import JSON
from secateur.passes.calibration.data import static_size
from secateur.passes.calibration.observe import op_name

BATCH = 1
SEQUENCE = 1024


Arguments = tuple[Any, ...]


def _product_flops(out: Tensor, operand: Tensor) -> int:
    return 2 * out.numel() * int(operand.shape[-1])


def _rows_times_depth(out: Tensor, args: Arguments) -> int:
    return _product_flops(out, args[0])


def _added_product_flops(out: Tensor, args: Arguments) -> int:
    return _product_flops(out, args[1])


def _attention_flops(out: Tensor, args: Arguments) -> int:
    query, key, value = args[:3]
    pairs: int = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * pairs * (int(query.shape[-1]) + int(value.shape[-1]))


def _convolution_flops(out: Tensor, args: Arguments) -> int:
    depth: int = math.prod(args[1].shape[1:])
    return 2 * out.numel() * depth


# FLOPs (multiply-adds times two) of an op, from its result and its arguments.  Attention counts all
# pairs of positions.
FLOPS: Mapping[str, Callable[[Tensor, Arguments], int]] = {
    "aten.linear": _rows_times_depth,
    "aten.mm": _rows_times_depth,
    "aten.bmm": _rows_times_depth,
    "aten.matmul": _rows_times_depth,
    "aten._grouped_mm": _rows_times_depth,
    "transformers.grouped_mm_fallback": _rows_times_depth,
    "aten.addmm": _added_product_flops,
    "aten.baddbmm": _added_product_flops,
    "aten.scaled_dot_product_attention": _attention_flops,
    "aten.convolution": _convolution_flops,
    "aten.conv1d": _convolution_flops,
    "aten.conv2d": _convolution_flops,
    "aten.conv3d": _convolution_flops,
}
# Multiply, but are not counted: their share is told apart instead of guessed.
UNCOUNTED = {
    "aten.einsum",
    "aten.conv_transpose1d",
    "aten.conv_transpose2d",
    "aten.bilinear",
    "aten.dot",
    "aten.mv",
}
# Ops between what a cache would hold and what attention reads.
MOVES = {
    "aten.expand",
    "aten.reshape",
    "aten.view",
    "aten._unsafe_view",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.transpose",
    "aten.permute",
    "aten.slice",
    "aten.clone",
    "aten.contiguous",
    "aten.alias",
    "aten.to",
    "aten.repeat_interleave",
    "aten.detach",
}
# Ops whose result mostly shares its operand's memory.
VIEWS = (MOVES - {"aten.clone", "aten.repeat_interleave"}) | {
    "aten.select",
    "aten.split",
    "aten.chunk",
    "aten.unbind",
}
SKIPPED = {
    "aten._assert_tensor_metadata",
    "aten._assert_scalar",
    "aten.sym_constrain_range_for_size",
}


@dataclass(frozen=True)
class Footprint:
    """Sizes of a Program.

    parameters: elements of unique parameters.  bytes: theirs, in their dtypes.
    flops_per_token: multiply-adds times two of matrix products, attention and convolutions, a
        token, at the stated batch and sequence; a sample where the input is no text.
    kv_bytes_per_token: keys and values that generation keeps for each token, full attention
        assumed; None where the model does not generate, has an encoder (two lengths decide), or its
        attention is not seen.
    activation_bytes_per_token: all results of the forward pass that own their memory: what a
        backward pass keeps.
    largest_bytes_per_token: the largest single one (the logits, mostly).
    live_bytes_per_token: the results that are still to be read, where those are most before the
        last product: what it takes to hold all tokens at one place of the graph.
    uncounted: ops that multiply but are not counted, with how often they stand in the graph.
    """

    parameters: int
    bytes: int
    flops_per_token: float
    kv_bytes_per_token: int | None
    batch: int
    sequence: int
    activation_bytes_per_token: float
    largest_bytes_per_token: float
    live_bytes_per_token: float
    uncounted: Mapping[str, int]

    def to_json(self) -> JSON:
        """As JSON values."""
        return asdict(self)


def measure_footprint(
    program: Program, *, batch: int = BATCH, sequence: int = SEQUENCE
) -> Footprint:
    """Count a Program, on real weights or on the meta device.

    Args:
        program: to be counted.
        batch: sequences of the input where the graph leaves their number open.
        sequence: tokens of one where the graph leaves them open; never beyond the model's own
            maximum.
    """
    counter = _Counter(program)
    sequence = min(
        sequence, getattr(program.source.config, "max_position_embeddings", None) or sequence
    )
    tokens, shape = counter.run_on(batch, sequence)
    decoder = not getattr(program.source.config, "is_encoder_decoder", False)
    generates = decoder and bool(getattr(program.source.model, "can_generate", lambda: False)())
    cache_bytes = None
    if generates and counter.cache_bytes:
        cache_bytes = round(counter.cache_bytes / tokens)
    return Footprint(
        parameters=program.num_parameters,
        bytes=program.num_bytes,
        flops_per_token=counter.flops / tokens,
        kv_bytes_per_token=cache_bytes,
        batch=shape[0],
        sequence=shape[1],
        activation_bytes_per_token=counter.activation_bytes / tokens,
        largest_bytes_per_token=counter.largest_bytes / tokens,
        live_bytes_per_token=counter.live_bytes() / tokens,
        uncounted=dict(counter.uncounted),
    )


def _input_device(graph: fx.Graph) -> torch.device:
    """The device of the first input that is a tensor; the CPU where there is none."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")


class _Counter(fx.Interpreter):
    """Runs the graph on fake tensors (shapes alone) and adds up what its products cost."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.gm, garbage_collect_values=True)
        self.program = program
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.flops = 0
        self.cache_bytes = 0
        self.uncounted = Counter[str]()
        self.activation_bytes = 0
        self.largest_bytes = 0
        self.sizes: dict[fx.Node, tuple[int, int]] = {}
        self.device = _input_device(program.gm.graph)
        self._fakes: dict[int, Tensor] = {}

    def run_on(self, batch: int, sequence: int) -> tuple[int, tuple[int, int]]:
        """Run the graph on an input of these sizes where it leaves them open.

        Args:
            batch: sequences.
            sequence: tokens of one.

        Returns:
            The number of tokens, and (batch, sequence) as they were.
        """
        values = list[object]()
        with self.mode, torch.no_grad():
            for node in self.program.gm.graph.nodes:
                if node.op == "placeholder":
                    values.append(self._fake_input(node, batch, sequence))
            shapes = [tuple(v.shape) for v in values if isinstance(v, Tensor) and v.dim()]
            self.run(*values, enable_io_processing=False)
        shape = _batch_and_sequence(shapes)
        return math.prod(shape), shape

    def _fake_input(self, node: fx.Node, batch: int, sequence: int) -> object:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return self.program.source.example_inputs.get(str(node.target))
        wanted = (batch, sequence)
        shape = list[int]()
        for dim, size in enumerate(value.shape):
            known = static_size(size)
            if known is not None:
                shape.append(known)
            elif dim < 2:
                shape.append(wanted[dim])
            else:
                shape.append(int(size))
        return torch.zeros(shape, dtype=value.dtype, device=value.device)

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._fakes:
            self._fakes[id(value)] = torch.empty(value.shape, dtype=value.dtype, device=self.device)
        return self._fakes[id(value)]

    def run_node(self, n: fx.Node) -> Any:
        name = op_name(n)
        if name in SKIPPED:
            return None
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.sizes[n] = (value.numel(), value.element_size())
            if n.op == "call_function" and name not in VIEWS:
                size = value.numel() * value.element_size()
                self.activation_bytes += size
                self.largest_bytes = max(self.largest_bytes, size)
        if name in FLOPS:
            self.flops += int(FLOPS[name](value, self.fetch_args_kwargs_from_env(n)[0]))
        elif name in UNCOUNTED:
            self.uncounted[name] += 1
        if name == "aten.scaled_dot_product_attention":
            for cached in n.args[1:3]:
                self.cache_bytes += math.prod(self._smallest_ancestor(cached))
        return value

    def live_bytes(self) -> int:
        """The largest sum of results that are still to be read, before the last product; views live
        in their base."""
        nodes = list(self.program.gm.graph.nodes)
        base: dict[fx.Node, fx.Node] = {}
        ends: dict[fx.Node, int] = {}
        last_product = 0
        for place, node in enumerate(nodes):
            shared = op_name(node) in VIEWS and node.all_input_nodes
            if shared:
                base[node] = base[node.all_input_nodes[0]]
            else:
                base[node] = node
            for operand in node.all_input_nodes:
                ends[base[operand]] = place
            if op_name(node) in FLOPS:
                last_product = place
        peak = live = 0
        dying = Counter[int]()
        for place, node in enumerate(nodes[:last_product]):
            if node.op == "call_function" and base[node] is node and node in self.sizes:
                live += math.prod(self.sizes[node])
                dying[ends.get(node, place)] += math.prod(self.sizes[node])
            peak = max(peak, live)
            live -= dying.pop(place, 0)
        return peak

    def _smallest_ancestor(self, node: Any) -> tuple[int, int]:
        """(elements, bytes an element) of the smallest value on the way here: keys before heads
        repeat them."""
        smallest = self.sizes[node]
        while op_name(node) in MOVES:
            node = node.args[0]
            if node not in self.sizes or node.op == "get_attr":
                break
            smallest = min(smallest, self.sizes[node])
        return smallest


def _batch_and_sequence(shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """The first shape of two dims; else the first size and one token."""
    for shape in shapes:
        if len(shape) == 2:
            return int(shape[0]), int(shape[1])
    if shapes:
        return int(shapes[0][0]), 1
    return 1, 1
