"""A sub-block to be fitted: its free parameters, its inputs, and its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from secateur.graph.blocks.chain import stage_module
from secateur.graph.blocks.parts import Part

Values = Mapping[str, Any]


class FittedPart:
    """A part that runs on copies of the parameters that may change, in float32 or better.

    masters, masks: by name in the source model; a mask is [shape] bool of the entries that may
        change, or None for all.
    """

    def __init__(
        self, part: Part, free: Mapping[str, Tensor | None], names: Mapping[int, str]
    ) -> None:
        """free: masks by name of the parameters that may change.
        names: of Parameters of the Program, by id.
        """
        self.part = part
        self.masks = dict(free)
        self.module, copies = stage_module(part.stage)
        self._copies = {node.name: copy for node, copy in copies.items()}
        self.masters = dict[str, Tensor]()
        self._dtypes = dict[str, torch.dtype]()
        self._targets = dict[str, str]()
        for target, parameter in self.module.named_parameters(remove_duplicate=False):
            name = names.get(id(parameter), "")
            if name in free:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                self._targets[target] = name
                self._dtypes[name] = parameter.dtype
                self.masters.setdefault(name, parameter.detach().to(wide).clone())

    def __call__(self, values: Values) -> tuple[Any, ...]:
        """The stage's outputs, from the values before it; those stay as they are."""
        arguments = tuple(self._stage_arguments(values))
        outputs: tuple[Any, ...] = torch.func.functional_call(
            self.module, self._module_tensors(), arguments
        )
        return outputs

    def run_to_stream(self, values: Values) -> Tensor:
        """The stream after the part.

        Args:
            values: before the stage, by name.

        Returns:
            [..., H].
        """
        stream: Tensor = self(values)[self.part.stage.outputs.index(self.part.end)]
        return stream

    def parameter_values(self) -> dict[str, Tensor]:
        """The parameters in their own dtypes, by name."""
        values: dict[str, Tensor] = {}
        for name in self.masters:
            values[name] = self._full_parameter(name)
        return values

    def make_module(self) -> fx.GraphModule:
        """The stage's module with what was found in it."""
        for target, name in self._targets.items():
            owner, _, leaf = target.rpartition(".")
            value = torch.nn.Parameter(self._full_parameter(name), requires_grad=False)
            setattr(self.module.get_submodule(owner), leaf, value)
        return self.module

    @torch.no_grad()
    def peek_values(self, values: Values, names: Sequence[str]) -> list[Tensor]:
        """Values of some nodes of the stage, or of its inputs, by name; it runs as far as they
        ask.

        Args:
            values: before the stage, by name.
            names: of nodes or inputs of the stage.
        """
        inner = [self._copies[name] for name in names]
        return _Peek(self.module, self._module_tensors()).run_and_collect(
            self._stage_arguments(values), inner
        )

    def _full_parameter(self, name: str) -> Tensor:
        """A parameter in its own dtype, with +0.0 outside its mask."""
        value = self.masters[name].detach().to(self._dtypes[name])
        mask = self.masks[name]
        if mask is None:
            return value
        return torch.where(mask, value, 0)

    def _stage_arguments(self, values: Values) -> list[Any]:
        """The stage's inputs in order; those it writes to are copied."""
        changed = self.part.stage.mutated_inputs
        arguments: list[Any] = []
        for name in self.part.stage.inputs:
            arguments.append(values[name].clone() if name in changed else values[name])
        return arguments

    def _module_tensors(self) -> dict[str, Tensor]:
        """The masters in the dtypes of the parameters, by target."""
        tensors: dict[str, Tensor] = {}
        for target, name in self._targets.items():
            tensors[target] = self.masters[name].to(self._dtypes[name])
        return tensors


@dataclass(frozen=True, eq=False)
class Task:
    """Sequences to fit a part on.

    inputs: values before the stage, one map a sequence.
    wanted: the stream after it that is aimed at, in the channels that are left: [..., channels] a
        sequence.
    dense: the dense model's stage that ends where this one does.
    dense_inputs: values before that.
    back: numbers of the sequences held back.
    """

    inputs: Sequence[Values]
    wanted: Sequence[Tensor]
    dense: FittedPart
    dense_inputs: Sequence[Values]
    back: frozenset[int]

    @property
    def fitting_sequences(self) -> list[int]:
        """Numbers of the sequences to fit on."""
        indices: list[int] = []
        for index in range(len(self.inputs)):
            if index not in self.back:
                indices.append(index)
        return indices


class _Peek(fx.Interpreter):
    """Runs a module up to the last of some nodes."""

    def __init__(self, module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self._tensors = tensors

    def get_attr(
        self, target: fx.node.Target, args: tuple[fx.node.Argument, ...], kwargs: dict[str, object]
    ) -> Any:
        """The tensor given for a target, or the one of the module."""
        if str(target) in self._tensors:
            return self._tensors[str(target)]
        return super().get_attr(target, args, kwargs)

    def run_and_collect(self, given: Sequence[Any], nodes: Sequence[fx.Node]) -> list[Tensor]:
        """Run until the nodes are known and return their values."""
        remaining = iter(given)
        self.env = {}
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            if node.op == "placeholder":
                self.env[node] = next(remaining)
        missing = set(nodes) - set(self.env)
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            if not missing:
                break
            if node not in self.env:
                self.env[node] = self.run_node(node)
                missing.discard(node)
        return [self.env[node] for node in nodes]
