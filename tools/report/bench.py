"""Measurements for people: tables, a page, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from secateur.tools.bench.kernels import KernelRow
from secateur.tools.bench.models import ModelRow
from secateur.tools.bench.timing import Spread
from secateur.tools.report.picture import save_figure
from secateur.tools.report.units import format_bytes

OURS, THEIRS = "#2f7f4f", "#8a8a8a"
Cells = list[list[str]]
KERNEL_HEAD = [
    "shape",
    "rows",
    "form",
    "us [middle 80 %]",
    "of stream",
    "x torch fp32",
    "x torch bf16",
    "kernel",
]
MODEL_HEAD = [
    "model",
    "runs",
    "prefill tokens/s",
    "decode tokens/s [middle 80 %]",
    "of stream",
    "weights",
    "linear layers of dense bf16",
    "tokens like dense-shaped",
]


def kernel_cells(rows: Sequence[KernelRow]) -> Cells:
    """One row of cells for each measurement."""
    return [
        [
            f"{row.shape[0]}x{row.shape[1]}",
            str(row.batch),
            row.form,
            _span_text(row.seconds, 1e6) if row.seconds else row.fault,
            f"{row.share:.0%}" if row.share is not None else "",
            *(_ratio_text(rows, row, base) for base in ("torch fp32", "torch bf16")),
            row.backend,
        ]
        for row in rows
    ]


def model_cells(rows: Sequence[ModelRow]) -> Cells:
    """One row of cells for each model."""
    return [
        [
            row.name,
            row.engine,
            f"{row.prefill.median:.0f}" if row.prefill else row.fault,
            _span_text(row.decode, 1.0) if row.decode else "",
            f"{row.share:.0%}" if row.share is not None else "",
            format_bytes(row.weight_bytes),
            f"{row.body_bytes / row.dense_bytes:.4f}" if row.dense_bytes else "",
            row.tokens_equal,
        ]
        for row in rows
    ]


def bench_tables(kernels: Sequence[KernelRow], models: Sequence[ModelRow]) -> list[Table]:
    """What was measured, for a terminal."""
    found = []
    if kernels:
        found.append(_make_table("one product", KERNEL_HEAD, kernel_cells(kernels)))
    if models:
        found.append(_make_table("whole models", MODEL_HEAD, model_cells(models)))
    return found


def to_markdown(
    facts: dict[str, Any], kernels: Sequence[KernelRow], models: Sequence[ModelRow]
) -> str:
    """What was measured, for a page, with the machine and the protocol."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    for title, head, cells in (
        ("One product", KERNEL_HEAD, kernel_cells(kernels)),
        ("Whole models", MODEL_HEAD, model_cells(models)),
    ):
        if cells:
            body = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]
            lines += ["", f"## {title}", "", *body]
    return "\n".join(["# Speed", "", *lines, ""])


def to_json(
    facts: dict[str, Any], kernels: Sequence[KernelRow], models: Sequence[ModelRow]
) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        **facts,
        "kernels": [asdict(row) for row in kernels],
        "models": [asdict(row) for row in models],
    }


def draw_bench(kernels: Sequence[KernelRow], models: Sequence[ModelRow], file: Path) -> None:
    """Bars: microseconds of each form for each shape and batch, and tokens a second of each model.

    Raises:
        SecateurError: neither .png nor .svg, or it cannot be written.
    """
    groups = list(dict.fromkeys((row.shape, row.batch) for row in kernels if row.seconds))
    panels: list[tuple[str, list[tuple[str, float]], str]] = []
    for shape, batch in groups:
        same = [r for r in kernels if (r.shape, r.batch) == (shape, batch) and r.seconds]
        bars = [(r.form, 1e6 * r.seconds.median) for r in same if r.seconds]
        panels.append((f"{shape[0]}x{shape[1]}, {batch} rows", bars, "us, shorter is better"))
    if any(row.decode for row in models):
        bars = [(row.name, row.decode.median) for row in models if row.decode]
        panels.append(("decode", bars, "tokens/s, longer is better"))
    tall = sum(0.3 * len(bars) + 0.9 for _, bars, _ in panels) or 1.0
    figure = Figure(figsize=(8, tall), layout="constrained")
    ratios = [len(bars) + 2 for _, bars, _ in panels] or [1]
    for axes, (title, bars, unit) in zip(
        figure.subplots(max(len(panels), 1), 1, squeeze=False, height_ratios=ratios)[:, 0],
        panels,
        strict=False,
    ):
        names = [name for name, _ in bars]
        values = [value for _, value in bars]
        colours = [
            OURS if name.startswith("ours") or " packed " in name else THEIRS for name in names
        ]
        drawn = axes.barh(names, values, color=colours)
        axes.bar_label(drawn, [f"{value:.4g}" for value in values], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{title}  ({unit})", fontsize=9, loc="left")
        axes.set_xlim(0, max(values) * 1.15)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, file)


def _ratio_text(rows: Sequence[KernelRow], row: KernelRow, base: str) -> str:
    same = []
    for r in rows:
        if (r.form, r.shape, r.batch) == (base, row.shape, row.batch):
            same.append(r)
    if not same or not same[0].seconds or not row.seconds:
        return ""
    return f"{same[0].seconds.median / row.seconds.median:.2f}"


def _span_text(found: Spread, scale: float) -> str:
    middle, low, high = (f"{x * scale:.1f}" for x in (found.median, found.low, found.high))
    return f"{middle} [{low}, {high}]"


def _make_table(title: str, head: Sequence[str], cells: Cells) -> Table:
    table = Table(title=title, title_justify="left")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in cells:
        table.add_row(*row)
    return table
