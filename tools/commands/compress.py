"""The command ``secateur compress``."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.graph import Program, SecateurError
from secateur.passes import DataSpec, Hooks, Pass, Pipeline, samples
from secateur.passes.training.plan import TrainingPass
from secateur.runtime import (
    UnsupportedConfigError,
    check_target,
    hold_work_folder,
    plan_config,
    save,
    to_transformers,
)
from secateur.runtime.resume.folder import RUN, is_at_work
from secateur.runtime.save.disk import free_bytes
from secateur.runtime.save.target import inputs_of
from secateur.tools.commands import common as opening
from secateur.tools.commands.calibration_text import choose_data, parse_sources, read_windows
from secateur.tools.commands.common import Debug, Force, Json, ModelArgument, Overwrite, Verbose
from secateur.tools.evaluate.corpus import (
    TokenWindows,
)
from secateur.tools.plan.footprint import measure_footprint
from secateur.tools.plan.plan import Plan, make_plan
from secateur.tools.report import plan_tables, run_tables
from secateur.tools.report.console import BadInput, CommandConsole, before_work
from secateur.tools.report.search import search_tables
from secateur.tools.report.units import format_bytes

REFUSED = 3
"""Exit code of a dry run where the run would be refused."""
NOTHING_DONE = "Nothing was done"
MISFIT_HINT = (
    f"{NOTHING_DONE}. round_to={{hidden=8}} rounds the units kept of a family to a "
    "multiple, such as of the heads"
)


def compress_command(
    model: ModelArgument,
    pipeline: Annotated[
        str | None, typer.Option("--pipeline", "-p", help='"score,prune-width{mlp=0.25}"')
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Instead of a pipeline: a recipe's name (see `secateur recipes`) or YAML file."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the result.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SHARE]",
            help="Calibration text: .jsonl, .json, .csv or .parquet with a document a row (chat "
            "rows go through the chat template), or plain text, documents apart by two empty "
            "lines. Several files share the tokens by weight: --data a.jsonl:2 --data b.jsonl:1.",
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(help="Key or column of the text in rows of --data (default: text)."),
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Text to retrain on, where a pass does not name its own.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Calibration tokens in all (default 10240).")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens in one sequence (default 256).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="What all randomness derives from (default 0).")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only tell what would come out and what it takes; exit code 3 where the run "
            "would be refused.",
        ),
    ] = False,
    as_json: Json = False,
    add_biases: Annotated[
        bool,
        typer.Option(
            "--add-biases",
            help="Open with zero biases where the class can have some, for compensate.",
        ),
    ] = False,
    print_after: Annotated[
        list[str] | None, typer.Option(help="Print the graph after this pass (stderr).")
    ] = None,
    time_passes: Annotated[
        bool, typer.Option("--time-passes", help="Tell the seconds of each pass (stderr).")
    ] = False,
    stop_after: Annotated[
        str | None, typer.Option(help="End after this pass and save what there is.")
    ] = None,
    packed: Annotated[
        bool,
        typer.Option(help="Keep packed 2:4 weights beside the checkpoint, where there are any."),
    ] = True,
    overwrite: Overwrite = False,
    force: Force = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what a killed run kept, and begin again.")
    ] = False,
    keep_work: Annotated[
        bool,
        typer.Option("--keep-work", help="Keep the run's state, so that passes can be appended."),
    ] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run a pipeline of passes on a model and write a stock checkpoint.

    A run that was killed goes on where it was when the same command is given again.
    """
    voice = opening.start_command(as_json, verbose)
    with before_work():
        opening.refuse_force(force)
        passes = set_training_text(read_pipeline(pipeline, recipe), train)
        spec = choose_data(passes.data, recipe, data, field, tokens, window)
        texts = [source.path for source in parse_sources(spec)]
        inputs = [model, *texts, recipe, *passes.files, *inputs_of(passes)]
        check_request(passes, spec, output, inputs, dry_run=dry_run, overwrite=overwrite)
    if data and not passes.needs_data:
        voice.note(f"{', '.join(data)} is not used: no pass of this pipeline needs data")
    began = time.perf_counter()
    if add_biases:
        biases = {"biases": True}
    else:
        biases = {}
    program = opening.open_program(model, voice, weights=not dry_run, **biases)
    with before_work():
        hooks = Hooks(frozenset(print_after or ()), time_passes, stop_after, voice.note)
        passes = replace(passes, seed=passes.seed if seed is None else seed, hooks=hooks)
        refuse_if(passes.requires(program))
        plan = make_plan(
            program,
            passes,
            plan_config,
            tokens=spec.tokens,
            window=spec.window,
            capture_seconds=time.perf_counter() - began,
            disk_free=None if output is None else free_bytes(nearest_existing(output)),
        )
        windows, calibration, faults = read_texts(program, passes, spec, dry_run=dry_run)
        plan = replace(plan, refused=(*plan.refused, *passes.explain_packages(), *faults))
        if dry_run:
            voice.result(plan.to_json(), plan_tables(plan))
            if plan.refused:
                raise typer.Exit(REFUSED)
            return
        for one in plan.advice:
            voice.note(f"warning: {one.name}: {one.says} ({one.source})")
        for warning in plan.warnings:
            voice.note(f"warning: {warning}")
        refuse_plan(plan)
        if plan.depends:
            voice.note(f"warning: {plan.depends}")
        refuse_if(_try_stock_class(program, passes, plan, voice) if plan.doubt else [])
        assert output is not None
    with ExitStack() as held:
        with before_work():
            data_read = None
            if windows is not None:
                data_read = samples(windows, program)
            kept = hold_work_folder(
                output,
                program,
                passes,
                data_read,
                passes.seed,
                restart=restart,
                keep_work=keep_work,
                tell=voice.note,
            )
            work = held.enter_context(kept)
            overwrite = overwrite or work.made(output)
            check_target(output, overwrite=overwrite, inputs=[*inputs, program.source.folder])
        smaller = passes.run(
            program, windows, voice.progress, raise_model=to_transformers, checkpoints=work
        )
        with voice.waiting("saving, and opening the result in a fresh process"):
            figures = {"calibration": calibration, RUN: work.run}
            saved = save(smaller, output, overwrite=overwrite, packed=packed, figures=figures)
    after = measure_footprint(smaller)
    tables = [*run_tables(program, smaller, plan.before, after), *search_tables(smaller)]
    voice.result(result_json(plan, smaller, after, windows, output, saved), tables)
    voice.note(f"written: {output}")
    if saved.packed:
        sizes = [format_bytes(saved.packed[name]) for name in ("bytes", "dense_bytes")]
        voice.note(
            f"packed weights beside it: {sizes[0]} for {sizes[1]} (--no-packed leaves them out)"
        )


def refuse_plan(plan: Plan) -> None:
    """Stop before any work where the plan says that the run cannot end well.

    Raises:
        BadInput: with every reason, and what would help.
    """
    if plan.misfit and plan.offers:
        hint = f" {plan.offers} {NOTHING_DONE}"
    elif plan.misfit and plan.rounding_helps:
        hint = f" {MISFIT_HINT}"
    else:
        hint = f" {NOTHING_DONE}"
    refuse_if([f"{'; '.join(plan.refused)}.{hint}"] if plan.refused else [])


def _try_stock_class(
    program: Program, passes: Pipeline, plan: Plan, voice: CommandConsole
) -> list[str]:
    """Why the stock class computes something else than a program of the planned shape, if it
    does."""
    with voice.waiting("comparing the stock class of this shape with what it has to compute"):
        try:
            to_transformers(passes.preview(program))
        except UnsupportedConfigError as error:
            return [" ".join(filter(None, [f"{error}.", plan.offers, "Nothing was done."]))]
    return []


def read_pipeline(text: str | None, recipe: str | None) -> Pipeline:
    """The pipeline from exactly one of text and recipe."""
    if (text is None) == (recipe is None):
        raise BadInput(
            "say what to do, once: -p 'score,prune-width{mlp=0.25}' or --recipe NAME or FILE"
        )
    if recipe is not None:
        return Pipeline.from_recipe(recipe)
    return Pipeline.parse(text or "")


def set_training_text(passes: Pipeline, file: Path | None) -> Pipeline:
    """The pipeline whose training passes read a file, where they do not name one themselves."""
    if file is None:
        return passes
    if not file.is_file():
        raise BadInput(f"the training text {file} is no file")
    named = tuple(_set_text_file(one, file) for one in passes.passes)
    if named == passes.passes:
        raise BadInput(
            f"{file} would not be used: no pass of this pipeline trains on a text that it does "
            "not name"
        )
    return replace(passes, passes=named)


def _set_text_file(one: Pass, file: Path) -> Pass:
    if isinstance(one, TrainingPass) and one.data is None:
        return replace(one, data=str(file))
    return one


def check_request(
    passes: Pipeline,
    spec: DataSpec,
    output: Path | None,
    inputs: Sequence[str | Path | None],
    *,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """What can be known to be wrong before the model is opened."""
    if spec.window > spec.tokens:
        raise BadInput(
            f"--window {spec.window} is longer than --tokens {spec.tokens}: no sequence fits"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("compress runs in one process: start it without torchrun")
    if passes.needs_data:
        refuse_if(passes.explain_sequences(spec.tokens // spec.window))
    if dry_run:
        return
    if output is None:
        raise BadInput("say where the result goes: -o DIR (or --dry-run to only look)")
    check_target(output, overwrite=overwrite or is_at_work(output), inputs=inputs)
    check_writable(output)
    if passes.needs_data and spec.file is None:
        raise BadInput(
            f"{passes.to_text()} needs calibration text: --data FILE (.jsonl, .json, .csv, "
            ".parquet or plain text)"
        )


def check_writable(output: Path) -> None:
    """Whether something can be made where the output will stand; leaves nothing behind, not even
    when killed."""
    parent = nearest_existing(output)
    try:
        tempfile.TemporaryFile(dir=parent).close()  # without a name
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(
            f"{output} cannot be written: {reason} in {parent}; choose another -o"
        ) from error


def nearest_existing(output: Path) -> Path:
    """The nearest folder above an output that exists."""
    return next(
        parent for parent in output.expanduser().absolute().resolve().parents if parent.exists()
    )


def refuse_if(reasons: list[str]) -> None:
    """Stop before any work if there is a reason to."""
    if reasons:
        raise BadInput("; ".join(reasons))


def read_texts(
    program: Program, passes: Pipeline, spec: DataSpec, *, dry_run: bool
) -> tuple[TokenWindows | None, dict[str, Any] | None, list[str]]:
    """Calibration windows, what the manifest will say of them, and what is wrong with the texts.

    Args:
        dry_run: texts that are not named are not missed, and no windows are kept.
    """
    faults = []
    windows = None
    calibration = None
    if passes.needs_data and (spec.file is not None or not dry_run):
        try:
            windows, calibration = read_windows(program, spec, passes.seed)
            faults += passes.explain_sequences(len(windows))
        except SecateurError as error:
            faults.append(str(error))
    for one in passes.passes:
        if isinstance(one, TrainingPass):
            try:
                one.check_text(program, passes.seed)
            except SecateurError as error:
                faults.append(f"{one.name}: {error}")
    return windows, calibration, faults


def result_json(
    plan: Plan, smaller: Program, after: Any, windows: TokenWindows | None, output: Path, saved: Any
) -> dict[str, Any]:
    """What ``compress --json`` tells."""
    return {
        "output": str(output),
        "pipeline": plan.pipeline,
        "advice": [asdict(one) for one in plan.advice],
        "before": plan.before.to_json(),
        "after": after.to_json(),
        "data": None if windows is None else windows.describe(),
        "history": [asdict(step) for step in smaller.history],
        "check": saved.to_json() if hasattr(saved, "to_json") else asdict(saved),
    }
