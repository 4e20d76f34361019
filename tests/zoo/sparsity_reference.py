"""One-shot sparsity as the papers write it: sorted, dense, in float64, one column after the other.

Dims: N outputs, K inputs.  It shares no line with what it checks; benchmarks/sparsity.py runs it on
    the real model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.graph import Pattern, Share


def top_of_groups(score_NK: Tensor, kept: int = 2, of: int = 4) -> Tensor:
    """The ``kept`` best of each group by a stable sort."""
    groups = score_NK.reshape(-1, of)
    order = groups.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
    return (
        torch.zeros_like(groups, dtype=torch.bool).scatter(1, order, True).reshape(score_NK.shape)
    )


def magnitude_mask(weight_NK: Tensor) -> Tensor:
    """Han et al. 2015: the largest stay."""
    return top_of_groups(weight_NK.abs())


def wanda_mask(weight_NK: Tensor, norms_K: Tensor) -> Tensor:
    """Sun et al. 2024, eq. 1."""
    return top_of_groups(weight_NK.abs() * norms_K[None, :])


def ria_mask(weight_NK: Tensor, norms_K: Tensor) -> Tensor:
    """Zhang et al. 2024 (RIA), eq. 4."""
    size = weight_NK.abs()
    relative = size / size.sum(dim=1, keepdim=True) + size / size.sum(dim=0, keepdim=True)
    return top_of_groups(relative * norms_K[None, :] ** 0.5)


def sparsegpt(
    weight_NK: Tensor, gram_KK: Tensor, pattern: Pattern | Share, damping: float, block: int = 128
) -> Tensor:
    """Frantar & Alistarh 2023, by the definition that algorithm 1 speeds up: after an input is
    pruned, all weights of the inputs still to come are moved by the optimal brain surgeon's update
    with the inverse of *their* Gram matrix."""
    weight = weight_NK.double().clone()
    columns = weight.shape[1]
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    inverses = [torch.linalg.inv(_damped(gram_KK, damping))]
    for _ in range(
        columns - 1
    ):  # taking an input out of the Gram matrix, in its inverse (eq. 4 of the paper)
        inverse = inverses[-1]
        inverses.append((inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:])
    for column in range(columns):
        if isinstance(pattern, Pattern) and column % pattern.of == 0:
            _choose(
                weight, pruned, inverses, column, column + pattern.of, pattern.of - pattern.kept
            )
        if isinstance(pattern, Share) and column % block == 0:
            end = min(column + block, columns)
            zeros = int(end * pattern.ratio + 1e-9) - int(column * pattern.ratio + 1e-9)
            _choose(weight, pruned, inverses, column, end, zeros)
        inverse = inverses[column]
        gone = torch.where(pruned[:, column], weight[:, column], 0.0)
        weight[:, column:] -= torch.outer(gone / inverse[0, 0], inverse[0])
        weight[pruned[:, column], column] = 0.0
    return weight


def sparsegpt_by_columns(weight_NK: Tensor, gram_KK: Tensor, damping: float) -> Tensor:
    """The same for 2:4 and large weights: algorithm 1 with blocks of all inputs, nothing
    gathered."""
    weight = weight_NK.double().clone()
    inverse = torch.linalg.inv(_damped(gram_KK, damping))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for column in range(weight.shape[1]):
        if column % 4 == 0:
            salience = (
                weight[:, column : column + 4] ** 2 / upper.diagonal()[column : column + 4] ** 2
            )
            stays = top_of_groups(salience)
        gone = torch.where(stays[:, column % 4], 0.0, weight[:, column])
        weight[:, column:] -= torch.outer(gone / upper[column, column], upper[column, column:])
        weight[~stays[:, column % 4], column] = 0.0
    return weight.float()


def _damped(gram_KK: Tensor, damping: float) -> Tensor:
    hessian, mean = gram_KK.double().clone(), gram_KK.diagonal().double().mean()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = mean
    return hessian + damping * mean * torch.eye(len(hessian), dtype=torch.float64)


def _choose(
    weight: Tensor, pruned: Tensor, inverses: list[Tensor], start: int, stop: int, zeros: int
) -> None:
    """Mark the ``zeros`` least salient weights of each row between two inputs."""
    scale = torch.stack([inverses[at][0, 0] for at in range(start, stop)])
    salience = weight[:, start:stop] ** 2 / scale
    order = salience.sort(dim=-1, descending=True, stable=True).indices
    pruned[:, start:stop].scatter_(1, order[:, order.shape[1] - zeros :], True)
