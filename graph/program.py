"""The intermediate representation: one FX graph, the place it came from, and what was done to
it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from secateur.graph.sparse import NONE, SparseWeights

JSON = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a Program came from: enough to build its class again.

    model: the captured module.  Until the first edit the Program's graph holds the *same* Parameter
        objects.
    folder: the checkpoint folder it was read from (tokenizer and generation files live there), or
        None.
    config: the Hugging Face configuration, or None for a plain nn.Module.
    example_inputs: keyword arguments of the captured call, by name; tensors are dynamic where the
        model allows it.
    """

    model: nn.Module
    example_inputs: Mapping[str, Any]
    folder: Path | None = None
    config: Any | None = None


@dataclass(frozen=True)
class Step:
    """One pass that was applied: its name, its options, and the figures it reported."""

    name: str
    options: JSON = field(default_factory=dict)
    figures: JSON = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cut:
    """What edits removed so far.

    dense: the Program before the first edit.
    kept: by name of each group that lost units, those that stayed: [kept] int64, ascending,
        numbered as in ``dense``; [kept, coordinates] where they were chosen for each unit of an
        outer group, ascending in each column.
    dropped: names of the residual blocks and sub-blocks that are gone.
    """

    dense: Program
    kept: Mapping[str, torch.Tensor]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Program:
    """A model as an FX graph of ATen ops over named Parameters.

    gm: the graph module; the truth.  Callable like the model, dynamic in batch and sequence where
        the model allows.
    source: where it came from.
    history: the passes applied so far, oldest first.
    scores: importance of each unit, by group name, [units] float32, higher is more important; empty
        until a ``score`` pass ran.  An edit clears it.  [units, coordinates] where units are ranked
        for each unit of an outer group.
    cut: what edits removed since the model was captured, or None; it is not kept in an artifact.
    sparse: the sparse weights, by parameter name; each holds exact zeros as its pattern says.
    """

    gm: fx.GraphModule
    source: Source
    history: tuple[Step, ...] = ()
    scores: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))
    cut: Cut | None = None
    sparse: SparseWeights = field(default_factory=lambda: NONE)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.gm(*args, **kwargs)

    def replace(self, **changes: Any) -> Program:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Unique parameters under their names in the source model; a tied parameter appears
        once."""
        return self.gm.named_parameters()

    @property
    def num_parameters(self) -> int:
        """Number of elements in unique parameters."""
        return sum(p.numel() for _, p in self.named_parameters())

    @property
    def num_bytes(self) -> int:
        """Bytes of unique parameters in their own dtypes."""
        return sum(p.numel() * p.element_size() for _, p in self.named_parameters())
