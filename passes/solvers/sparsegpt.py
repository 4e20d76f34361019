"""SparseGPT: inputs are pruned in order, and later weights make up for the error.

Dims: N outputs, K inputs.  All outputs share the inputs' Gram matrix, so the weights of several
layers that read one input are pruned as one matrix of stacked rows.
Source: Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1 and section 3.4 (n:m).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.graph import Pattern, Share
from secateur.graph.pattern import select_highest


def prune_by_sparsegpt(
    weight_NK: Tensor,
    factor_KK: Tensor,
    pattern: Pattern | Share,
    *,
    live_K: Tensor | None = None,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """(Updated weight [N, K] float32 with zeros where it is pruned, mask [N, K] bool).

    The mask of a group is chosen when its first input is reached, from the weights as updated until
    then, by
    ``w^2 / U_cc^2``; a share of zeros is spread evenly over the blocks of inputs.

    Args:
        weight_NK: dense.
        factor_KK: upper factor U of the damped inverse Gram matrix, see ``gram.inverse_factor``.
        pattern: n:m, or a share of zeros.
        live_K: False for inputs that never fire: their weights go first; None: all do.
        block: inputs whose updates of later ones are gathered into one product.
    """
    work_KN = weight_NK.detach().float().T.clone(memory_format=torch.contiguous_format)
    mask_KN = torch.ones_like(work_KN, dtype=torch.bool)
    salience_K = factor_KK.diagonal().square().reciprocal()
    if live_K is not None:
        salience_K = salience_K * live_K
    width = len(work_KN)
    for spans in blocks_of(pattern, width, block):
        start = spans[0][0]
        stop = spans[-1][1]
        errors = torch.empty_like(work_KN[start:stop])
        for first, last, count in spans:
            score = work_KN[first:last].square() * salience_K[first:last, None]
            mask_KN[first:last] = select_highest(score.T, count).T
            for column in range(first, last):
                error = torch.where(
                    mask_KN[column], 0.0, work_KN[column] / factor_KK[column, column]
                )
                work_KN[column + 1 : stop].addr_(
                    factor_KK[column, column + 1 : stop], error, alpha=-1
                )
                errors[column - start] = error
        work_KN[stop:].addmm_(factor_KK[start:stop, stop:].T, errors, alpha=-1)
    mask_NK = mask_KN.T.contiguous()
    return torch.where(mask_NK, work_KN.T, 0.0), mask_NK


def blocks_of(
    pattern: Pattern | Share, columns: int, block: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Blocks of about ``block`` inputs, each as its groups: (first input, one past the last,
    entries kept in a row).

    Args:
        pattern: n:m, or a share of zeros.
        columns: K.
        block: inputs of a block.
    """
    if isinstance(pattern, Pattern):
        step = max(1, block // pattern.of) * pattern.of
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            yield [
                (first, first + pattern.of, pattern.kept)
                for first in range(start, stop, pattern.of)
            ]
        return
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        yield [(start, stop, pattern.kept_per_group(stop) - pattern.kept_per_group(start))]
