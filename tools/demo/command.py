"""The command ``secateur demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.runtime.save.artifact import check_target
from secateur.runtime.save.target import check_files
from secateur.tools.commands.common import Overwrite
from secateur.tools.demo import assets, report
from secateur.tools.demo.compare import FULL, MODEL, SHORT, compare_models
from secateur.tools.report.console import CommandConsole, before_work, log_to_stderr


def demo_command(
    short: Annotated[
        bool, typer.Option("--short", help="A check of two minutes, not a measurement.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path(
        "demo-out"
    ),
    overwrite: Overwrite = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of fetched files (default .cache/secateur).")
    ] = None,
    fetch_only: Annotated[
        bool, typer.Option("--fetch-only", help="Fetch the model and the text, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Compress a real model (SmolLM2-135M-Instruct) and measure it before and after."""
    log_to_stderr(verbose=False)
    voice = CommandConsole(as_json)
    folder = cache or assets.default_cache()
    if not fetch_only:
        with before_work():
            check_files(
                [output / name for name in report.FILES], overwrite=overwrite, inputs=[folder]
            )
            check_target(output / MODEL, overwrite=overwrite, inputs=[folder])
    with voice.waiting("fetching and converting the model and the text (once)"):
        assets.fetch_assets(folder)
        original = assets.make_checkpoint(folder)
    voice.note(f"model and text ready in {folder}")
    if fetch_only:
        return
    if short:
        size = SHORT
    else:
        size = FULL
    texts = assets.load_text(folder)
    comparison = compare_models(size, original, texts, output, voice.progress, overwrite=overwrite)
    paths = report.write_report(comparison, output, overwrite=overwrite)
    voice.result(report.to_json(comparison), report.for_a_terminal(comparison))
    voice.note(f"written: {comparison.saved_to} and {', '.join(map(str, paths))}")
