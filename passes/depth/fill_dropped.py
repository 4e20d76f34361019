"""Padding of dropped sub-blocks with zero outputs, so that a stock class fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from secateur.graph import (
    Block,
    Cut,
    Program,
    SubBlock,
    analyse,
    blocks,
    coupled_groups,
    drop,
    keep,
    with_parameters,
)
from secateur.graph.errors import EditError
from secateur.passes.base import Context, Pass, PassResult
from secateur.passes.calibration.kl import select_logits

Units = dict[Any, Any]
MISFIT = (
    "fill-dropped: with zeros in their place the sub-blocks still change the outputs (a norm after "
    "the sum, for "
    "example): no stock class holds this model; drop whole blocks instead"
)


@dataclass(frozen=True)
class FillDropped(Pass):
    """Put dropped sub-blocks back, with zeros where they write to the stream.  Numerics: close.

    No stock class has a layer without its attention or its MLP.  This gives it one that adds
    nothing: the checkpoint opens everywhere, and is as large and as slow as if nothing had been
        dropped.  Blocks dropped whole stay away.
    """

    name: ClassVar[str] = "fill-dropped"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "close"
    uses: ClassVar[frozenset[str]] = frozenset({"cut"})
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})
    bars: ClassVar[Mapping[str, str]] = {
        "sparse": "weights are sparse, and those put back are not: put fill-dropped before sparsify"
    }

    def preview(self, program: Program) -> Program:
        """A Program of the shapes after filling; its values are not checked against the
        outputs before.

        Args:
            program: with dropped sub-blocks.
        """
        return _fill_parts(program, list(_find_dropped_parts(program)))

    def call(self, program: Program, context: Context) -> PassResult:
        """Put the dropped sub-blocks back.

        Args:
            program: with dropped sub-blocks.
            context: not used.

        Raises:
            EditError: the outputs change although the sub-blocks write zeros.
        """
        subs = list(_find_dropped_parts(program))
        if not subs:
            return PassResult(program, modified=False, figures={"filled": []})
        filled = _fill_parts(program, subs)
        if not any(parameter.is_meta for _, parameter in program.named_parameters()):
            check_unchanged(program, filled, MISFIT)
        figures = {
            "filled": [sub.name for sub in subs],
            "parameters_before": program.num_parameters,
            "parameters_after": filled.num_parameters,
        }
        return PassResult(filled, modified=True, figures=figures)


def _find_dropped_parts(program: Program) -> Iterable[SubBlock]:
    """The sub-blocks that were dropped from blocks that stay, as the dense Program has them."""
    if program.cut is None:
        return
    dropped = set(program.cut.dropped)
    for block in blocks(program.cut.dense):
        if block.name not in dropped:
            yield from (sub for sub in block.sub_blocks if sub.name in dropped)


def _fill_parts(program: Program, subs: list[SubBlock]) -> Program:
    """The Program with the sub-blocks back, their output parameters zero."""
    if not subs or program.cut is None:
        return program
    dense = program.cut.dense
    names = {sub.name for sub in subs}
    dropped_blocks = {part.name for part in blocks(dense) if isinstance(part, Block)} & set(
        program.cut.dropped
    )
    units: Units = {
        **program.cut.kept,
        **_filled_widths(program, {name for sub in subs for name in sub.parameters}),
    }
    if dropped_blocks:
        base = drop(keep(dense, units), sorted(dropped_blocks))
    else:
        base = keep(dense, units)
    values = dict(program.named_parameters())
    zeros = set[str]()
    for block in blocks(base):
        for sub in block.sub_blocks:
            if sub.name in names:
                zeros |= _output_parameters(base, sub)
    filled = {}
    for n, p in base.named_parameters():
        if n in values:
            filled[n] = values[n].detach()
        else:
            filled[n] = p.detach()
    filled |= {name: torch.zeros_like(filled[name]) for name in zeros}
    cut = base.cut or Cut(dense, {})
    return with_parameters(base, filled).replace(history=program.history, scores={}, cut=cut)


def _filled_widths(program: Program, owned: set[str]) -> dict[str, Tensor]:
    """As many units of each group that comes back as the groups of its kind have kept; which ones
    does not matter."""
    assert program.cut is not None
    groups = coupled_groups(program.cut.dense)
    widths = dict[str, Tensor]()
    counts: dict[tuple[str, int], set[int]] = {}
    for group in groups:
        if group.name in program.cut.kept:
            counts.setdefault((group.family, group.units), set()).add(
                len(program.cut.kept[group.name])
            )
    for group in groups:
        alike = counts.get((group.family, group.units), set())
        if (
            group.name not in program.cut.kept
            and {m.parameter for m in group.members} <= owned
            and len(alike) == 1
        ):
            widths[group.name] = torch.arange(next(iter(alike)))
    return widths


def _output_parameters(program: Program, sub: SubBlock) -> set[str]:
    """The parameters that make what a branch adds: the rows of its last matrices, and biases."""
    axes: Any = analyse(program).values[sub.branch.operand]
    leaves = set()
    for axis in axes:
        for leaf in axis.leaves():
            leaves.add(leaf)
    names: set[str] = set()
    for group in coupled_groups(program):
        if group.leaf in leaves:
            for member in group.members:
                if member.role == "produces" and member.parameter in sub.parameters:
                    names.add(member.parameter)
    return names


def check_unchanged(before: Program, after: Program, reason: str) -> None:
    """Raises EditError, with the reason, where the outputs for the example inputs differ by more
    than 1e-4.

    Args:
        before: reference.
        after: edited.
        reason: first part of the message.
    """
    inputs = dict(before.source.example_inputs)
    with torch.no_grad():
        logits_before = select_logits(before(**inputs))
        logits_after = select_logits(after(**inputs))
    gap = float((logits_before - logits_after).abs().max()) / max(
        1.0, float(logits_before.abs().max())
    )
    if not gap <= 1e-4:
        raise EditError(f"{reason}; the outputs differ by {gap:.3g}")
