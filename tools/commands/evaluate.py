"""The command ``secateur evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.graph.program import JSON
from secateur.passes.calibration.seq2seq import decoder_start
from secateur.passes.calibration.windows import beginning_token
from secateur.passes.opening import open_tokenizer
from secateur.runtime import read_manifest
from secateur.runtime.save.artifact import MANIFEST
from secateur.runtime.save.branches import checkpoint_in, open_with_branches
from secateur.runtime.save.target import check_files, new_file
from secateur.runtime.serving.engine import device_named
from secateur.tools.commands.common import Overwrite
from secateur.tools.evaluate.corpus import read_documents, token_stream
from secateur.tools.evaluate.tasks import TaskScore, read_tasks, run_tasks
from secateur.tools.evaluate.texts import ScoredText, TextReport, score_text
from secateur.tools.machine import describe_machine
from secateur.tools.plan.advice import warn_same_text
from secateur.tools.plan.job import probe_gflops
from secateur.tools.report.console import BadInput, CommandConsole, before_work, log_to_stderr
from secateur.tools.report.evaluation import draw_evaluation, evaluation_tables
from secateur.tools.report.units import format_bytes, format_count, format_duration

DTYPES = ("auto", "float32", "bfloat16", "float16")


def evaluate_command(
    models: Annotated[
        list[str], typer.Argument(help="Model folders or Hugging Face ids, compared in one table.")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Held-out text: .jsonl, .json, .csv or .parquet with a field text, or plain text."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The model that all are compared with: KL, agreement.")
    ] = None,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens of a window, beginning token included.")
    ] = 1024,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows (default: no overlap).")
    ] = None,
    bos: Annotated[
        str, typer.Option(help="Before every window: auto (like the tokenizer), none, or an id.")
    ] = "auto",
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Only so many tokens of the text.")
    ] = None,
    tasks: Annotated[
        list[Path] | None, typer.Option(help="lm-eval task files (.yaml), or folders of them.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many items of each task.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Items of a task that run at once.")] = 8,
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the resampling behind the intervals.")] = 0,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the text's results: .png or .svg.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be measured, and how long.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell choices and refusals.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Perplexity, distance from a reference model, and tasks, with intervals: one table for several
    models."""
    log_to_stderr(verbose)
    voice = CommandConsole(as_json)
    with before_work():
        where = torch.device(device_named(device))
        check_request(text, tasks, dtype, picture)
        if picture is not None:
            check_files(
                [picture],
                overwrite=overwrite,
                inputs=[*models, reference, *(text or ()), *(tasks or ())],
            )
        names = name_models(models, reference)
        wanted_tasks = list[JSON]()
        if tasks:
            wanted_tasks = read_tasks(tasks)
        documents = list[str]()
        if text:
            documents = read_documents(text)
        opened: dict[str, PreTrainedModel] = {}
        tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        for name, path in names.items():
            opened[name] = open_one(path, voice, where, dtype, weights=not dry_run)
        for name, path in names.items():
            tokenizers[name] = tokenizer_beside(path, opened[name])
        what = None
        if documents:
            start = shared_decoder_start(opened)
            what = tokenize_shared(documents, tokenizers, tokens, window, stride, bos, start)
        windows = 0
        if what is not None:
            windows = len(what.window_spans())
    for name, path in names.items():
        if (known := warn_same_text(read_history(path), documents)) is not None:
            voice.note(f"warning: {name}: {known.says} ({known.source})")
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in opened.items()}
    if dry_run:
        task_names = [task["task"] for task in wanted_tasks]
        voice.result(*plan_evaluation(opened, sizes, what, windows, task_names))
        return
    against = None
    for name, path in names.items():
        if against is None and path == reference:
            against = name
    report = None
    if what is not None:
        report = score_text(opened, what, reference=against, seed=seed, progress=voice.progress)
    scored: dict[str, list[TaskScore]] = {}
    if wanted_tasks:
        first = next(iter(tokenizers.values()))
        scored = run_tasks(
            opened,
            first,
            wanted_tasks,
            reference=against,
            limit=limit,
            batch=batch,
            seed=seed,
            note=voice.note,
        )
    if picture is not None and report is not None:
        with new_file(picture, overwrite=overwrite) as part:
            draw_evaluation(report, part)
        voice.note(f"picture written: {picture}")
    voice.result(to_json(names, sizes, report, scored), evaluation_tables(sizes, report, scored))


def check_request(
    text: Sequence[Path] | None, tasks: Sequence[Path] | None, dtype: str, picture: Path | None
) -> None:
    """What can be known to be wrong before a model is opened."""
    if not text and not tasks:
        raise BadInput(
            "say what to measure: --text FILE (perplexity, KL) or --tasks FILE.yaml, or both"
        )
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    if picture is not None and (not text or picture.suffix.lower() not in (".png", ".svg")):
        raise BadInput("--picture FILE.png or FILE.svg draws the results of --text")


def name_models(models: Sequence[str], reference: str | None) -> dict[str, str]:
    """A short name for each model, the reference first where it is none of them."""
    paths = list(dict.fromkeys(models))
    if reference is not None and reference not in models:
        paths.insert(0, reference)
    short = [Path(path).name or path for path in paths]
    names: dict[str, str] = {}
    for name, path in zip(short, paths, strict=True):
        if short.count(name) == 1:
            names[name] = path
        else:
            names[path] = path
    return names


def read_history(model: str) -> JSON:
    """What a model's manifest tells of how it was made; nothing for models of other origin."""
    if (Path(model) / MANIFEST).is_file():
        return read_manifest(model).figures
    return {}


def open_one(
    model: str, voice: CommandConsole, where: torch.device, dtype: str, *, weights: bool
) -> PreTrainedModel:
    """A model on its device, or its shapes alone."""
    with voice.waiting(f"opening {model}"):
        opened: Any = open_with_branches(model, weights=weights, dtype=dtype)
        if weights:
            opened = opened.to(where)
    if not opened.can_generate():
        raise BadInput(
            f"{model} is a {type(opened).__name__}: perplexity and tasks need a causal "
            "language model"
        )
    ready: PreTrainedModel = opened.eval()
    return ready


def tokenizer_beside(model: str, opened: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    if Path(model).is_dir():
        folder = str(checkpoint_in(Path(model)))
    else:
        folder = str(getattr(opened, "name_or_path", model))
    tokenizer: PreTrainedTokenizerBase = open_tokenizer(folder, BadInput)
    return tokenizer


def tokenize_shared(
    documents: list[str],
    tokenizers: dict[str, PreTrainedTokenizerBase],
    tokens: int | None,
    window: int,
    stride: int | None,
    bos: str,
    start: int | None,
) -> ScoredText:
    """The text in tokens, which must be the same for all models.

    Raises:
        BadInput: two models cut the text into other tokens, or --bos is no id.
    """
    streams: dict[str, torch.Tensor] = {}
    for name, tokenizer in tokenizers.items():
        streams[name] = token_stream(documents, tokenizer, tokens=tokens)[0]
    first = next(iter(streams))
    stream = streams[first]
    for name, other in streams.items():
        if not torch.equal(stream, other):
            raise BadInput(
                f"{first} and {name} cut the text into other tokens: evaluate them one at a time"
            )
    tokenizer = tokenizers[first]
    return ScoredText(
        stream, tokenizer.eos_token_id, window, stride, choose_beginning(bos, tokenizer), start
    )


def shared_decoder_start(opened: dict[str, PreTrainedModel]) -> int | None:
    """The first token of the decoders, or None where the models have no encoder.

    Raises:
        BadInput: models of both kinds.
    """
    starts: dict[str, int | None] = {}
    for name, model in opened.items():
        starts[name] = None
        if getattr(model.config, "is_encoder_decoder", False):
            starts[name] = decoder_start(model.config)
    if len(set(starts.values())) > 1:
        listed = ", ".join(f"{name}: {start}" for name, start in starts.items())
        raise BadInput(
            f"the decoders do not begin with the same token ({listed}): evaluate models of one kind"
        )
    return next(iter(starts.values()))


def choose_beginning(bos: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id before every window, or None."""
    if bos == "auto":
        return beginning_token(tokenizer)
    if bos == "none":
        return None
    if not bos.isdecimal():
        raise BadInput(f"--bos {bos!r}: expected auto, none or a token id")
    return int(bos)


def plan_evaluation(
    opened: dict[str, PreTrainedModel],
    sizes: dict[str, int],
    text: ScoredText | None,
    windows: int,
    tasks: list[str],
) -> tuple[JSON, list[str]]:
    """What would be measured, as JSON and as lines."""
    weight_bytes = 0
    for model in opened.values():
        weight_bytes += sum(p.numel() * p.element_size() for p in model.parameters())
    fed = 0
    if text is not None:
        fed = windows * text.window
    seconds = 2 * sum(sizes.values()) * fed / (probe_gflops() * 1e9 / 2)
    facts = {
        "parameters": sizes,
        "weight_bytes": weight_bytes,
        "windows": windows,
        "tokens": fed,
        "tasks": tasks,
    }
    lines = [f"{name}: {format_count(size)} parameters" for name, size in sizes.items()]
    lines.append(f"weights of all models at once: {format_bytes(weight_bytes)}")
    if text is not None:
        lines.append(
            f"text: {fed:,} tokens in {windows} windows of {text.window}, about "
            f"{format_duration(seconds)}"
        )
    if tasks:
        lines.append(f"tasks: {', '.join(tasks)}")
    return {**facts, "text_seconds": seconds}, lines


def to_json(
    names: dict[str, str],
    sizes: dict[str, int],
    text: TextReport | None,
    tasks: dict[str, list[TaskScore]],
) -> JSON:
    """What ``evaluate --json`` tells."""
    text_values = None
    if text is not None:
        text_values = text.to_json()
    scores_by_model: JSON = {}
    for name, scores in tasks.items():
        scores_by_model[name] = [asdict(score) for score in scores]
    return {
        "models": {name: {"path": path, "parameters": sizes[name]} for name, path in names.items()},
        "text": text_values,
        "tasks": scores_by_model,
        "machine": describe_machine(),
    }
