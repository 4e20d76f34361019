"""Lockstep execution: all calibration sequences advance through a graph from stop to stop.

Between stops each sequence runs alone.  At a stop only the values that are still to be read are
held, for every
sequence: the memory of one layer's activations over the calibration tokens, whatever the depth; or
of one sequence, where the held values lie on the disk.  What is the same for all sequences (masks,
positions) is held once.  Weights may change at a stop; what was computed before stays as it was,
what comes after sees the new ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from secateur.graph import Program
from secateur.graph.capture.calls import is_mutable
from secateur.passes.calibration.data import Sample

LARGE = 1 << 16  # bytes from which a held value is worth a look, or a file


class Lockstep(fx.Interpreter):
    """A Program that runs all samples at once and can be stopped before any node.

    data: the sequences.
    folder: where held values go as memory-mapped files without a name, which the system frees
        however the process ends; None: in memory.
    """

    def __init__(
        self, program: Program, data: Sequence[Sample], folder: Path | None = None
    ) -> None:
        super().__init__(program.gm, garbage_collect_values=False)
        self.extra_traceback = False
        self._nodes = list(program.gm.graph.nodes)
        self._place = {node.name: position for position, node in enumerate(self._nodes)}
        self._ends = _last_reads(self._nodes)
        self._writes = any(is_mutable(node) for node in self._nodes)
        self._values: dict[str, Tensor] = {}
        self._at = 0
        self._environments: list[dict[fx.Node, Any]] = [{} for _ in data]
        self._folder = folder
        self._settled: list[set[fx.Node]] = [set() for _ in data]
        self._inputs = [{**program.source.example_inputs, **sample.inputs} for sample in data]

    def advance_to(self, name: str) -> None:
        """Run every sample up to the named node, itself excluded; nothing to do where that was
        passed before.

        Args:
            name: of a node.
        """
        stop = self._place[name]
        with torch.no_grad():
            for sample in range(len(self._environments)) if stop > self._at else ():
                self._enter_sample(sample)
                for node in self._nodes[self._at : stop]:
                    self._run_node(sample, node)
                self._share_or_offload(sample)
        self._at = max(self._at, stop)

    def node_value(self, sample: int, name: str) -> Any:
        """The value of a node that was reached: held, or computed from held values without being
        kept.

        Args:
            sample: number of the sequence.
            name: of a node that was reached.
        """
        node = self._nodes[self._place[name]]
        self._enter_sample(sample)
        if node in self.env:
            return self.env[node]
        assert self._place[name] >= self._at, f"{name} was passed and is no longer held"
        with torch.no_grad():
            return self.run_node(node)

    def replace_parameter(self, parameter: str, value: Tensor, chain: Iterable[fx.Node]) -> None:
        """Use another value for a parameter from here on.  chain: its get_attr and what was
        computed from it alone.

        Args:
            parameter: name.
            value: shape of the parameter.
            chain: its get_attr and the nodes computed from it alone.
        """
        target = str(self._nodes[self._place[next(iter(chain)).name]].target)
        self._values[target] = value
        with torch.no_grad():
            for sample in range(len(self._environments)):
                for node in chain:
                    self._enter_sample(sample)
                    self.env[node] = self.run_node(node)

    def finish_sample(
        self, sample: int, values: Mapping[str, Tensor], chains: Iterable[Sequence[fx.Node]]
    ) -> Any:
        """What the graph gives for a sample from here to its end with other parameters; the state
        stays as it is.

        Args:
            sample: number of the sequence.
            values: by target of the get_attr.
            chains: for each, its get_attr and what follows from that alone.

        Returns:
            the output node's value: flat, without the model's output class.
        """
        state = self._environments[sample]
        replaced_values = self._values
        self.env = {
            node: _copy_tensor(value) if self._writes else value for node, value in state.items()
        }
        self._values = {**replaced_values, **values}
        try:
            with torch.no_grad():
                for chain in chains:
                    for node in chain:
                        if node in self.env:
                            self.env[node] = self.run_node(node)
                for node in self._nodes[self._at : -1]:
                    self._run_node(sample, node)
                return self.run_node(self._nodes[-1])
        finally:
            self._values = replaced_values

    def get_attr(
        self, target: fx.node.Target, args: tuple[fx.node.Argument, ...], kwargs: dict[str, object]
    ) -> Any:
        """The replaced value of a parameter, or the one of the graph module."""
        if str(target) in self._values:
            return self._values[str(target)]
        return super().get_attr(target, args, kwargs)

    def _enter_sample(self, sample: int) -> None:
        """Make the state of one sample the environment of the interpreter."""
        self.env = self._environments[sample]

    def _share_or_offload(self, sample: int) -> None:
        """Share the large values of a sample that are held with an equal one, or move them onto the
        disk where that is asked for."""
        if self._writes:
            return
        state = self._environments[sample]
        known = self._settled[sample]
        first = self._environments[0]
        for node, value in state.items():
            if node.op == "get_attr" or node in known or not _is_large(value):
                continue
            twin = None
            if sample:
                twin = first.get(node)
            if twin is not None and _is_equal(twin, value):
                state[node] = twin
            else:
                state[node] = offload_tensor(value, self._folder)
            known.add(node)

    def _run_node(self, sample: int, node: fx.Node) -> None:
        """Run one node for a sample and free what nothing reads any more."""
        if node.op == "placeholder":
            self.env[node] = self._inputs[sample].get(str(node.target))
            return
        self.env[node] = self.run_node(node)
        for done in self._ends.get(node, ()):
            self.env.pop(done, None)


def offload_tensor(value: Any, folder: Path | None) -> Any:
    """A copy on the disk of a large CPU tensor, where there is a folder for it; everything else as
    it is.

    Args:
        value: of a node.
        folder: None: everything stays as it is.
    """
    if folder is not None and _is_large(value):
        return map_copy(value.detach(), folder)
    return value


def map_copy(value: Tensor, folder: Path) -> Tensor:
    """A copy of a CPU tensor in a file that has no name any more: its memory can be written back to
    the disk.

    Args:
        value: on the CPU.
        folder: where the file is made.

    Returns:
        shape and dtype of the value.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        copy = torch.from_file(file.name, shared=True, size=value.numel(), dtype=value.dtype)
    return copy.view(value.shape).copy_(value)


def _is_large(value: object) -> bool:
    """Whether a value is a CPU tensor large enough to share or offload."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.nbytes >= LARGE


def _is_equal(value: object, other: Tensor) -> bool:
    """Whether a value is a tensor of equal dtype and content."""
    return isinstance(value, Tensor) and value.dtype == other.dtype and torch.equal(value, other)


def _copy_tensor(value: Any) -> Any:
    """A clone of a tensor; everything else as it is."""
    if isinstance(value, Tensor):
        return value.clone()
    return value


def _last_reads(nodes: Sequence[fx.Node]) -> Mapping[fx.Node, list[fx.Node]]:
    """By node, the values that nothing reads after it."""
    ends: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(nodes):
        for read in {*node.all_input_nodes, node} - seen:
            seen.add(read)
            ends.setdefault(node, []).append(read)
    return ends
