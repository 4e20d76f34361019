"""Column orders for which an n:m pattern keeps much of a score.

Dims: R rows (of all weights that read the columns), C columns, G groups of m neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ENOUGH = 3e-4  # of the score: a whole turn that gains less ends the search


@dataclass(frozen=True, eq=False)
class ColumnOrder:
    """order: [C] int64, the column that stands at each place.
    before, after: the part of the score that is kept.
    """

    order: Tensor
    before: float
    after: float


def arrange_columns(score_RC: Tensor, kept: int, of: int, seed: int, turns: int = 8) -> ColumnOrder:
    """An order of the columns that keeps much of the score.

    Columns are dealt out by their sums, as cards are, or left as they stand, whichever keeps more.
    Then, over and over, one column of every group is taken out, and all that were taken out go to
    where they serve best together: a linear assignment, whose gains are exact, so that no step
        loses.

    Args:
        score_RC: not negative; C is a multiple of ``of``.
        kept: highest entries of every ``of`` that stay.
        of: size of a group.
        seed: of the order in which places are visited.
        turns: at most so many times every place of a group is taken out.

    Returns:
        the order and what it keeps.

    Source:
        Zhang et al. 2024 (RIA), "Plug-and-Play: An Efficient Post-training Pruning Method for Large
        Language Models", ICLR 2024, section 4.2; taking all places in turns, to a fixed point, is
        ours.
    """
    score_RC = score_RC.float()
    total = max(float(score_RC.sum(dtype=torch.float64)), 1e-30)
    plain = torch.arange(score_RC.shape[1]).view(-1, of)
    start = score_of_groups(score_RC, plain, kept)
    drafted = snake_draft_groups(score_RC, of)
    tried = [(start, plain), (score_of_groups(score_RC, drafted, kept), drafted)]
    best, groups = max(tried, key=lambda pair: pair[0])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(turns):
        last = best
        shuffled = torch.rand(groups.shape, generator=generator).argsort(1)
        groups = groups.gather(1, shuffled)
        for place in range(of):
            groups = reassign_place(score_RC, groups, place, kept)
        best = score_of_groups(score_RC, groups, kept)
        if best - last < ENOUGH * total:
            break
    if best <= start:
        return ColumnOrder(plain.flatten(), start / total, start / total)
    return ColumnOrder(_sort_groups(groups).flatten(), start / total, best / total)


def score_of_groups(score_RC: Tensor, groups_GM: Tensor, kept: int) -> float:
    """The sum of the ``kept`` highest entries of every group in every row.

    Args:
        score_RC: not negative.
        groups_GM: columns of each group.
        kept: entries of a group that stay.
    """
    columns = []
    for place in range(groups_GM.shape[1]):
        columns.append(score_RC[:, groups_GM[:, place]])
    return float(sum(part.sum(dtype=torch.float64) for part in highest_columns(columns, kept)))


def snake_draft_groups(score_RC: Tensor, of: int) -> Tensor:
    """[G, of]: the columns from the greatest sum to the least, dealt out to the groups forwards and
    backwards.

    Args:
        score_RC: not negative.
        of: size of a group.
    """
    rows = score_RC.sum(0, dtype=torch.float64).argsort(descending=True, stable=True).view(of, -1)
    rows = torch.stack(
        [row if round_number % 2 == 0 else row.flip(0) for round_number, row in enumerate(rows)]
    )
    return rows.T.contiguous()


def reassign_place(score_RC: Tensor, groups_GM: Tensor, place: int, kept: int) -> Tensor:
    """The groups with the columns at one place exchanged among them, such that the most is kept.

    With the others of group g there, column c adds to every row max(c, s_g), where s_g is what
    stands last among the kept without it; max(a, b) = (a + b + |a - b|) / 2 makes the table of all
    gains one distance matrix.

    Args:
        score_RC: not negative.
        groups_GM: columns of each group.
        place: index into the groups.
        kept: entries of a group that stay.

    Returns:
        [G, M].
    """
    others = []
    for group in range(groups_GM.shape[1]):
        if group != place:
            others.append(score_RC[:, groups_GM[:, group]])
    last_RG = highest_columns(others, kept)[-1]
    moved = groups_GM[:, place]
    columns_RG = score_RC[:, moved]
    distance = torch.cdist(last_RG.T.contiguous(), columns_RG.T.contiguous(), p=1).double()
    gain = (last_RG.sum(0).double()[:, None] + columns_RG.sum(0).double()[None] + distance) / 2
    taken = torch.from_numpy(assignment(-gain.cpu().numpy())).to(moved.device)
    stays = gain.diagonal().sum() >= gain.gather(1, taken[:, None]).sum()
    reassigned = groups_GM.clone()
    if stays:
        reassigned[:, place] = moved
    else:
        reassigned[:, place] = moved[taken]
    return reassigned


def highest_columns(columns: list[Tensor], count: int) -> list[Tensor]:
    """The ``count`` greatest of some tensors in every entry, in descending order: a partial network
    of exchanges.

    Args:
        columns: tensors of one shape.
        count: how many are wanted.
    """
    remaining = list(columns)
    best = list[Tensor]()
    for _ in range(count):
        top = remaining[0]
        rest = list[Tensor]()
        for candidate in remaining[1:]:
            rest.append(torch.minimum(top, candidate))
            top = torch.maximum(top, candidate)
        best.append(top)
        remaining = rest
    return best


def _sort_groups(groups_GM: Tensor) -> Tensor:
    """The same groups, columns ascending in each, and the groups by their first column: one order
    for one result."""
    groups = groups_GM.sort(1).values
    return groups[groups[:, 0].argsort()]


def assignment(cost: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The column of every row, each once, such that the sum of costs is least.  O(n^3), rows at
    once.

    Args:
        cost: [n, n], finite.

    Source:
        Jonker & Volgenant 1987, shortest augmenting paths, as told by Crouse 2016,
        doi:10.1109/TAES.2016.140952.
    """
    count = len(cost)
    dual_row = cost.min(1)
    reduced = cost - dual_row[:, None]
    dual_column = reduced.min(0)
    column_of = np.full(count, -1)
    row_of = np.full(count, -1)
    for row, column in zip(*np.nonzero(reduced == dual_column[None]), strict=True):
        if column_of[row] < 0 and row_of[column] < 0:
            column_of[row] = column
            row_of[column] = row
    for free in np.flatnonzero(column_of < 0):
        _augment(cost, int(free), dual_row, dual_column, column_of, row_of)
    return column_of.astype(np.int64)


def _augment(
    cost: npt.NDArray[np.float64],
    free: int,
    dual_row: npt.NDArray[np.float64],
    dual_column: npt.NDArray[np.float64],
    column_of: npt.NDArray[np.int64],
    row_of: npt.NDArray[np.int64],
) -> None:
    """Give a free row a column by the shortest path of reduced costs, and change the duals, all in
    place."""
    count = len(cost)
    open_ = np.full(count, np.inf)
    before = np.full(count, -1)
    closed = np.zeros(count, bool)
    rows = [free]
    row = free
    length = 0.0
    sink = -1
    while sink < 0:
        reach = length + cost[row] - dual_row[row] - dual_column
        better = ~closed & (reach < open_)
        open_[better] = reach[better]
        before[better] = row
        column = int(np.where(closed, np.inf, open_).argmin())
        length = float(open_[column])
        closed[column] = True
        if row_of[column] < 0:
            sink = column
        else:
            row = int(row_of[column])
            rows.append(row)
    dual_row[free] += length
    for other in rows[1:]:
        dual_row[other] += length - open_[column_of[other]]
    dual_column[closed] -= length - open_[closed]
    column = sink
    while True:
        row = int(before[column])
        row_of[column] = row
        column_of[row], column = column, column_of[row]
        if row == free:
            return
