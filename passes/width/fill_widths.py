"""Padding of narrower groups with zero units to one width, so that a stock class fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.graph import (
    CoupledGroup,
    Cut,
    Program,
    blocks,
    coupled_groups,
    drop,
    keep,
    with_parameters,
)
from secateur.passes.base import Context, Pass, PassResult
from secateur.passes.depth.fill_dropped import check_unchanged
from secateur.passes.repair.sites import remaining_positions

MISFIT = (
    "fill-widths: units of zero still change the outputs (a norm over the units, for example): no "
    "stock class holds "
    "layers of different sizes of this model; prune them to one size"
)


@dataclass(frozen=True)
class FillWidths(Pass):
    """Give every group as many units as the widest of its kind, those that are added all zero.
    Numerics: close.

    Layers that were pruned to different sizes get one size again: the checkpoint opens everywhere,
    and is as large and as slow as its widest layer.  The sizes that the layers really have stay
    known: see the figure ``sizes``.
    """

    name: ClassVar[str] = "fill-widths"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "close"
    uses: ClassVar[frozenset[str]] = frozenset({"cut"})
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})
    bars: ClassVar[Mapping[str, str]] = {
        "sparse": "weights are sparse, and new inputs would come between theirs: put fill-widths "
        "before sparsify"
    }

    def preview(self, program: Program) -> Program:
        """A Program of the shapes after filling; its values are not checked against the
        outputs before.

        Args:
            program: pruned, with its cut.
        """
        return _fill_groups(program, _find_wider(program))

    def call(self, program: Program, context: Context) -> PassResult:
        """Widen the narrower groups with units of zero.

        Args:
            program: pruned, with its cut.
            context: not used.

        Raises:
            EditError: the outputs change although the added units are zero.
        """
        wider = _find_wider(program)
        if not wider:
            return PassResult(program, modified=False, figures={"sizes": {}})
        assert program.cut is not None
        filled = _fill_groups(program, wider)
        if not any(parameter.is_meta for _, parameter in program.named_parameters()):
            check_unchanged(program, filled, MISFIT)
        kept_units = program.cut.kept
        figures = {
            "sizes": {name: [len(kept_units[name]), len(units)] for name, units in wider.items()},
            "parameters_before": program.num_parameters,
            "parameters_after": filled.num_parameters,
        }
        return PassResult(filled, modified=True, figures=figures)


def _find_wider(program: Program) -> dict[str, Tensor]:
    """By name of each group that is narrower than another of its kind: the dense units that it
    gets, ascending."""
    if program.cut is None:
        return {}
    parameters = {name for name, _ in program.named_parameters()}
    kept_units = program.cut.kept
    alike: dict[tuple[str, int], list[CoupledGroup]] = {}
    for group in coupled_groups(program.cut.dense):
        if group.block and any(member.parameter in parameters for member in group.members):
            alike.setdefault((group.family, group.units), []).append(group)
    wider = {}
    for (_, units), groups in alike.items():
        sizes = {}
        for group in groups:
            sizes[group.name] = len(kept_units[group.name]) if group.name in kept_units else units
        widest = max(sizes.values())
        for name, size in sizes.items():
            if size < widest:
                wider[name] = _add_units(kept_units[name], units, widest)
    return wider


def _add_units(kept: Tensor, units: int, wanted: int) -> Tensor:
    """The kept units and the first others, ``wanted`` in all, ascending; at each coordinate where
    they differ."""
    if kept.dim() > 1:
        return torch.stack([_add_units(column, units, wanted) for column in kept.T], 1)
    gone = torch.ones(units, dtype=torch.bool)
    gone[kept] = False
    return torch.cat([kept, gone.nonzero()[: wanted - len(kept), 0]]).sort().values


def _fill_groups(program: Program, wider: Mapping[str, Tensor]) -> Program:
    """The Program with the wider groups, added units zero."""
    if not wider or program.cut is None:
        return program
    cut = program.cut
    shapes = keep(cut.dense, {**cut.kept, **wider})
    gone = [name for name in cut.dropped if name in _residual_parameters(shapes)]
    if gone:
        base = drop(shapes, gone)
    else:
        base = shapes
    # Without a cut the model is as wide as the dense one again.
    new_cut = base.cut or Cut(cut.dense, {})
    old = remaining_positions(cut)
    new = remaining_positions(new_cut)
    values = dict(program.named_parameters())
    filled = {}
    for name, parameter in base.named_parameters():
        value = values[name].detach()
        filled[name] = _place_in_zeros(value, parameter.detach(), name, old, new)
    return with_parameters(base, filled).replace(
        history=program.history, scores={}, cut=Cut(cut.dense, new_cut.kept, cut.dropped)
    )


def _residual_parameters(program: Program) -> set[str]:
    """Names of all blocks and sub-blocks."""
    program_blocks = blocks(program)
    names = set()
    for block in program_blocks:
        names.add(block.name)
        names.update(sub.name for sub in block.sub_blocks)
    return names


def _place_in_zeros(
    value: Tensor,
    like: Tensor,
    name: str,
    old: Mapping[tuple[str, int], Tensor],
    new: Mapping[tuple[str, int], Tensor],
) -> Tensor:
    """The value in a larger tensor of zeros: its dense positions ``old`` among the dense positions
    ``new``."""
    for dim, size in enumerate(like.shape):
        if value.shape[dim] != size:
            dense = old[name, dim]
            if (name, dim) in new:
                places = torch.searchsorted(new[name, dim], dense)
            else:
                places = dense
            shape = [*value.shape[:dim], size, *value.shape[dim + 1 :]]
            value = value.new_zeros(shape).index_copy_(dim, places.to(value.device), value)
    return value
