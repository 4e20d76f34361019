"""Several models on one text: perplexity, and the distance of each from a reference model, with
intervals.

All models see the same windows, one window at a time; at most two models' logits of one window are
held at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.graph.program import JSON
from secateur.passes.base import Progress, no_progress
from secateur.passes.calibration.kl import CHUNK, KL, token_kl
from secateur.passes.calibration.seq2seq import DECODER_INPUT, split_window
from secateur.tools.evaluate.measures import (
    EvaluationError,
    Model,
    text_window,
    token_losses,
    window_spans,
)

CONFIDENCE = 0.95
RESAMPLES = 2000
DRAWN_AT_ONCE = 4_000_000  # clusters that are drawn at once, 8 bytes each and some more
FEW = 10
"""With fewer documents than this, windows are resampled instead; with fewer windows, tokens."""
CURVE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Interval:
    """A number and the range that holds the true one with the stated confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ScoredText:
    """What is scored, and how.

    stream: [T] int64, documents joined by ``end``.
    window: tokens of a window, beginning token included.
    stride: tokens from one window to the next.
    bos: id before every window, or None.
    end: id that joins documents: never scored as a target, and where a document ends.
    decoder_start: for models with an encoder and a decoder, the first token of the decoder: the
        first half of a window goes to the encoder, the second is scored; else None.
    """

    stream: Tensor
    end: int
    window: int = 1024
    stride: int | None = None
    bos: int | None = None
    decoder_start: int | None = None

    def window_spans(self) -> list[tuple[int, int, int]]:
        """(start, end, first scored position) of each window.

        Raises:
            EvaluationError: options out of range.
        """
        body, stride = text_window(self.window, self.stride, self.bos)
        spans = list(window_spans(len(self.stream), body, stride, self.bos is not None))
        if self.decoder_start is None:
            return spans
        halves = []
        for start, end, first in spans:
            if end - start >= 2:
                halves.append((start, end, max(first, (end - start) // 2)))
        return halves


@dataclass(frozen=True)
class TextScores:
    """One model on the text.

    perplexity: exp of the mean negative log-likelihood of a scored token.
    nll: that mean, nats.
    ratio: perplexity over that of the reference.
    kl: KL(reference || model) of a scored token's prediction.
    kl_mean: its mean.
    agreement: part of the predictions whose likeliest token is that of the reference.
    curve: (part of the tokens, worst first; part of the whole KL that they carry).
    """

    perplexity: Interval
    nll: float
    dtype: str
    ratio: Interval | None = None
    kl: KL | None = None
    kl_mean: Interval | None = None
    agreement: Interval | None = None
    curve: tuple[tuple[float, float], ...] = ()

    def to_json(self) -> JSON:
        """Plain values."""
        values = asdict(self)
        if self.kl is not None:
            values["kl"] = self.kl.to_json()
        return values


@dataclass(frozen=True)
class TextReport:
    """All models on one text, and the protocol: ``protocol`` is a line to print beside the
    numbers."""

    models: Mapping[str, TextScores]
    protocol: str
    tokens: int
    reference: str | None

    def to_json(self) -> JSON:
        """Plain values."""
        return {
            "protocol": self.protocol,
            "scored_tokens": self.tokens,
            "reference": self.reference,
            "models": {name: scores.to_json() for name, scores in self.models.items()},
        }


@dataclass
class _TokenValues:
    """Of one model, tensors of token values, in the order of the text."""

    losses: list[Tensor] = field(default_factory=list)
    kls: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    dtype: str = "unknown"


@torch.no_grad()
def score_text(
    models: Mapping[str, Model],
    text: ScoredText,
    *,
    reference: str | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> TextReport:
    """Score every model on every window.

    Args:
        models: by name, in eval mode.
        reference: name of the model that the others are compared with, or None.
        seed: of the resampling.

    Raises:
        EvaluationError: nothing to score, or losses that are not finite;
        QualityError: logits of other shapes.
    """
    windows = text.window_spans()
    seen = {name: _TokenValues() for name in models}
    clusters: list[Tensor] = []
    document = (text.stream == text.end).cumsum(0)
    if len(document):
        documents = int(document[-1]) + int(text.stream[-1] != text.end)
    else:
        documents = 0
    order = sorted(models, key=lambda name: name != reference)
    resampled = _describe_resampling(documents, len(windows))
    for at, (start, end, first) in enumerate(progress(windows, "text", len(windows))):
        ids = text.stream[start:end]
        scored = ids[first:] != text.end
        place = torch.arange(start, end)
        cluster_of = {
            "documents": document[start:end],
            "windows": torch.full_like(place, at),
            "tokens": place,
        }
        clusters.append(cluster_of[resampled][first:][scored])
        against = None
        for name in order:
            logits = _predict_last(models[name], ids, text, len(ids) - first)
            _collect_values(seen[name], logits, ids[first:], scored.nonzero()[:, 0], against)
            if name == reference:
                against = logits
            else:
                against = against
    if clusters:
        cluster = torch.cat(clusters)
    else:
        cluster = torch.empty(0, dtype=torch.int64)
    if len(cluster) < 2:
        raise EvaluationError(
            f"{len(cluster)} tokens scored of {len(text.stream)}; need two or more: give more text"
        )
    scores = _summarize_models(seen, cluster, reference, seed)
    return TextReport(
        scores, _describe_protocol(text, documents, cluster, resampled), len(cluster), reference
    )


def _describe_resampling(documents: int, windows: int) -> str:
    """What the intervals take as independent: the largest pieces of which there are enough."""
    if documents >= FEW:
        return "documents"
    if windows >= FEW:
        return "windows"
    return "tokens"


def _device_of(model: Any) -> torch.device:
    parameters = getattr(model, "parameters", None)
    if parameters:
        return next((p.device for p in parameters()), torch.device("cpu"))
    return torch.device("cpu")


def _predict_last(model: Model, ids: Tensor, text: ScoredText, count: int) -> Tensor:
    """Logits [count, vocabulary] for the last ``count`` of ids."""
    device = _device_of(model)
    predicted = None
    if text.decoder_start is not None:
        parts = split_window(ids[None], text.decoder_start)
        ids = parts["input_ids"][0]
        predicted = parts[DECODER_INPUT].to(device)
    if text.bos is not None:
        ids = torch.cat([ids.new_tensor([text.bos]), ids])
    read = ids.to(device).unsqueeze(0)
    if predicted is not None:
        logits: Tensor = model(input_ids=read, decoder_input_ids=predicted).logits[0]
    else:
        logits = model(input_ids=read).logits[0, :-1]
    return logits[-count:]


def _collect_values(
    seen: _TokenValues, logits: Tensor, targets: Tensor, scored: Tensor, against: Tensor | None
) -> None:
    """Take from logits [n, vocabulary] what is wanted of the scored positions, some of them at a
    time."""
    seen.dtype = str(logits.dtype).removeprefix("torch.")
    for positions in scored.split(CHUNK):
        part = logits[positions.to(logits.device)]
        losses = token_losses(part, targets[positions].to(logits.device)).cpu()
        if not bool(losses.isfinite().all()):
            raise EvaluationError(
                "a loss is not finite: the model's weights or its dtype are at fault"
            )
        seen.losses.append(losses)
        if against is not None:
            wanted = against[positions.to(against.device)].to(logits.device)
            seen.kls.append(token_kl(wanted, part).cpu())
            seen.agrees.append((wanted.argmax(-1) == part.argmax(-1)).float().cpu())


# Summaries with intervals
def _summarize_models(
    seen: Mapping[str, _TokenValues], cluster: Tensor, reference: str | None, seed: int
) -> dict[str, TextScores]:
    bootstrap = Bootstrap(cluster, seed)
    base = None
    if reference is not None:
        base = torch.cat(seen[reference].losses).double()
    return {name: _summarize_model(values, base, bootstrap) for name, values in seen.items()}


def _summarize_model(seen: _TokenValues, base: Tensor | None, bootstrap: Bootstrap) -> TextScores:
    losses = torch.cat(seen.losses).double()
    perplexity = bootstrap.interval(losses, exponential=True)
    if base is None or not seen.kls:
        return TextScores(perplexity, float(losses.mean()), seen.dtype)
    kls = torch.cat(seen.kls).double()
    return TextScores(
        perplexity=perplexity,
        nll=float(losses.mean()),
        dtype=seen.dtype,
        ratio=bootstrap.interval(losses - base, exponential=True),
        kl=KL.from_sequences(bootstrap.split_by_cluster(kls)),
        kl_mean=bootstrap.interval(kls),
        agreement=bootstrap.interval(torch.cat(seen.agrees).double()),
        curve=tail_concentration(kls),
    )


class Bootstrap:
    """Percentile intervals of means over tokens, by resampling whole clusters (documents, windows)
    with replacement; the same resamples serve every statistic, so that differences are paired.

    cluster: [T] which cluster each token belongs to, in ascending order.

    Source:
        Efron & Tibshirani 1993, chapters 8.5 (clusters) and 13 (percentiles).
    """

    def __init__(self, cluster: Tensor, seed: int) -> None:
        self.sizes = torch.unique_consecutive(cluster, return_counts=True)[1]
        self.seed = seed

    def split_by_cluster(self, values: Tensor) -> list[Tensor]:
        """Token values [T] by cluster."""
        return list(values.split(self.sizes.tolist()))

    def interval(self, values: Tensor, exponential: bool = False) -> Interval:
        """The mean of token values [T] (or its exponential) with its interval."""
        sums = torch.stack([part.sum() for part in self.split_by_cluster(values)])
        means = torch.cat(
            [sums[drawn].sum(1) / self.sizes[drawn].sum(1) for drawn in self._draw_clusters()]
        )
        tail = (1 - CONFIDENCE) / 2
        middle = float(values.mean())
        low = float(means.quantile(tail))
        high = float(means.quantile(1 - tail))
        if exponential:
            return Interval(*(math.exp(min(x, 700.0)) for x in (middle, low, high)))
        return Interval(middle, low, high)

    def _draw_clusters(self) -> Iterator[Tensor]:
        """Numbers of clusters, [some resamples, clusters] at a time; the same ones in every
        call."""
        clusters = len(self.sizes)
        maker = torch.Generator().manual_seed(self.seed)
        at_once = max(1, DRAWN_AT_ONCE // clusters)
        for done in range(0, RESAMPLES, at_once):
            yield torch.randint(
                clusters, (min(at_once, RESAMPLES - done), clusters), generator=maker
            )


def tail_concentration(values: Tensor) -> tuple[tuple[float, float], ...]:
    """(part of the tokens, worst first; part of the sum that they carry), at fixed parts."""
    running = values.sort(descending=True).values.cumsum(0)
    total = float(running[-1])
    curve = list[tuple[float, float]]()
    for part in CURVE:
        count = max(1, math.ceil(part * len(values)))
        carried = 0.0
        if total:
            carried = float(running[count - 1]) / total
        curve.append((count / len(values), carried))
    return tuple(curve)


def _describe_protocol(text: ScoredText, documents: int, cluster: Tensor, resampled: str) -> str:
    body, stride = text_window(text.window, text.stride, text.bos)
    if stride == body:
        overlap = "no overlap"
    else:
        overlap = f"stride {stride}"
    if text.bos is None:
        bos = "no beginning token"
    else:
        bos = f"beginning token {text.bos} before each window"
    count = len(torch.unique_consecutive(cluster))
    if text.decoder_start is not None:
        bos += ", the first half of a window read by the encoder and the second scored"
    return (
        f"{len(cluster):,} scored tokens of {documents:,} documents, windows of {text.window} "
        f"({overlap}), {bos}, "
        f"end tokens not scored; intervals: {CONFIDENCE:.0%}, bootstrap over {count:,} {resampled}"
    )
