"""Next-token distributions computed chunk by chunk of rows, never all at once.

T rows (tokens of a batch), V vocabulary, X width of the last hidden state, k tokens kept of a
distribution, c rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23  # of a chunk of logits, [c, V]: 32 MiB in float32


class Rows(Protocol):
    """Distributions of T rows, and how far another one is from them."""

    @property
    def count_rows(self) -> int:
        """T."""
        ...

    def divergence(
        self, part: slice, log_q_cV: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Forward KL of these rows to ``log_q``, and the distribution whose difference to q is the
        gradient.

        Args:
            part: the rows.
            log_q_cV: [c, V] float32, log probabilities at this temperature.

        Returns:
            ([c] float32 nats, [c, V] float32): d KL / d logits = (q - the second) / temperature.
        """
        ...


@dataclass(frozen=True, eq=False)
class LogitRows:
    """logits_TV: [T, V], any float dtype."""

    logits_TV: Tensor

    @property
    def count_rows(self) -> int:
        """T."""
        return len(self.logits_TV)

    def logits(self, part: slice) -> Tensor:
        """[c, V] float32."""
        return self.logits_TV[part].float()

    def divergence(
        self, part: slice, log_q_cV: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Forward KL of these rows; see ``Rows.divergence``."""
        return _full_divergence(self.logits(part), log_q_cV, temperature)


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Logits as hidden state times head, computed when asked for.

    hidden_TX: [T, X].
    weight_VX: [V, X].
    bias_V: [V] or None.
    dtype: of the product; None is that of the weight.
    """

    hidden_TX: Tensor
    weight_VX: Tensor
    bias_V: Tensor | None = None
    dtype: torch.dtype | None = None

    @property
    def count_rows(self) -> int:
        """T."""
        return len(self.hidden_TX)

    def logits(self, part: slice) -> Tensor:
        """[c, V] float32."""
        return head_logits(self.hidden_TX[part], self.weight_VX, self.bias_V, self.dtype)

    def divergence(
        self, part: slice, log_q_cV: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Forward KL of these rows; see ``Rows.divergence``."""
        return _full_divergence(self.logits(part), log_q_cV, temperature)


@dataclass(frozen=True, eq=False)
class TopRows:
    """The k likeliest tokens of each row; all others count together as one more outcome, so that no
    mass is invented.

    indices_Tk: [T, k] integer.
    log_probs_Tk: [T, k] log probabilities under the whole vocabulary, at the temperature that they
        are compared at.
    """

    indices_Tk: Tensor
    log_probs_Tk: Tensor

    @property
    def count_rows(self) -> int:
        """T."""
        return len(self.indices_Tk)

    def divergence(
        self, part: slice, log_q_cV: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Forward KL with all tokens beyond the k likeliest as one outcome; see
        ``Rows.divergence``.
        """
        device = log_q_cV.device
        index_ck = self.indices_Tk[part].to(device, torch.int64)
        log_p_ck = self.log_probs_Tk[part].to(device, torch.float32)
        p_ck = log_p_ck.exp()
        rest_c1 = (1 - p_ck.sum(-1, keepdim=True)).clamp_min(0)
        others_cV = log_q_cV.exp().scatter_(-1, index_ck, 0.0)
        other_c1 = others_cV.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        kl_c = (p_ck * (log_p_ck - log_q_cV.gather(-1, index_ck))).sum(-1)
        kl_c += (torch.special.xlogy(rest_c1, rest_c1) - rest_c1 * other_c1.log()).squeeze(-1)
        return kl_c, others_cV.mul_(rest_c1 / other_c1).scatter_(-1, index_ck, p_ck)


def top_rows(rows: HeadRows | LogitRows, k: int, temperature: float = 1.0) -> TopRows:
    """The k likeliest tokens of each row, int32 and float32, computed chunk by chunk.

    Args:
        rows: of a model.
        k: tokens kept of each row.
        temperature: of the distributions.
    """
    parts = []
    for part in row_chunks(rows.count_rows, _vocabulary_size(rows)):
        log_p_cV = torch.log_softmax(rows.logits(part) / temperature, -1)
        parts.append(log_p_cV.topk(min(k, log_p_cV.shape[-1]), -1))
    indices = torch.cat([part.indices for part in parts]).to(torch.int32)
    return TopRows(indices, torch.cat([part.values for part in parts]))


def row_chunks(rows: int, vocabulary: int, elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Slices of the rows, each of about ``elements`` logits.

    Args:
        rows: T.
        vocabulary: V.
        elements: logits of a chunk.
    """
    size = max(1, elements // vocabulary)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def head_logits(
    x_cX: Tensor, weight_VX: Tensor, bias_V: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """x W^T + b, [c, V] float32; multiplied in ``dtype``.

    Args:
        x_cX: hidden states.
        weight_VX: of the head.
        bias_V: of the head, or None.
        dtype: of the product; None is that of the weight.
    """
    wide = dtype or weight_VX.dtype
    logits_cV = (x_cX.to(wide) @ weight_VX.to(wide).T).float()
    if bias_V is None:
        return logits_cV
    return logits_cV.add_(bias_V.float())


def _vocabulary_size(rows: HeadRows | LogitRows) -> int:
    """V of the rows."""
    if isinstance(rows, HeadRows):
        return rows.weight_VX.shape[0]
    return rows.logits_TV.shape[-1]


def _full_divergence(
    logits_cV: Tensor, log_q_cV: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """KL over the whole vocabulary, and the teacher's distribution.

    Raises:
        ValueError: the vocabularies differ.
    """
    if logits_cV.shape != log_q_cV.shape:
        raise ValueError(
            f"the teacher gives {logits_cV.shape[-1]} logits a token and the student "
            f"{log_q_cV.shape[-1]}: "
            "distillation compares them token by token, so leave the vocabulary unpruned"
        )
    log_p_cV = torch.log_softmax(logits_cV.to(log_q_cV.device) / temperature, -1)
    p_cV = log_p_cV.exp()
    gap_cV = log_p_cV.sub_(log_q_cV).masked_fill_(
        p_cV == 0, 0.0
    )  # 0 * (-inf - -inf) where both forbid a token
    return gap_cV.mul_(p_cV).sum(-1), p_cV
