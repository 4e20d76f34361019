"""Measures of a language model: perplexity, and the speed of prefill and of decoding.

Each result carries the protocol it was measured by; compare results of one protocol only.
A model here is anything called as ``model(input_ids=ids)`` whose result has ``.logits`` [batch,
sequence, vocabulary]; speed needs one of transformers' causal language models, with a cache.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from secateur.graph.errors import SecateurError
from secateur.passes.base import Progress, no_progress

Model = Callable[..., Any]
LOSS_CHUNK = 256  # positions whose logits are widened to fp32 at once


class EvaluationError(SecateurError):
    """The text or the options leave nothing to measure, or the model gives no finite number."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens, and how it was measured.

    value: perplexity.
    nll: mean, in nats a token.
    stderr: standard error of that mean, tokens taken as independent.
    tokens: scored tokens.
    window, stride: tokens in a window, and from one window to the next; each window scores only
        tokens that no window before it scored.
    bos: what stands before a window.
    unscored: ids never scored.
    """

    value: float
    nll: float
    stderr: float
    tokens: int
    window: int
    stride: int
    bos: str
    unscored: tuple[int, ...]
    dtype: str
    seconds: float

    @property
    def protocol(self) -> str:
        """One line to print beside the number."""
        if self.stride == self.window:
            overlap = "no overlap"
        else:
            overlap = f"stride {self.stride}"
        return (
            f"{self.tokens:,} scored tokens, windows of {self.window} ({overlap}), {self.bos}, "
            f"{self.dtype}"
        )


@torch.no_grad()
def measure_perplexity(
    model: Model,
    stream: torch.Tensor,
    *,
    window: int = 1024,
    stride: int | None = None,
    bos: int | None = None,
    unscored: tuple[int, ...] = (),
    progress: Progress = no_progress,
) -> Perplexity:
    """Perplexity of a stream of tokens.

    Args:
        model: called with input_ids [1, <= window]; put it into eval mode before.
        stream: [T] int64, documents already joined.
        window: tokens of a window, beginning token included when there is one.
        stride: tokens from one window to the next, 1..window; None is the window: no overlap.
        bos: id put before every window, or None to put nothing; then a token that stands first in
            its window, and was not in the one before, has no context and is not scored.
        unscored: ids that are not scored as targets, such as the end token that joins documents.
        progress: reporter of the windows.

    Raises:
        EvaluationError: nothing to score, options out of range, or a loss that is not finite.
    """
    window, stride = text_window(window, stride, bos)
    began = time.perf_counter()
    losses: list[torch.Tensor] = []
    dtype = "unknown"
    spans = list(window_spans(len(stream), window, stride, bos is not None))
    for start, end, first in progress(spans, "perplexity"):
        ids = stream[start:end]
        logits, dtype = _window_logits(model, ids, bos)
        targets = ids[first:]
        scored = ~torch.isin(targets, torch.tensor(unscored, dtype=ids.dtype))
        losses.append(token_losses(logits[-len(targets) :], targets)[scored])
    loss = torch.empty(0)
    if losses:
        loss = torch.cat(losses)
    if loss.numel() < 2 or not torch.isfinite(loss).all():
        raise EvaluationError(
            f"{loss.numel()} tokens scored of {len(stream)}; need two or more, all with a "
            "finite loss"
        )
    nll = loss.double().mean().item()
    beginning = "no beginning token"
    if bos is not None:
        beginning = f"beginning token {bos} before each window"
    return Perplexity(
        value=math.exp(min(nll, 700.0)),
        nll=nll,
        stderr=loss.double().std().item() / math.sqrt(loss.numel()),
        tokens=loss.numel(),
        window=window + (bos is not None),
        stride=stride,
        bos=beginning,
        unscored=unscored,
        dtype=dtype,
        seconds=time.perf_counter() - began,
    )


def text_window(window: int, stride: int | None, bos: int | None) -> tuple[int, int]:
    """Tokens of text in a window, and the stride."""
    body = window - (bos is not None)
    if stride is None:
        stride = body
    else:
        stride = stride
    if body < 2 or not 1 <= stride <= body:
        raise EvaluationError(
            f"window={window}, stride={stride}: need a window of two tokens of text, 1 <= "
            "stride <= window"
        )
    return body, stride


def window_spans(
    length: int, window: int, stride: int, has_bos: bool
) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored position in the window): every token that has a context is scored
    once."""
    done = 0
    for start in range(0, length, stride):
        end = min(start + window, length)
        first = max(done - start, 0 if has_bos else 1)
        if first < end - start:
            yield start, end, first
        done = end
        if end == length:
            return


def _window_logits(model: Model, ids: torch.Tensor, bos: int | None) -> tuple[torch.Tensor, str]:
    """([n, vocabulary] whose last row predicts the last token of ids, dtype)."""
    if bos is None:
        fed = ids
    else:
        fed = torch.cat([ids.new_tensor([bos]), ids])
    logits = model(input_ids=fed.unsqueeze(0)).logits[0, :-1]
    return logits, str(logits.dtype).removeprefix("torch.")


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods [n] fp32 of targets [n] under logits [n, vocabulary]."""
    pairs = zip(logits.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
    return torch.cat(
        [F.cross_entropy(part.float(), target, reduction="none") for part, target in pairs]
    )


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one phase: the median of interleaved runs, and their range.

    phase: "prefill" (prompt tokens over the time of one forward pass that fills the cache and
    predicts one token) or "decode" (new tokens over the time of as many greedy single-token steps
    on the cache, after the prompt).
    """

    phase: str
    tokens_per_s: float
    slowest: float
    fastest: float
    runs: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    threads: int
    dtype: str
    device: str

    @property
    def protocol(self) -> str:
        """One line to print beside the number."""
        load = f"{self.prompt_tokens} prompt tokens"
        if self.phase == "decode":
            load += f", {self.new_tokens} new"
        where = self.device
        if self.device == "cpu":
            where = f"{self.device}, {self.threads} threads"
        return (
            f"batch {self.batch}, {load}, {self.dtype}, {where}, median of {self.runs} "
            "interleaved runs"
        )


@torch.no_grad()
def compare_speed(
    models: Mapping[str, Any],
    prompt: torch.Tensor,
    *,
    new_tokens: int = 64,
    runs: int = 5,
    progress: Progress = no_progress,
) -> dict[str, dict[str, Speed]]:
    """Speed of each model, the models taking turns so that a busy machine hits all of them alike.

    Args:
        models: by name; causal language models of transformers in eval mode on one device.
        prompt: [batch, prompt tokens] int64 on that device.
        new_tokens: greedy steps of the decode phase, without stopping at an end token.
        runs: counted rounds; one round before them warms up.
        progress: reporter of the rounds.

    Returns:
        {name: {"prefill": Speed, "decode": Speed}}.
    """
    if runs < 1 or new_tokens < 1:
        raise EvaluationError(f"runs={runs}, new_tokens={new_tokens}: both must be at least 1")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in progress(range(runs + 1), "speed"):
        if turn % 2:
            names = list(models)
        else:
            names = list(models)[::-1]
        for name in names:
            seconds[name].append(_time_once(models[name], prompt, new_tokens))
    return {
        name: _measure_speeds(models[name], prompt, new_tokens, times[1:])
        for name, times in seconds.items()
    }


def _time_once(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of (prefill, decode)."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        last = {"logits_to_keep": 1}
    else:
        last = {}
    started = _read_clock(prompt)
    out = model(input_ids=prompt, use_cache=True, **last)
    token = out.logits[:, -1:].argmax(-1)
    filled = _read_clock(prompt)
    for _ in range(new_tokens):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return filled - started, _read_clock(prompt) - filled


def _read_clock(where: torch.Tensor) -> float:
    if where.is_cuda:
        torch.cuda.synchronize(where.device)
    return time.perf_counter()


def _measure_speeds(
    model: Any, prompt: torch.Tensor, new_tokens: int, times: list[tuple[float, float]]
) -> dict[str, Speed]:
    batch, length = prompt.shape
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if prompt.is_cuda:
        device = torch.cuda.get_device_name(prompt.device)
    else:
        device = prompt.device.type
    prefill_seconds, decode_seconds = zip(*times, strict=True)
    speeds = {}
    for phase, tokens, seconds in (
        ("prefill", length, prefill_seconds),
        ("decode", new_tokens, decode_seconds),
    ):
        rates = sorted(batch * tokens / s for s in seconds)
        speeds[phase] = Speed(
            phase=phase,
            tokens_per_s=statistics.median(rates),
            slowest=rates[0],
            fastest=rates[-1],
            runs=len(times),
            batch=batch,
            prompt_tokens=length,
            new_tokens=new_tokens,
            threads=torch.get_num_threads(),
            dtype=dtype,
            device=device,
        )
    return speeds
