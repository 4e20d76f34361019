"""All calibration sequences walk through a pruned model and its dense one together, sub-block by sub-block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.graph import Chain, CoupledGroup, Program, Stage, analyse, coupled_groups
from secateur.graph.atoms import BoolArray
from secateur.graph.parts import Part, parts
from secateur.graph.rewrite import keeping_of
from secateur.passes.data import Sample
from secateur.passes.lower_layers import Layer, linear_layers
from secateur.passes.reconstruct_part import Fitted, Task, Values
from secateur.passes.repair import held_back
from secateur.passes.repair_run import stored
from secateur.passes.repair_sites import open_rows

Target = Literal["stream", "own", "dense"]


class Walk:
    """Where the sequences stand in both models.

    parts: those that can be rebuilt, in order: they hold something that may change, and the dense model has their end.
    refused: why others are left alone.
    """

    def __init__(self, program: Program, data: Sequence[Sample], vectors: bool, folder: Path | None = None) -> None:
        """vectors: whether biases and scales may change.   folder: where large values go, or None: in memory."""
        assert program.cut is not None
        self._program, self._dense_program = program, program.cut.dense
        self._now, self._dense = (_Runner(parts(p).chain, data, folder) for p in (program, program.cut.dense))
        self._dense_after: list[Values] = []
        self._channels: dict[str, Tensor | None] = {}
        self._back = frozenset(held_back(len(data)))
        self._names = {id(parameter): name for name, parameter in program.named_parameters()}
        self._layers = [layer for layer in linear_layers(program)[0] if not open_rows(layer.x)]
        self._ends = {part.end: part for part in parts(program.cut.dense).by_stage.values()}
        self._free = {part: self._masks(part, vectors) for part in parts(program).by_stage.values()}
        self.refused = {part.name: reason for part in self._free if (reason := self._misfit(part))}
        self.parts = [part for part in self._free if part.name not in self.refused]

    def reach(self, part: Part, target: Target) -> tuple[Fitted, Task]:
        """Let both models run up to a part, and give what it is to be fitted to."""
        there = self._ends[part.end]
        self._now.advance(part.stage)
        self._dense.advance(there.stage)
        before, now = self._dense.values, self._now.values
        self._dense_after = self._dense.after(Fitted(there, {}, {}))
        wanted = [self._left(values[part.end], part.end) for values in self._dense_after]
        if target == "own":
            wanted = [
                aim + here[part.start] - self._left(dense[there.start], there.start)
                for aim, here, dense in zip(wanted, now, before, strict=True)
            ]
        inputs = before if target == "dense" else now
        fitted = Fitted(part, self._free[part], self._names)
        return fitted, Task(inputs, wanted, Fitted(there, {}, {}), before, self._back)

    def finish(self, part: Part, fitted: Fitted) -> None:
        """Let both models go on past the part that was reached, the pruned one with what was found."""
        self._now.go_on(self._now.after(fitted))
        self._dense.go_on(self._dense_after)

    def layers(self, part: Part) -> list[Layer]:
        """The linear layers of a part that may change and whose results the dense model has in the same shape."""
        dense, nodes = dict(self._dense_program.named_parameters()), set(part.stage.nodes)
        mine = [one for one in self._layers if one.node in nodes and one.parameter in self._free[part]]
        return [one for one in mine if dense[one.parameter].shape[0] == one.shape[0]]

    def _masks(self, part: Part, vectors: bool) -> dict[str, Tensor | None]:
        """The parameters of a part that may change, each with the mask of its free entries or None."""
        named, sparse, found = dict(self._program.named_parameters()), self._program.sparse, dict[str, Tensor | None]()
        for name in part.parameters:
            value = named[name].detach()
            if name in sparse:
                found[name] = value != 0
            elif value.is_floating_point() and (vectors if value.dim() < 2 else not sparse):
                found[name] = None
        return found

    def _misfit(self, part: Part) -> str | None:
        reasons = {
            "no weight of it may change": not any(mask is not None for mask in self._free[part].values())
            and bool(self._program.sparse),
            "the dense model's stream has no such place": part.end not in self._ends,
            "nothing reads the stream after it": part.end not in part.stage.outputs,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _left(self, value: Tensor, node: str) -> Tensor:
        """The channels of a value of the dense model that the pruned one still has."""
        if node not in self._channels:
            self._channels[node] = self._positions(node)
        kept = self._channels[node]
        return value if kept is None else value.index_select(-1, kept.to(value.device))

    def _positions(self, node: str) -> Tensor | None:
        """The channels of a dense value that are left, or None where none went."""
        assert self._program.cut is not None
        kept, masks = self._program.cut.kept, dict[CoupledGroup, BoolArray]()
        for group in coupled_groups(self._dense_program):
            if group.name in kept:
                masks[group] = group.mask(kept[group.name]).numpy()
        keeping, values = keeping_of(masks), analyse(self._dense_program).values
        axes: Any = next(axes for other, axes in values.items() if other.name == node)
        return torch.from_numpy(keeping.positions(axes[-1])) if keeping.touches(axes[-1]) else None


class _Runner:
    """All sequences at one place of a chain."""

    def __init__(self, chain: Chain, data: Sequence[Sample], folder: Path | None) -> None:
        self.chain, self.at, self._folder = chain, 0, folder
        self.values: list[Values] = [chain.start(sample.inputs) for sample in data]

    def advance(self, stage: Stage) -> None:
        """Run up to a stage, itself excluded."""
        with torch.no_grad():
            for one in self.chain.stages[self.at : self.chain.place[stage]]:
                self.values = [self._held(self.chain.run(one, values), values) for values in self.values]
        self.at = self.chain.place[stage]

    def after(self, fitted: Fitted) -> list[Values]:
        """Values after the stage that is reached, as its part is fitted."""
        module, stage = fitted.finished(), self.chain.stages[self.at]
        with torch.no_grad():
            return [self._held(self.chain.run(stage, values, module), values) for values in self.values]

    def go_on(self, values: list[Values]) -> None:
        """Stand after the stage that was reached, with these values."""
        self.values, self.at = values, self.at + 1

    def _held(self, values: Values, before: Values) -> Values:
        """The values, new large ones on the disk where that is asked for."""
        if self._folder is None:
            return values
        return {
            name: stored(value, self._folder) if value is not before.get(name) else value
            for name, value in values.items()
        }
