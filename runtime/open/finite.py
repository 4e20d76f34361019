"""Looking for NaN and infinity in what was opened: one of either spoils whatever is computed from
it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from secateur.graph.errors import SecateurError, SourceError

PIECE = 1 << 24
"""Elements that are looked at one by one at a time, which bounds the memory that this takes."""
SHOWN = 3


def check_finite(
    tensors: Iterable[tuple[str, Tensor]],
    where: Path | str,
    kind: type[SecateurError] = SourceError,
) -> None:
    """Refuse weights that are not finite.  Each is read once, one after another; nothing of their
    size is made.

    Args:
        tensors: names and weights; buffers, which may be masks of infinities, are for the caller to
            leave out.
        where: the folder, for messages.
        kind: the class of the error to raise.

    Raises:
        SecateurError: of that kind: names the weights, how many of their numbers, and the place of
            the first.
    """
    faults = list[str]()
    for name, tensor in tensors:
        if not _is_finite(tensor):
            faults.append(_described(name, tensor))
    if faults:
        more = ""
        if len(faults) > SHOWN:
            more = f"; and {len(faults) - SHOWN} more weights"
        raise kind(
            f"{where}: weights that are not finite: {'; '.join(faults[:SHOWN])}{more}. The model "
            "diverged, its file is "
            "damaged, or its numbers do not fit the dtype: fetch it again, or choose another dtype"
        )


@torch.no_grad()
def _is_finite(tensor: Tensor) -> bool:
    if (
        tensor.is_meta
        or not tensor.numel()
        or not (tensor.is_floating_point() or tensor.is_complex())
    ):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.itemsize == 1:
        return all(bool(piece.float().isfinite().all()) for piece in _pieces(tensor))
    least, most = torch.aminmax(tensor.detach())  # one pass; NaN goes into both
    return bool(least.isfinite()) and bool(most.isfinite())


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    pieces: tuple[Tensor, ...] = tensor.detach().reshape(-1).split(PIECE)
    return pieces


def _described(name: str, tensor: Tensor) -> str:
    nans = infinities = 0
    first = -1
    for place, piece in enumerate(_pieces(tensor)):
        if piece.itemsize == 1:
            values = piece.float()
        else:
            values = piece
        odd = ~values.isfinite()
        if first < 0 and bool(odd.any()):
            first = place * PIECE + int(odd.int().argmax())
        nans += int(values.isnan().sum())
        infinities += int(values.isinf().sum())
    index = [int(place) for place in torch.unravel_index(torch.tensor(first), tensor.shape)]
    counts = []
    if nans:
        counts.append(f"{nans:,} NaN")
    if infinities:
        counts.append(f"{infinities:,} infinite")
    return f"{name} ({' and '.join(counts)}, the first at {index})"
