"""Folding of the residual of pruned heads into the kept heads (Minitron, section 2.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.graph import CoupledGroup, Program, coupled_groups, with_parameters
from secateur.graph.errors import EditError
from secateur.passes.importance.base import distinct_members

FOLDED = ("query_heads", "kv_heads")


def fold_pairs(scores: Tensor, kept: int) -> list[tuple[int, int]]:
    """(head that stays, head that goes into it), by index.

    With L heads by falling score and K kept, head i of the last L - K kept ones takes head 2K - i +
    1 (from 1): the least kept one takes the best dropped one.

    Args:
        scores: [heads].
        kept: number of heads that stay, at least half.

    Returns:
        pairs of head indices.

    Source:
        Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.3.
    """
    order = torch.sort(scores, descending=True, stable=True).indices.tolist()
    pairs: list[tuple[int, int]] = []
    for i in range(2 * kept - len(order) + 1, kept + 1):
        pairs.append((order[i - 1], order[2 * kept - i]))
    return pairs


def fold_heads(program: Program, counts: Mapping[str, int]) -> Program:
    """The program with W_i <- W_i + (W_i - W_j) in the producing rows of each head i that takes in
    a head j: queries, and keys and values where every query head has its own.  Query heads that are
    ranked under each key/value head take in those of their own one.

    Args:
        program: with scores for the groups.
        counts: heads that will stay, by group; groups of other families, and those that stay whole,
            are left alone.

    Raises:
        EditError: fewer than half of the heads will stay, or a unit is several query heads.
    """
    named = dict(program.named_parameters())
    values = dict[str, Tensor]()
    for group in coupled_groups(program):
        count = counts.get(group.name, group.units)
        if group.family not in FOLDED or count >= group.units:
            continue
        _check_group(group, count)
        scores = program.scores[group.name]
        if scores.dim() == 1:
            by_column = scores[:, None]
        else:
            by_column = scores
        folds = list[tuple[int, int, int]]()
        for coordinate, ranking in enumerate(by_column.T):
            for stays, goes in fold_pairs(ranking, count):
                folds.append((stays, goes, coordinate))
        for member in distinct_members(group):
            if member.role != "produces":
                continue
            old = named[member.parameter].detach()
            new = values.setdefault(member.parameter, old.clone())
            if scores.dim() == 1:
                cells = member.positions[:, None]
            else:
                cells = member.cells
            for stays, goes, column in folds:
                index = cells[stays, column].to(old.device)
                of = cells[goes, column].to(old.device)
                new.index_copy_(
                    member.dim,
                    index,
                    2 * old.index_select(member.dim, index) - old.index_select(member.dim, of),
                )
    if values:
        return with_parameters(program, values)
    return program


def _check_group(group: CoupledGroup, kept: int) -> None:
    """Check that the heads of a group can be folded.

    Raises:
        EditError: too few heads stay, or a unit is several query heads.
    """
    if group.units > 2 * kept:
        message = f"{kept} of {group.units} heads of {group.name} would stay, at least half must"
        raise EditError(f"prune-width: fold_heads: {message}")
    widths = {m.positions.shape[1] for m in group.members if m.role == "produces"}
    if len(widths) > 1:
        message = (
            f"a unit of {group.name} is a key/value head with several query heads; prune "
            "query_heads instead"
        )
        raise EditError(f"prune-width: fold_heads: {message}")
