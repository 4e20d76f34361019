"""Whole models against each other: prefill and decode, dense, quantized, 2:4 and pruned, eager and
compiled.

Dims: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.passes.base import Progress, no_progress
from secateur.runtime.serving.engine import StockEngine, open_engine
from secateur.runtime.serving.package import (
    PackagedModel,
    describe_target,
    load_package,
    write_package,
)
from secateur.runtime.stock.to_transformers import TOLERANCE
from secateur.tools.bench.timing import Spread, read_clock
from secateur.tools.machine import resident_bytes

SLACK = 2.0
"""How many times further from the same weights in float32 than the dense-shaped model a candidate's
logits may lie, on average over the tokens. The largest distance of a run is chance: two roundings
of one model differ threefold."""


class Steps(Protocol):
    """Something that decodes.  Both give the logits [B, V] of the next token."""

    def prefill(self, ids_BT: Tensor) -> Tensor:
        """Begin anew with prompts."""
        ...

    def decode(self, ids_B1: Tensor) -> Tensor:
        """Add a token to each."""
        ...


class EagerSteps:
    """A stock model called directly, with a growing cache: no more overhead than the model's
    own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.cache: Any = None
        takes = inspect.signature(self.model.forward).parameters
        self.last = dict[str, int]()
        if "logits_to_keep" in takes:
            self.last = {"logits_to_keep": 1}

    def prefill(self, ids_BT: Tensor) -> Tensor:
        """Logits after a prompt; what was in the cache is forgotten."""
        self.cache = None
        return self.decode(ids_BT)

    def decode(self, ids_B1: Tensor) -> Tensor:
        """Logits after one more token."""
        out = self.model(input_ids=ids_B1, past_key_values=self.cache, use_cache=True, **self.last)
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits


@dataclass(frozen=True)
class BenchCandidate:
    """A model to be timed.

    folder: its checkpoint or artifact.
    dtype: of a dense one; None: that of its packed weights.
    packed: run on packed weights.
    compiled: through an ahead-of-time package.
    """

    name: str
    folder: Path
    dtype: str | None
    packed: bool
    compiled: bool


@dataclass(frozen=True)
class ModelRow:
    """What was measured of one candidate.

    prefill, decode: tokens a second, None where ``fault`` says why.
    weight_bytes: held by the loaded model, each tensor once.
    linear_bytes: of its linear layers, read once a token.
    body_bytes, dense_bytes: of the linear layers but the head, as they are and in dense bfloat16.
    resident_bytes: that the process grew by on loading.
    share: part of the stream bandwidth that decoding reached.
    tokens_equal: of so many tokens forced along, how many it would have chosen like its
        dense-shaped model.
    """

    name: str
    dtype: str
    engine: str
    prefill: Spread | None
    decode: Spread | None
    weight_bytes: int
    linear_bytes: int
    body_bytes: int
    dense_bytes: int
    resident_bytes: int
    share: float | None
    tokens_equal: str
    forms: Mapping[str, int]
    fault: str = ""


@dataclass
class _Loaded:
    candidate: BenchCandidate
    steps: Steps
    row: ModelRow


def list_candidates(
    folders: Mapping[str, Path], lowered: Mapping[str, bool], dtypes: Sequence[str], compiled: bool
) -> list[BenchCandidate]:
    """What is timed: each dense folder in each dtype, each lowered one in its own, eager and, if
    wanted, compiled."""
    engines = ["eager"]
    if compiled:
        engines.append("compiled")
    candidates = list[BenchCandidate]()
    for name, folder in folders.items():
        forms: Sequence[str | None] = dtypes
        if lowered[name]:
            forms = [None]
        for dtype in forms:
            for engine in engines:
                candidates.append(
                    BenchCandidate(
                        name=f"{name} {dtype or 'packed'} {engine}",
                        folder=folder,
                        dtype=dtype,
                        packed=lowered[name],
                        compiled=engine == "compiled",
                    )
                )
    return candidates


@torch.no_grad()
def bench_model(
    chosen: Sequence[BenchCandidate],
    prompt_BT: Tensor,
    bandwidth: float,
    *,
    new_tokens: int = 32,
    rounds: int = 5,
    work: Path,
    progress: Progress = no_progress,
    tell: Callable[[str], None] = lambda line: None,
) -> list[ModelRow]:
    """Time candidates in turns, after each showed that it gives the tokens of its dense-shaped
    model.

    Args:
        chosen: the models.
        prompt_BT: int64.
        bandwidth: bytes a second of reading memory.
        new_tokens: tokens to decode in each round.
        rounds: counted rounds; one before them warms up.
        work: where packages are made and kept.
        progress: reporter of long work.
        tell: gets a line for each compilation.
    """
    loaded = list[_Loaded]()
    for candidate in progress(chosen, "loading", len(chosen)):
        loaded.append(_load_candidate(candidate, prompt_BT, new_tokens, work, tell))
    sound = [model for model in loaded if not model.row.fault]
    times: dict[str, list[tuple[float, float]]] = {model.candidate.name: [] for model in sound}
    for turn in progress(range(rounds + 1), "timing", rounds + 1):
        order = sound
        if turn % 2 == 0:
            order = sound[::-1]
        for model in order:
            seconds = _run_once(model.steps, prompt_BT, new_tokens)
            if turn:
                times[model.candidate.name].append(seconds)
    rows = list[ModelRow]()
    for model in loaded:
        seconds_of_model = times.get(model.candidate.name, [])
        rows.append(_measure_row(model, seconds_of_model, prompt_BT, new_tokens, bandwidth))
    return rows


def _load_candidate(
    candidate: BenchCandidate,
    prompt: Tensor,
    new_tokens: int,
    work: Path,
    tell: Callable[[str], None],
) -> _Loaded:
    before = resident_bytes()
    dtype = None
    if not candidate.packed:
        dtype = candidate.dtype
    engine = open_engine(
        candidate.folder,
        device=prompt.device.type,
        dtype=dtype,
        packed=candidate.packed,
        compiled=False,
    )
    assert isinstance(engine, StockEngine)
    steps: Steps = EagerSteps(engine.model)
    row = _describe_candidate(candidate, engine)
    if candidate.compiled:
        packaged = _make_package(candidate, engine, prompt, new_tokens, work, tell)
        steps = packaged
        row = replace(row, engine="compiled ahead of time", weight_bytes=packaged.nbytes)
    tokens_equal, fault = _tokens_like_dense(candidate, steps, engine, prompt, new_tokens)
    row = replace(row, tokens_equal=tokens_equal, fault=fault)
    if candidate.compiled:
        del engine
    return _Loaded(candidate, steps, replace(row, resident_bytes=max(0, resident_bytes() - before)))


def _describe_candidate(candidate: BenchCandidate, engine: StockEngine) -> ModelRow:
    head = engine.model.get_output_embeddings()
    names = {id(m): n for n, m in engine.model.named_modules()}
    body = [layer for layer in engine.layers if layer.layer != names.get(id(head))]
    forms: dict[str, int] = {}
    for layer in engine.layers:
        forms[layer.kind] = forms.get(layer.kind, 0) + 1
    modules = dict(engine.model.named_modules())
    elements = 0
    for layer in body:
        module = modules[layer.layer]
        elements += module.in_features * module.out_features
    return ModelRow(
        name=candidate.name,
        dtype=str(engine.model.dtype).removeprefix("torch."),
        engine="eager",
        prefill=None,
        decode=None,
        weight_bytes=engine.nbytes,
        linear_bytes=sum(layer.bytes for layer in engine.layers),
        body_bytes=sum(layer.bytes for layer in body),
        dense_bytes=2 * elements,
        resident_bytes=0,
        share=None,
        tokens_equal="",
        forms=forms,
    )


def _make_package(
    candidate: BenchCandidate,
    engine: StockEngine,
    prompt: Tensor,
    new_tokens: int,
    work: Path,
    tell: Callable[[str], None],
) -> PackagedModel:
    """The package of a candidate, made once and kept in the work folder under all that it depends
    on."""
    length = prompt.shape[1] + new_tokens
    files = sorted(candidate.folder.rglob("*.safetensors"))
    depends = [str(candidate), describe_target(prompt.device.type)]
    for file in files:
        depends.append(f"{file}{file.stat().st_mtime_ns}")
    digest = hashlib.sha256("|".join(depends).encode()).hexdigest()[:8]
    plain = candidate.name.replace(" ", "-").replace(":", "")
    folder = work / f"{plain}-{len(prompt)}x{length}-{digest}"
    if not folder.is_dir():
        tell(f"compiling {candidate.name}: a minute or more")
        write_package(engine.model, folder, length=length, batch=len(prompt), tell=tell)
    return load_package(folder)


def _tokens_like_dense(
    candidate: BenchCandidate, steps: Steps, engine: StockEngine, prompt: Tensor, new_tokens: int
) -> tuple[str, str]:
    """Whether the tokens are those of the dense-shaped model in the same dtype: the stock
    checkpoint, run eagerly."""
    if not candidate.packed and not candidate.compiled:
        return "is the reference", ""
    base = EagerSteps(engine.model)
    dtype = str(engine.model.dtype).removeprefix("torch.")
    if candidate.packed:
        base = _make_dense_steps(candidate, prompt, dtype)
    if dtype == "float32":
        exact = EagerSteps(base.model)
    else:
        exact = _make_dense_steps(candidate, prompt, "float32")
    compared = compare_tokens(exact, base, steps, prompt, new_tokens)
    return compared["tokens_equal"], compared.get("fault", "")


def _make_dense_steps(candidate: BenchCandidate, prompt: Tensor, dtype: str) -> EagerSteps:
    where = prompt.device.type
    opened = open_engine(candidate.folder, device=where, dtype=dtype, packed=False, compiled=False)
    assert isinstance(opened, StockEngine)
    return EagerSteps(opened.model)


def compare_tokens(
    exact: Steps, base: Steps, other: Steps, prompt: Tensor, new_tokens: int
) -> dict[str, str]:
    """Force the base's greedy tokens along all three; the other must choose the same, but for ties.

    Two roundings of one computation differ, and neither is the truth.  So what the base itself is
    off from float32 is
    the measure: the other may on average be off by SLACK times that, and two tokens that lie closer
    in float32 than SLACK times the base's largest may swap.

    Args:
        exact: the dense-shaped model in float32.
        base: the same in the dtype of the other.
        other: to be compared; each of the three keeps its own cache.
        prompt: int64 [B, T].
        new_tokens: tokens to force along.

    Returns:
        tokens_equal, and fault where they are not, or logits lie too far off.
    """
    assert len({id(exact), id(base), id(other)}) == 3, "each is stepped on its own"
    wanted = base.prefill(prompt).float()
    logits = other.prefill(prompt).float()
    truth = exact.prefill(prompt).float()
    picked = list[tuple[bool, float]]()
    noise = list[float]()
    apart = list[float]()
    for _ in range(new_tokens):
        token = wanted.argmax(-1, keepdim=True)
        choice = logits.argmax(-1, keepdim=True)
        size = truth.abs().amax(1)
        margin = (truth.gather(1, token) - truth.gather(1, choice))[:, 0] / size
        picked += zip((token == choice)[:, 0].tolist(), margin.tolist(), strict=True)
        noise.append(_largest_difference(wanted, truth, size))
        apart.append(_largest_difference(logits, truth, size))
        wanted = base.decode(token).float()
        logits = other.decode(token).float()
        truth = exact.decode(token).float()
    tie = SLACK * max(noise) + TOLERANCE[torch.float32]
    equal = sum(same for same, _ in picked)
    ties = sum(not same and margin < tie for same, margin in picked)
    tokens_equal = f"{equal + ties} of {len(picked)}"
    if ties:
        tokens_equal += f" ({ties} ties)"
    faults = list[str]()
    if equal + ties < len(picked):
        faults.append(f"other tokens than its dense-shaped model: {tokens_equal}")
    far = fmean(apart)
    allowed = SLACK * fmean(noise) + TOLERANCE[torch.float32]
    if not far <= allowed:
        faults.append(f"logits on average {far:.2g} off those in float32, {allowed:.2g} allowed")
    if faults:
        return {"tokens_equal": tokens_equal, "fault": "; ".join(faults)}
    return {"tokens_equal": tokens_equal}


def _largest_difference(logits: Tensor, truth: Tensor, size: Tensor) -> float:
    """Largest difference of two rows of logits, relative to the largest logit; infinite where not
    finite."""
    return float(((logits - truth).abs().amax(1) / size).nan_to_num(float("inf")).max())


def _run_once(steps: Steps, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of (prefill, decode)."""
    started = read_clock(prompt.device)
    token = steps.prefill(prompt).argmax(-1, keepdim=True)
    filled = read_clock(prompt.device)
    for _ in range(new_tokens):
        token = steps.decode(token).argmax(-1, keepdim=True)
    return filled - started, read_clock(prompt.device) - filled


def _measure_row(
    model: _Loaded,
    times: list[tuple[float, float]],
    prompt: Tensor,
    new_tokens: int,
    bandwidth: float,
) -> ModelRow:
    if not times:
        return model.row
    batch, length = prompt.shape
    prefill = Spread.from_seconds([seconds for seconds, _ in times])
    decode = Spread.from_seconds([seconds for _, seconds in times])
    return replace(
        model.row,
        prefill=prefill.rate(batch * length),
        decode=decode.rate(batch * new_tokens),
        share=model.row.linear_bytes * new_tokens / decode.median / bandwidth,
    )
