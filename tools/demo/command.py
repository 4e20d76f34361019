"""The command ``secateur demo``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import track

from secateur.tools.demo import assets, report
from secateur.tools.demo.compare import FULL, SHORT, compare

T = TypeVar("T")


def demo_command(
    short: Annotated[bool, typer.Option(help="A check of two minutes, not a measurement.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("demo-out"),
    cache: Annotated[Path | None, typer.Option(help="Folder of fetched files (default .cache/secateur).")] = None,
    fetch_only: Annotated[bool, typer.Option(help="Fetch and convert the model and the text, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Compress a real model (SmolLM2-135M-Instruct) and measure it before and after."""
    talk, folder = Console(stderr=True), cache or assets.default_cache()
    if fetch_only:
        assets.fetch(folder)
        talk.print(f"ready: {assets.checkpoint(folder)}")
        return

    def show(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        return track(items, description, total=total, console=talk, transient=True)

    comparison = compare(SHORT if short else FULL, folder, output, show)
    paths = report.write(comparison, output)
    if as_json:
        typer.echo(json.dumps(report.to_json(comparison), indent=2))
        return
    shown = Console()
    shown.print(report.table(comparison))
    for name, measured in (("before", comparison.before), ("after", comparison.after)):
        shown.print(f"[bold]{name}[/bold] says: {measured.answer}", highlight=False)
    took = ", ".join(f"{name} {value:.0f} s" for name, value in comparison.seconds.items())
    shown.print(f"took: {took}\nwritten: {comparison.saved_to}, {', '.join(map(str, paths))}", highlight=False)
