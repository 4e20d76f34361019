"""A walk of all calibration sequences through a pruned model and its dense one, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.graph import Chain, CoupledGroup, Program, Stage, analyse, coupled_groups
from secateur.graph.axes.atoms import BoolArray
from secateur.graph.blocks.parts import Part, parts
from secateur.graph.edit.rewrite import keeping_of
from secateur.passes.calibration.data import Sample
from secateur.passes.calibration.lockstep import offload_tensor
from secateur.passes.lowering.layers import Layer, linear_layers
from secateur.passes.repair.reconstruct_part import FittedPart, Task, Values
from secateur.passes.repair.repair import held_back_sequences
from secateur.passes.repair.sites import open_rows

Target = Literal["stream", "own", "dense"]


class Walk:
    """Where the sequences stand in both models.

    parts: those that can be rebuilt, in order: they hold something that may change, and the dense
        model has their end.
    refused: why others are left alone.
    """

    def __init__(
        self, program: Program, data: Sequence[Sample], vectors: bool, folder: Path | None = None
    ) -> None:
        """vectors: whether biases and scales may change.
        folder: where large values go, or None: in memory.
        """
        assert program.cut is not None
        self._program = program
        self._dense_program = program.cut.dense
        self._now = _Runner(parts(program).chain, data, folder)
        self._dense = _Runner(parts(program.cut.dense).chain, data, folder)
        self._dense_after: list[Values] = []
        self._channels: dict[str, Tensor | None] = {}
        self._back = frozenset(held_back_sequences(len(data)))
        self._names = {id(parameter): name for name, parameter in program.named_parameters()}
        self._layers = [layer for layer in linear_layers(program)[0] if not open_rows(layer.x)]
        self._ends = {part.end: part for part in parts(program.cut.dense).by_stage.values()}
        self._free = {
            part: self._free_masks(part, vectors) for part in parts(program).by_stage.values()
        }
        self.refused = {
            part.name: reason for part in self._free if (reason := self._incompatibility(part))
        }
        self.parts = [part for part in self._free if part.name not in self.refused]

    def reach_part(self, part: Part, target: Target) -> tuple[FittedPart, Task]:
        """Let both models run up to a part, and give what it is to be fitted to.

        Args:
            part: one of ``parts``, in order.
            target: kind of the target.

        Returns:
            the part on copies of its parameters, and its task.
        """
        end_values = self._ends[part.end]
        self._now.advance_to(part.stage)
        self._dense.advance_to(end_values.stage)
        before = self._dense.values
        now = self._now.values
        self._dense_after = self._dense.values_after(FittedPart(end_values, {}, {}))
        wanted = []
        for values in self._dense_after:
            wanted.append(self._select_remaining(values[part.end], part.end))
        if target == "own":
            wanted = [
                aim
                + current[part.start]
                - self._select_remaining(dense[end_values.start], end_values.start)
                for aim, current, dense in zip(wanted, now, before, strict=True)
            ]
        if target == "dense":
            inputs = before
        else:
            inputs = now
        fitted = FittedPart(part, self._free[part], self._names)
        return fitted, Task(inputs, wanted, FittedPart(end_values, {}, {}), before, self._back)

    def finish_part(self, part: Part, fitted: FittedPart) -> None:
        """Let both models go on past the part that was reached, the pruned one with what was
        found.

        Args:
            part: the part that was reached.
            fitted: with its final values.
        """
        self._now.go_on(self._now.values_after(fitted))
        self._dense.go_on(self._dense_after)

    def free_layers(self, part: Part) -> list[Layer]:
        """The linear layers of a part that may change and whose results the dense model has in the
        same shape.

        Args:
            part: one of ``parts``.

        Returns:
            layers in graph order.
        """
        dense = dict(self._dense_program.named_parameters())
        nodes = set(part.stage.nodes)
        layers: list[Layer] = []
        for layer in self._layers:
            is_free = layer.node in nodes and layer.parameter in self._free[part]
            if is_free and dense[layer.parameter].shape[0] == layer.shape[0]:
                layers.append(layer)
        return layers

    def _free_masks(self, part: Part, vectors: bool) -> dict[str, Tensor | None]:
        """The parameters of a part that may change, each with the mask of its free entries or
        None."""
        named = dict(self._program.named_parameters())
        sparse = self._program.sparse
        masks = dict[str, Tensor | None]()
        for name in part.parameters:
            value = named[name].detach()
            if name in sparse:
                masks[name] = value != 0
            elif value.is_floating_point() and (vectors if value.dim() < 2 else not sparse):
                masks[name] = None
        return masks

    def _incompatibility(self, part: Part) -> str | None:
        """Why a part is left alone, or None."""
        masked = any(mask is not None for mask in self._free[part].values())
        if self._program.sparse and not masked:
            return "no weight of it may change"
        if part.end not in self._ends:
            return "the dense model's stream has no such place"
        if part.end not in part.stage.outputs:
            return "nothing reads the stream after it"
        return None

    def _select_remaining(self, value: Tensor, node: str) -> Tensor:
        """The channels of a value of the dense model that the pruned one still has."""
        if node not in self._channels:
            self._channels[node] = self._remaining_channels(node)
        channels = self._channels[node]
        if channels is None:
            return value
        return value.index_select(-1, channels.to(value.device))

    def _remaining_channels(self, node: str) -> Tensor | None:
        """The channels of a dense value that are left, or None where none went."""
        assert self._program.cut is not None
        kept_units = self._program.cut.kept
        masks = dict[CoupledGroup, BoolArray]()
        for group in coupled_groups(self._dense_program):
            if group.name in kept_units:
                masks[group] = group.mask(kept_units[group.name]).numpy()
        keeping = keeping_of(masks)
        values = analyse(self._dense_program).values
        axes: Any = next(axes for other, axes in values.items() if other.name == node)
        if keeping.touches(axes[-1]):
            return torch.from_numpy(keeping.positions(axes[-1]))
        return None


class _Runner:
    """All sequences at one place of a chain."""

    def __init__(self, chain: Chain, data: Sequence[Sample], folder: Path | None) -> None:
        self.chain = chain
        self.at = 0
        self._folder = folder
        self.values: list[Values] = [chain.initial_values(sample.inputs) for sample in data]

    def advance_to(self, stage: Stage) -> None:
        """Run up to a stage, itself excluded."""
        with torch.no_grad():
            for stage_between in self.chain.stages[self.at : self.chain.place[stage]]:
                self.values = [
                    self._offload_new(self.chain.run_stage(stage_between, values), values)
                    for values in self.values
                ]
        self.at = self.chain.place[stage]

    def values_after(self, fitted: FittedPart) -> list[Values]:
        """Values after the stage that is reached, as its part is fitted.

        Args:
            fitted: the part at the stage that is reached.

        Returns:
            values by name, one map a sequence.
        """
        module = fitted.make_module()
        stage = self.chain.stages[self.at]
        with torch.no_grad():
            return [
                self._offload_new(self.chain.run_stage(stage, values, module), values)
                for values in self.values
            ]

    def go_on(self, values: list[Values]) -> None:
        """Stand after the stage that was reached, with these values.

        Args:
            values: after the stage, one map a sequence.
        """
        self.values = values
        self.at += 1

    def _offload_new(self, values: Values, before: Values) -> Values:
        """The values, new large ones on the disk where that is asked for."""
        if self._folder is None:
            return values
        offloaded = {}
        for name, value in values.items():
            offloaded[name] = (
                offload_tensor(value, self._folder) if value is not before.get(name) else value
            )
        return offloaded
