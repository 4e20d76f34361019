"""Refinement of a sparse weight by its inputs' Gram matrix, one group at a time.

Dims: N outputs, K inputs, m inputs of a group, n kept ones, S supports (choices of n out of m).
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from secateur.graph import Pattern

MOST = 256  # supports of a group that are all tried


def refine_groups(
    dense_NK: Tensor,
    sparse_NK: Tensor,
    gram_KK: Tensor,
    pattern: Pattern,
    sweeps: int,
    block: int = 128,
) -> Tensor:
    """A weight of the pattern nearer to a dense one in outputs: ``tr((dense - w) G (dense - w)^T)``
    never rises.

    Coordinate descent over groups: with all other groups fixed, the optimum of one is known for
    each support (a least squares problem of n unknowns); the support that explains most is taken,
    in all rows at once.

    Args:
        dense_NK: target.
        sparse_NK: start, with the pattern.
        gram_KK: G, with its damping, so that it is positive definite.
        pattern: n:m.
        sweeps: times that every group is visited.
        block: inputs whose updates are gathered into one product.

    Returns:
        [N, K] float32.

    Source:
        block coordinate descent (Tseng 2001); swaps by the Gram matrix as in Zimmer et al. 2025
        (SparseSwaps), arXiv:2512.10922, are the case of n = 1 entry changed at fixed values.
    """
    gram = gram_KK.float()
    made_KN = sparse_NK.float().T.clone(memory_format=torch.contiguous_format)
    step = max(1, block // pattern.of) * pattern.of
    columns = len(gram)
    solvers = []
    for offset in range(0, columns, pattern.of):
        solvers.append(
            _Group(gram[offset : offset + pattern.of, offset : offset + pattern.of], pattern)
        )
    for _ in range(sweeps):
        pull_KN = gram @ (dense_NK.float().T - made_KN)  # what each entry could still explain
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            before = made_KN[start:stop].clone()
            inner = gram[start:stop, start:stop]
            for offset in range(0, stop - start, pattern.of):
                group = slice(offset, offset + pattern.of)
                old = before[group]
                new = solvers[(start + offset) // pattern.of]
                made_KN[start + offset : start + offset + pattern.of] = refined = new(
                    pull_KN[start:stop][group], old
                )
                pull_KN[start:stop].addmm_(inner[:, group], refined - old, alpha=-1)
            moved = made_KN[start:stop] - before
            for rest in (slice(0, start), slice(stop, columns)):
                pull_KN[rest].addmm_(gram[rest, start:stop], moved, alpha=-1)
    return made_KN.T.contiguous()


class _Group:
    """The best entries of one group, for every row."""

    def __init__(self, gram_mm: Tensor, pattern: Pattern) -> None:
        supports = list(combinations(range(pattern.of), pattern.kept))
        self.gram_mm = gram_mm
        self.places_Sn = torch.tensor(supports, device=gram_mm.device)
        inner = gram_mm.double()[self.places_Sn[:, :, None], self.places_Sn[:, None, :]]
        self.inverse_Snn = torch.linalg.inv(inner).float()

    def __call__(self, pull_mN: Tensor, old_mN: Tensor) -> Tensor:
        """New values [m, N].

        Args:
            pull_mN: the group's rows of G (dense - w).
            old_mN: its values in w.
        """
        wanted_mN = torch.addmm(pull_mN, self.gram_mm, old_mN)
        wanted_SnN = wanted_mN[self.places_Sn]
        values_SnN = self.inverse_Snn @ wanted_SnN
        choice_N = (wanted_SnN * values_SnN).sum(1).argmax(0)
        places_nN = self.places_Sn[choice_N].T
        values_nN = values_SnN.gather(0, _choice_index(choice_N, values_SnN))[0]
        return torch.zeros_like(old_mN).scatter_(0, places_nN, values_nN)


def _choice_index(choice_N: Tensor, like_SnN: Tensor) -> Tensor:
    """The choice as an index into the first dim."""
    return choice_N.expand(1, *like_SnN.shape[1:])
