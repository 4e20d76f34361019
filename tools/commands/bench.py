"""The command ``secateur bench``."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer

from secateur.graph.program import JSON
from secateur.passes.lowering.cost import (
    Timing,
    keep_timings,
    read_timings,
    stream_bandwidth,
    weight_bytes,
)
from secateur.passes.lowering.lower import DTYPES
from secateur.runtime.open.checkpoint import read_json
from secateur.runtime.packed.store import has_packed
from secateur.runtime.save.branches import checkpoint_in
from secateur.runtime.save.target import check_files, new_file
from secateur.tools.bench.kernels import FORMS, KernelRow, bench_kernels, timings_of
from secateur.tools.bench.models import BenchCandidate, ModelRow, bench_model, list_candidates
from secateur.tools.bench.variants import RECIPES, make_variants
from secateur.tools.commands import common as opening
from secateur.tools.commands.common import Debug, Json, Overwrite, Verbose
from secateur.tools.machine import describe_machine
from secateur.tools.report.bench import bench_tables, draw_bench, to_json, to_markdown
from secateur.tools.report.console import BadInput, CommandConsole, before_work
from secateur.tools.report.units import format_duration

FILES = ("speed.json", "speed.md", "speed.png")
DEFAULT_SHAPES = "4096x4096,11008x4096"
WORK = Path(".cache/secateur/bench")
COMPILE_SECONDS = 150
VARIANT_SECONDS = 60


def bench_command(
    models: Annotated[
        list[Path] | None,
        typer.Argument(help="Model folders to compare whole; none: single products only."),
    ] = None,
    variants: Annotated[
        str,
        typer.Option(
            help=f"Made from the first model, by magnitude, for timing only: {', '.join(RECIPES)}."
        ),
    ] = "",
    shapes: Annotated[
        str, typer.Option(help="Weights [N x K] for single products; none skips them.")
    ] = DEFAULT_SHAPES,
    batch: Annotated[
        str, typer.Option(help="Rows of the single products; the first is also the models' batch.")
    ] = "1",
    dtype: Annotated[str, typer.Option(help="Of dense models.")] = "float32,bfloat16",
    packed_dtype: Annotated[
        str, typer.Option(help="That variants on packed weights compute in.")
    ] = "bfloat16",
    head: Annotated[
        str, typer.Option(help="Of variants: dense, auto or int8; see the pass lower.")
    ] = "dense",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also every model compiled ahead of time.")
    ] = False,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    rounds: Annotated[
        int, typer.Option(min=1, help="Counted rounds; in each, all take turns.")
    ] = 11,
    work: Annotated[
        Path, typer.Option(help="Folder of variants and compiled packages, kept.")
    ] = WORK,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of speed.json, speed.md, speed.png."),
    ] = None,
    overwrite: Overwrite = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Let the pass lower use these times on this machine.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be timed, and how long.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Time products and whole models in turns: dense (strongest of torch), quantized, 2:4, pruned;
    checked first."""
    voice = opening.start_command(as_json, verbose)
    if not device:
        device = "cpu"
        if torch.cuda.is_available():
            device = "cuda"
    where = torch.device(device)
    with before_work():
        sizes = read_shapes(shapes)
        batches = read_ints(batch, "--batch")
        wanted = read_names(variants, RECIPES, "--variants")
        dtypes = read_names(dtype, DTYPES, "--dtype")
        folders = check_models(models or [], wanted)
        read_names(packed_dtype, DTYPES, "--packed-dtype")
        if output is not None and not dry_run:
            check_files([output / name for name in FILES], overwrite=overwrite, inputs=models or [])
    if dry_run:
        voice.result(
            *plan_bench(
                folders, wanted, sizes, batches, dtypes, compiled, rounds, new_tokens, where
            )
        )
        return
    with voice.waiting("measuring the memory bandwidth"):
        bandwidth = stream_bandwidth(where)
    facts = machine_facts(where, bandwidth, rounds, prompt_tokens, new_tokens)
    kernels = bench_kernels(
        sizes, batches, where, bandwidth, rounds=rounds, progress=voice.progress
    )
    measured: list[ModelRow] = []
    if folders:
        work.mkdir(parents=True, exist_ok=True)
        first = next(iter(folders.values()))
        with voice.waiting("making variants"):
            folders |= make_variants(first, wanted, work, packed_dtype, head, voice.note)
        lowered = {name: has_packed(folder) for name, folder in folders.items()}
        measured = bench_model(
            list_candidates(folders, lowered, dtypes, compiled),
            prompt_for(folders, batches[0], prompt_tokens, where),
            bandwidth,
            new_tokens=new_tokens,
            rounds=rounds,
            work=work,
            progress=voice.progress,
            tell=voice.note,
        )
    if keep:
        voice.note(f"kept for the pass lower: {keep_timings(merge_timings(kernels))}")
    write_report(voice, facts, kernels, measured, output, overwrite=overwrite)


def write_report(
    voice: CommandConsole,
    facts: JSON,
    kernels: list[KernelRow],
    models: list[ModelRow],
    output: Path | None,
    *,
    overwrite: bool = False,
) -> None:
    """Tables, or JSON, and the files."""
    if output is not None:
        texts = (
            json.dumps(to_json(facts, kernels, models), indent=1) + "\n",
            to_markdown(facts, kernels, models),
        )
        for name, text in zip(FILES, texts, strict=False):
            with new_file(output / name, overwrite=overwrite) as part:
                part.write_text(text, "utf-8")
        with new_file(output / FILES[2], overwrite=overwrite) as part:
            draw_bench(kernels, models, part)
        voice.note(f"written: {output / FILES[0]}, {FILES[1]}, {FILES[2]}")
    voice.result(to_json(facts, kernels, models), bench_tables(kernels, models))
    for kernel in kernels:
        if kernel.fault:
            product = f"{kernel.form} {kernel.shape} B{kernel.batch}"
            voice.note(f"not timed: {product}: {kernel.fault}")
    for model in models:
        if model.fault:
            voice.note(f"not timed: {model.name}: {model.fault}")


def merge_timings(rows: list[KernelRow]) -> list[Timing]:
    """New timings, and those kept before of products that were not timed now."""
    timings = timings_of(rows)
    products = {_timed_product(timing) for timing in timings}
    for timing in read_timings():
        if _timed_product(timing) not in products:
            timings.append(timing)
    return timings


def _timed_product(timing: Timing) -> tuple[str, int, int, int, str]:
    return (timing.kind, timing.n, timing.k, timing.batch, timing.dtype)


def machine_facts(
    where: torch.device, bandwidth: float, rounds: int, prompt: int, new: int
) -> JSON:
    """What the numbers were measured on, and how."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "device": str(where),
        "stream_gb_per_s": round(bandwidth / 1e9, 2),
        "protocol": f"{rounds} rounds after one that warms up, all in turns; weights cycled past "
        "the caches; "
        f"medians and the middle 80 %; models: {prompt} prompt tokens, {new} new ones",
    }


def prompt_for(
    folders: dict[str, Path], batch: int, tokens: int, where: torch.device
) -> torch.Tensor:
    """[batch, tokens] ids that every model has."""
    configs = [read_json(checkpoint_in(folder) / "config.json") for folder in folders.values()]
    below = min(config.get("vocab_size", 256) for config in configs)
    draws = torch.Generator().manual_seed(0)
    return torch.randint(0, below, (batch, tokens), generator=draws).to(where)


def read_shapes(text: str) -> list[tuple[int, int]]:
    """``4096x4096,11008x4096`` as pairs; ``none`` as none.

    Raises:
        BadInput: something else.
    """
    try:
        pairs = []
        for shape in text.split(","):
            if text != "none":
                pairs.append(tuple(int(size) for size in shape.split("x")))
        if any(len(pair) != 2 or min(pair) < 8 for pair in pairs):
            raise ValueError
    except ValueError:
        raise BadInput(
            f"--shapes {text!r}: expected pairs of at least 8, like {DEFAULT_SHAPES}, or none"
        ) from None
    return [(pair[0], pair[1]) for pair in pairs]


def read_ints(text: str, option: str) -> list[int]:
    """``1,4,16``.

    Raises:
        BadInput: something else.
    """
    try:
        numbers = [int(number) for number in text.split(",")]
        if min(numbers) < 1:
            raise ValueError
    except ValueError:
        raise BadInput(f"{option} {text!r}: expected numbers from 1, like 1,4,16") from None
    return numbers


def read_names(text: str, known: Collection[str], option: str) -> list[str]:
    """Names of a closed set, separated by commas.

    Raises:
        BadInput: an unknown one.
    """
    names = []
    for part in text.split(","):
        if part.strip():
            names.append(part.strip())
    for name in names:
        if name not in known:
            raise BadInput(f"{option}: {name!r} is unknown; known: {', '.join(known)}")
    return names


def check_models(models: list[Path], variants: list[str]) -> dict[str, Path]:
    """Model folders by a short name.

    Raises:
        BadInput: no checkpoint there, or variants of nothing.
    """
    if variants and not models:
        raise BadInput("--variants are made from a model: give its folder")
    for folder in models:
        if not (checkpoint_in(folder) / "config.json").is_file():
            raise BadInput(f"{folder} holds no model (config.json)")
    names = [folder.name for folder in models]
    by_name: dict[str, Path] = {}
    for folder in models:
        name = folder.name
        if names.count(name) > 1:
            name = str(folder)
        by_name[name] = folder
    return by_name


def plan_bench(
    folders: dict[str, Path],
    variants: list[str],
    shapes: list[tuple[int, int]],
    batches: list[int],
    dtypes: list[str],
    compiled: bool,
    rounds: int,
    new_tokens: int,
    where: torch.device,
) -> tuple[JSON, list[str]]:
    """What would be timed and roughly how long, as JSON and as lines."""
    bandwidth = stream_bandwidth(where)
    forms = [form.name for form in FORMS[where.type]]
    seconds = 0.0
    for n, k in shapes:
        read_bytes = max(weight_bytes("dense", n, k, torch.float32), 128 << 20)
        seconds += 4 * read_bytes / bandwidth
    seconds = seconds * len(forms) * len(batches) * (rounds + 1)
    places = dict(folders)
    lowered = {name: has_packed(folder) for name, folder in folders.items()}
    for variant in variants:
        places[variant] = Path(variant)
        lowered[variant] = variant != "pruned"
    chosen: list[BenchCandidate] = []
    if folders:
        chosen = list_candidates(places, lowered, dtypes, compiled)
    largest = max(map(_stored_bytes, folders.values()), default=0)
    seconds += len(chosen) * (rounds + 3) * new_tokens * 3 * largest / bandwidth
    seconds += COMPILE_SECONDS * sum(candidate.compiled for candidate in chosen)
    seconds += VARIANT_SECONDS * len(variants)
    facts = {
        "forms": forms,
        "shapes": [list(shape) for shape in shapes],
        "batches": batches,
        "models": [candidate.name for candidate in chosen],
        "seconds": round(seconds),
    }
    lines = []
    for name, value in facts.items():
        if name != "seconds":
            lines.append(f"{name}: {value}")
    return facts, [*lines, f"roughly {format_duration(seconds)} on a quiet machine"]


def _stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
