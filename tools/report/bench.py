"""Measurements for people: tables, a page, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from secateur.graph.program import JSON
from secateur.tools.bench.kernels import KernelRow
from secateur.tools.bench.models import ModelRow
from secateur.tools.bench.timing import Spread
from secateur.tools.report.picture import save_figure
from secateur.tools.report.units import format_bytes

OURS = "#2f7f4f"
THEIRS = "#8a8a8a"
Cells = list[list[str]]
Bars = list[tuple[str, float]]
Panel = tuple[str, Bars, str]
"""Title, bars, and the unit with which way is better."""
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
    cells: Cells = []
    for row in rows:
        time = row.fault
        if row.seconds:
            time = _span_text(row.seconds, 1e6)
        cells.append(
            [
                f"{row.shape[0]}x{row.shape[1]}",
                str(row.batch),
                row.form,
                time,
                _share_text(row.share),
                _ratio_text(rows, row, "torch fp32"),
                _ratio_text(rows, row, "torch bf16"),
                row.backend,
            ]
        )
    return cells


def _share_text(share: float | None) -> str:
    if share is None:
        return ""
    return f"{share:.0%}"


def model_cells(rows: Sequence[ModelRow]) -> Cells:
    """One row of cells for each model."""
    cells: Cells = []
    for row in rows:
        prefill = row.fault
        if row.prefill:
            prefill = f"{row.prefill.median:.0f}"
        decode = ""
        if row.decode:
            decode = _span_text(row.decode, 1.0)
        of_dense = ""
        if row.dense_bytes:
            of_dense = f"{row.body_bytes / row.dense_bytes:.4f}"
        cells.append(
            [
                row.name,
                row.engine,
                prefill,
                decode,
                _share_text(row.share),
                format_bytes(row.weight_bytes),
                of_dense,
                row.tokens_equal,
            ]
        )
    return cells


def bench_tables(kernels: Sequence[KernelRow], models: Sequence[ModelRow]) -> list[Table]:
    """What was measured, for a terminal."""
    tables = []
    if kernels:
        tables.append(_make_table("one product", KERNEL_HEAD, kernel_cells(kernels)))
    if models:
        tables.append(_make_table("whole models", MODEL_HEAD, model_cells(models)))
    return tables


def to_markdown(facts: JSON, kernels: Sequence[KernelRow], models: Sequence[ModelRow]) -> str:
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


def to_json(facts: JSON, kernels: Sequence[KernelRow], models: Sequence[ModelRow]) -> JSON:
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
    panels = _bench_panels(kernels, models)
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
        drawn = axes.barh(names, values, color=[_bar_colour(name) for name in names])
        axes.bar_label(drawn, [f"{value:.4g}" for value in values], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{title}  ({unit})", fontsize=9, loc="left")
        axes.set_xlim(0, max(values) * 1.15)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, file)


def _bench_panels(kernels: Sequence[KernelRow], models: Sequence[ModelRow]) -> list[Panel]:
    bars_of_product: dict[tuple[tuple[int, int], int], Bars] = {}
    for row in kernels:
        if row.seconds:
            bar = (row.form, 1e6 * row.seconds.median)
            bars_of_product.setdefault((row.shape, row.batch), []).append(bar)
    panels: list[Panel] = []
    for (shape, batch), bars in bars_of_product.items():
        panels.append((f"{shape[0]}x{shape[1]}, {batch} rows", bars, "us, shorter is better"))
    decode_bars = [(row.name, row.decode.median) for row in models if row.decode]
    if decode_bars:
        panels.append(("decode", decode_bars, "tokens/s, longer is better"))
    return panels


def _bar_colour(name: str) -> str:
    if name.startswith("ours") or " packed " in name:
        return OURS
    return THEIRS


def _ratio_text(rows: Sequence[KernelRow], row: KernelRow, base: str) -> str:
    """How many times faster a form is than a base on the same product; empty where unknown."""
    for other in rows:
        if (other.form, other.shape, other.batch) == (base, row.shape, row.batch):
            if not other.seconds or not row.seconds:
                return ""
            return f"{other.seconds.median / row.seconds.median:.2f}"
    return ""


def _span_text(spread: Spread, scale: float) -> str:
    low = spread.low * scale
    high = spread.high * scale
    return f"{spread.median * scale:.1f} [{low:.1f}, {high:.1f}]"


def _make_table(title: str, head: Sequence[str], cells: Cells) -> Table:
    table = Table(title=title, title_justify="left")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in cells:
        table.add_row(*row)
    return table
