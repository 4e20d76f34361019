"""The demo's work: prune the real model, save it as a stock checkpoint, and measure both by one
protocol."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.graph.program import JSON
from secateur.passes.base import Progress, no_progress
from secateur.passes.opening import open_tokenizer
from secateur.runtime.open.classes import silence_transformers
from secateur.tools.demo.assets import DemoText
from secateur.tools.evaluate.corpus import TokenWindows, calibration_windows, token_stream
from secateur.tools.evaluate.measures import Perplexity, Speed, compare_speed, measure_perplexity
from secateur.tools.machine import peak_memory_bytes

QUESTION = "Why do gardeners prune fruit trees in winter?"
ANSWER_TOKENS = 48


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does: the pipeline, tokens to calibrate on and to evaluate, and rounds of
    the speed test."""

    pipeline: str = "score{metric=wanda},prune-width{mlp=0.25},repair"
    calibration_tokens: int = 16_384
    calibration_window: int = 512
    evaluation_tokens: int = 24_576
    evaluation_window: int = 1024
    prompt_tokens: int = 256
    new_tokens: int = 64
    runs: int = 7


MODEL = "model"
FULL = DemoSize()
SHORT = DemoSize(calibration_tokens=2_048, evaluation_tokens=4_096, new_tokens=16, runs=3)


@dataclass(frozen=True)
class ModelMeasures:
    """One model: its size, its quality on held-out text, its speed, and what it says."""

    parameters: int
    bytes_on_disk: int
    perplexity: Perplexity
    prefill: Speed
    decode: Speed
    answer: str


@dataclass(frozen=True)
class Comparison:
    """The model before and after, and all that is needed to repeat it.

    history: the passes with their options and figures.
    proof: what saving proved in a fresh process.
    peak_memory_bytes: of the whole process, both models and the measurement included.
    """

    before: ModelMeasures
    after: ModelMeasures
    size: DemoSize
    calibration: JSON
    history: list[JSON]
    proof: JSON
    saved_to: str
    seconds: dict[str, float]
    peak_memory_bytes: int


def compare_models(
    size: DemoSize,
    original: Path,
    text: DemoText,
    output: Path,
    progress: Progress = no_progress,
    *,
    overwrite: bool = False,
) -> Comparison:
    """Compress a checkpoint into ``output / "model"`` and measure both.

    Args:
        size: how much to do.
        original: a stock checkpoint folder of a causal language model with a chat template.
        text: documents to calibrate on, and others to evaluate on.
        output: made when missing; its folder ``model`` is made.
        progress: reporter of long work.
        overwrite: replace an earlier ``model``.

    Raises:
        SecateurError: a step of the work failed, or there is too little text.
    """
    seconds: dict[str, float] = {}
    tokenizer = open_tokenizer(original)
    windows = calibration_windows(
        text.calibration, tokenizer, tokens=size.calibration_tokens, window=size.calibration_window
    )
    history, saved = _compress_model(
        size, original, output / MODEL, windows, seconds, progress, overwrite
    )
    gc.collect()
    before, after = _measure_models(
        size, (original, output / MODEL), tokenizer, text.held_out, seconds, progress
    )
    return Comparison(
        before=before,
        after=after,
        size=size,
        calibration=windows.describe(),
        history=history,
        proof=saved,
        saved_to=str(output / MODEL),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _compress_model(
    size: DemoSize,
    original: Path,
    target: Path,
    windows: TokenWindows,
    seconds: dict[str, float],
    progress: Progress,
    overwrite: bool,
) -> tuple[list[JSON], JSON]:
    """Capture, run the pipeline, save; the steps that were applied, and what the saved folder was
    proved to be."""
    with _record_seconds(seconds, "capture"):
        program = secateur.capture(original)
    with _record_seconds(seconds, "prune"):
        smaller = secateur.Pipeline.parse(size.pipeline).run(
            program, data=windows, progress=progress
        )
    with _record_seconds(seconds, "save, and reload in a fresh process"):
        target.parent.mkdir(parents=True, exist_ok=True)
        saved = secateur.save(smaller, target, overwrite=overwrite)
    return [asdict(step) for step in smaller.history], asdict(saved) | {"path": str(target)}


def _measure_models(
    size: DemoSize,
    folders: tuple[Path, Path],
    tokenizer: Any,
    held_out: list[str],
    seconds: dict[str, float],
    progress: Progress,
) -> list[ModelMeasures]:
    """Both checkpoints, opened by the stock class and measured on the same text in turns."""
    with silence_transformers():
        models = {str(folder): secateur.open_model(folder) for folder in folders}
    stream, _ = token_stream(held_out, tokenizer, tokens=size.evaluation_tokens)
    with _record_seconds(seconds, "measure perplexity"):
        quality = {
            name: measure_perplexity(
                model,
                stream,
                window=size.evaluation_window,
                unscored=(tokenizer.eos_token_id,),
                progress=progress,
            )
            for name, model in models.items()
        }
    with _record_seconds(seconds, "measure speed"):
        prompt = stream[: size.prompt_tokens].unsqueeze(0)
        speed = compare_speed(
            models, prompt, new_tokens=size.new_tokens, runs=size.runs, progress=progress
        )
    return [
        ModelMeasures(
            parameters=sum(p.numel() for p in model.parameters()),
            bytes_on_disk=sum(file.stat().st_size for file in Path(name).glob("*.safetensors")),
            perplexity=quality[name],
            prefill=speed[name]["prefill"],
            decode=speed[name]["decode"],
            answer=answer_question(model, tokenizer, QUESTION, ANSWER_TOKENS),
        )
        for name, model in models.items()
    ]


@torch.no_grad()
def answer_question(model: Any, tokenizer: Any, question: str, new_tokens: int) -> str:
    """The model's greedy answer to a question put through its chat template; at most ``new_tokens``
    tokens."""
    chat = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**asked, max_new_tokens=new_tokens, do_sample=False)
    answer = output[0, asked["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


@contextmanager
def _record_seconds(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 2)
