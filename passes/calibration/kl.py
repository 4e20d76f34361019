"""KL divergence of every token between the predictions of two models.

Dims: T positions, V vocabulary, K most likely entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.graph import Program, SecateurError
from secateur.passes.base import Progress, no_progress
from secateur.passes.calibration.data import IGNORED, Sample, main_input

QUANTILES = (0.5, 0.9, 0.99)
SHARES = (0.01, 0.2)
CHUNK = 256  # positions whose logits are widened to float32 at once


class QualityError(SecateurError):
    """Predictions that cannot be compared: of other shapes, or not finite."""


@dataclass(frozen=True)
class KL:
    """Forward KL divergence KL(reference || model) in nats a token, over some sequences.

    mean: over all tokens.
    stderr: of the mean; sequences are taken as independent, tokens of one sequence are not (with
        one sequence: tokens are).
    quantiles: of the tokens, by level.
    shares: the part of the whole sum that the
    worst tokens carry, by their fraction: damage sits in few tokens.
    tokens: how many.
    """

    mean: float
    stderr: float
    quantiles: Mapping[float, float]
    shares: Mapping[float, float]
    tokens: int

    @classmethod
    def from_sequences(cls, sequences: Sequence[Tensor]) -> KL:
        """Summary of token divergences, one tensor [T] a sequence.

        Args:
            sequences: token divergences in nats, [T] each.

        Raises:
            QualityError: no token at all, or a divergence that is not finite.
        """
        filled = []
        for s in sequences:
            if s.numel():
                filled.append(s.detach().double().cpu())
        if filled:
            values = torch.cat(filled)
        else:
            values = torch.empty(0, dtype=torch.float64)
        if not values.numel() or not bool(values.isfinite().all()):
            raise QualityError(
                f"the KL of {values.numel()} tokens is no number: a model's logits are not finite"
            )
        ordered = values.sort(descending=True).values
        total = float(values.sum())
        worst = {}
        for part in SHARES:
            worst[part] = float(ordered[: max(1, math.ceil(part * len(ordered)))].sum())
        return cls(
            mean=total / len(values),
            stderr=mean_stderr(filled),
            quantiles={level: float(values.quantile(level)) for level in QUANTILES},
            shares={
                part: worst_sum / total if total > 0 else 0.0 for part, worst_sum in worst.items()
            },
            tokens=len(values),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        levels = {}
        for level, value in self.quantiles.items():
            levels[f"q{100 * level:g}"] = value
        parts = {}
        for part, value in self.shares.items():
            parts[f"share_of_worst_{100 * part:g}%"] = value
        return {"mean": self.mean, "stderr": self.stderr, **levels, **parts, "tokens": self.tokens}


def mean_stderr(sequences: Sequence[Tensor]) -> float:
    """Standard error of the mean over all tokens, from one tensor of token values a sequence;
    sequences vary, so that tokens of one sequence may depend on each other.

    Args:
        sequences: token values, [T] each.

    Source:
        the ratio estimator, Cochran 1977, eq. 6.13.
    """
    sums = torch.stack([s.double().sum() for s in sequences])
    counts = torch.tensor([s.numel() for s in sequences], dtype=torch.float64)
    if len(sequences) < 2:
        values = sequences[0].double()
        if len(values) > 1:
            return float(values.std()) / math.sqrt(len(values))
        return 0.0
    residuals = sums - sums.sum() / counts.sum() * counts
    return float(
        (residuals.square().sum() * len(sequences) / (len(sequences) - 1)).sqrt() / counts.sum()
    )


@torch.no_grad()
def token_kl(reference_TV: Tensor, logits_TV: Tensor, chunk: int = CHUNK) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) of every position: [T] float32, never below zero.

    Args:
        reference_TV, logits_TV: unnormalised log probabilities, any float dtype; the reference may
            lie on another device.
        chunk: positions that are widened to float32 at once.

    Raises:
        QualityError: the shapes differ.
    """
    if reference_TV.shape != logits_TV.shape:
        raise QualityError(
            f"logits {list(logits_TV.shape)} cannot be compared with {list(reference_TV.shape)}"
        )
    pairs = zip(reference_TV.split(chunk), logits_TV.split(chunk), strict=True)
    return _join_parts([_token_divergence(p.to(q.device), q) for p, q in pairs])


def _token_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL of every position of one chunk: [T] float32."""
    p = F.log_softmax(reference.float(), -1)
    q = F.log_softmax(logits.float(), -1)
    terms = p.exp() * (p - q)
    return torch.where(p.isneginf(), 0.0, terms).sum(-1).clamp_min(0)


def _join_parts(parts: Sequence[Tensor]) -> Tensor:
    """One tensor of all chunks; empty for none."""
    if parts:
        return torch.cat(list(parts))
    return torch.empty(0)


# Predictions that are kept
@dataclass(frozen=True, eq=False)
class CachedLogProbs:
    """One sequence's predictions in float16.  log_p: log probabilities [T, V], or of the K most
    likely entries [T, K]; then indices [T, K] int32 and rest [T] float32, the log probability of
    all the others together."""

    log_p: Tensor
    indices: Tensor | None = None
    rest: Tensor | None = None

    @torch.no_grad()
    def kl(self, logits_TV: Tensor, chunk: int = CHUNK) -> Tensor:
        """KL(kept || softmax(logits)) of every position: [T] float32.  With K entries the others
        count as one: a lower bound of the whole (what merges outcomes cannot raise a
            divergence).

        Args:
            logits_TV: of the other model.
            chunk: positions that are widened to float32 at once.
        """
        if self.indices is None or self.rest is None:
            return token_kl(self.log_p, logits_TV, chunk)
        if len(self.log_p) != len(logits_TV):
            raise QualityError(
                f"{len(logits_TV)} positions cannot be compared with {len(self.log_p)}"
            )
        pieces = []
        for t in (self.log_p, self.indices, self.rest, logits_TV):
            pieces.append(t.split(chunk))
        return _join_parts([_kl_of_top(*piece) for piece in zip(*pieces, strict=True)])


def _kl_of_top(log_p: Tensor, indices: Tensor, rest: Tensor, logits: Tensor) -> Tensor:
    """KL of every position of one chunk, all tokens beyond the top ones as one outcome: [T]."""
    entries = indices.long().to(logits.device)
    q = F.log_softmax(logits.float(), -1)
    q_top = q.gather(-1, entries)
    q_rest = q.scatter(-1, entries, -torch.inf).logsumexp(-1)
    p = F.log_softmax(torch.cat([log_p.float(), rest[:, None]], -1), -1).to(logits.device)
    terms = p.exp() * (p - torch.cat([q_top, q_rest[:, None]], -1))
    return torch.where(p.isneginf(), 0.0, terms).sum(-1).clamp_min(0)


@torch.no_grad()
def cache_log_probs(
    logits_TV: Tensor, top: int | None = None, chunk: int = CHUNK
) -> CachedLogProbs:
    """Predictions to compare others with later, two bytes an entry.

    Args:
        logits_TV: of one sequence.
        top: keep so many of the most likely entries of each position; None keeps all. float16 log
            probabilities change a KL by about 1e-5 nats: they are exact where the probability is.
        chunk: positions that are widened to float32 at once.
    """
    if top is None or top >= logits_TV.shape[-1]:
        return CachedLogProbs(
            _join_parts([F.log_softmax(part.float(), -1).half() for part in logits_TV.split(chunk)])
        )
    parts = []
    for part in logits_TV.split(chunk):
        p = F.log_softmax(part.float(), -1)
        best = p.topk(top, -1)
        rest = p.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
        parts.append((best.values.half(), best.indices.int(), rest))
    return CachedLogProbs(*(_join_parts(column) for column in zip(*parts, strict=True)))


# Of Programs, on calibration sequences
def select_logits(output: Any) -> Tensor:
    """The logits of a model's output: its attribute of that name, or its first tensor.

    Args:
        output: of a model.

    Returns:
        [batch, T, V].
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Mapping):
        logits = next(iter(logits.values()))
    return logits[0] if isinstance(logits, tuple | list) else logits  # type: ignore[no-any-return]


@torch.no_grad()
def sample_logits(program: Program, sample: Sample) -> Tensor:
    """The logits of one sequence: [T, V].

    Args:
        program: the model.
        sample: one sequence.
    """
    logits = select_logits(program(**sample.inputs))
    return logits.reshape(-1, logits.shape[-1])


def predict_reference(
    dense: Program,
    samples: Sequence[Sample],
    *,
    top: int | None = None,
    progress: Progress = no_progress,
) -> tuple[CachedLogProbs, ...]:
    """What a model predicts on each sequence, for ``kl_to``: T * V * 2 bytes, or T * top * 6 with
    ``top``.

    Args:
        dense: the reference.
        samples: sequences.
        top: entries kept of each position; None: all.
        progress: reporter.
    """
    return tuple(
        cache_log_probs(sample_logits(dense, s), top)
        for s in progress(samples, "reference", len(samples))
    )


def kl_to(
    found: Sequence[CachedLogProbs],
    program: Program,
    samples: Sequence[Sample],
    *,
    chunk: int = CHUNK,
    progress: Progress = no_progress,
) -> KL:
    """KL(reference || program) on the sequences that the reference was made of.

    Args:
        found: predictions of the reference, one for each sequence.
        program: the model.
        samples: the same sequences.
        chunk: positions that are widened to float32 at once.
        progress: reporter.
    """
    pairs = progress(list(zip(found, samples, strict=True)), "KL", len(samples))
    return KL.from_sequences(
        [cached.kl(sample_logits(program, sample), chunk) for cached, sample in pairs]
    )


def kl(
    dense: Program,
    program: Program,
    samples: Sequence[Sample],
    *,
    chunk: int = CHUNK,
    progress: Progress = no_progress,
) -> KL:
    """KL(dense || program) over all positions of the sequences; the logits of one sequence are held
    at a time."""
    seen = progress(samples, "KL", len(samples))
    return KL.from_sequences(
        [token_kl(sample_logits(dense, s), sample_logits(program, s), chunk) for s in seen]
    )


def next_token_losses(program: Program, sample: Sample, chunk: int = CHUNK) -> Tensor:
    """Negative log-likelihood in nats of each next token of a sequence, those with an ignored label
    left out: [T'].

    Args:
        program: the model.
        sample: one sequence.
        chunk: positions that are widened to float32 at once.

    Raises:
        QualityError: the logits are not one a token.
    """
    logits = sample_logits(program, sample)
    if sample.labels is not None and sample.has_aligned_labels:
        targets = sample.labels.reshape(-1)
        return token_losses(logits, targets, chunk)[targets != IGNORED]
    if sample.labels is not None:
        ids = sample.labels
    else:
        ids = sample.inputs[main_input(program)]
    wanted = ids.reshape(-1)
    if len(logits) != len(wanted):
        raise QualityError(
            f"{len(logits)} predictions for {len(wanted)} tokens: this is no next-token model"
        )
    return token_losses(logits[:-1], wanted[1:], chunk)[wanted[1:] != IGNORED]


@torch.no_grad()
def token_losses(logits_TV: Tensor, targets_T: Tensor, chunk: int = CHUNK) -> Tensor:
    """Negative log-likelihoods [T] float32 of targets; 0 where a target is ignored.

    Args:
        logits_TV: of one sequence.
        targets_T: token ids, -100 where ignored.
        chunk: positions that are widened to float32 at once.
    """
    pairs = zip(logits_TV.split(chunk), targets_T.to(logits_TV.device).split(chunk), strict=True)
    return _join_parts(
        [F.cross_entropy(p.float(), t, reduction="none", ignore_index=IGNORED) for p, t in pairs]
    )
