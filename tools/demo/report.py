"""The demo's result for people: a table, a picture, Markdown; and for programs: JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from secateur.graph.program import JSON
from secateur.runtime.save.target import new_file
from secateur.tools.demo.compare import ANSWER_TOKENS, QUESTION, Comparison, ModelMeasures
from secateur.tools.evaluate.measures import Speed
from secateur.tools.machine import describe_machine
from secateur.tools.report import units

FILES = ("report.json", "report.md", "result.png")
BEFORE_COLOUR = "#b8b2a7"
AFTER_COLOUR = "#3f7d58"


@dataclass(frozen=True)
class TableRow:
    """One line of the table: what it is, how to get its number, how to write it, and its spread
    where it has one."""

    name: str
    value: Callable[[ModelMeasures], float]
    write: Callable[[float], str]
    spread: Callable[[ModelMeasures], str] = lambda measured: ""
    better: str = "less"


def _speed_range(speed: Speed) -> str:
    return f" [{speed.slowest:,.1f}-{speed.fastest:,.1f}]"


ROWS = (
    TableRow("parameters", lambda m: m.parameters, units.format_count),
    TableRow("bytes on disk", lambda m: m.bytes_on_disk, units.format_bytes),
    TableRow(
        "perplexity, held-out text",
        lambda m: m.perplexity.value,
        lambda v: f"{v:,.2f}",
        lambda m: f" ± {m.perplexity.value * m.perplexity.stderr:,.2f}",
    ),
    TableRow(
        "prefill, tokens/s",
        lambda m: m.prefill.tokens_per_s,
        lambda v: f"{v:,.1f}",
        lambda m: _speed_range(m.prefill),
        "more",
    ),
    TableRow(
        "decode, tokens/s",
        lambda m: m.decode.tokens_per_s,
        lambda v: f"{v:,.1f}",
        lambda m: _speed_range(m.decode),
        "more",
    ),
)


def table_cells(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """(name, before, after, change) of each row."""
    cells = []
    for row in ROWS:
        before = row.value(comparison.before)
        after = row.value(comparison.after)
        cells.append(
            (
                row.name,
                row.write(before) + row.spread(comparison.before),
                row.write(after) + row.spread(comparison.after),
                units.format_change(before, after),
            )
        )
    return cells


def protocol_notes(comparison: Comparison) -> list[str]:
    """How the numbers were measured, a line each."""
    before = comparison.before
    size = comparison.size
    calibration = comparison.calibration
    return [
        f"pipeline: {size.pipeline}",
        f"calibration: {calibration['tokens']:,} tokens, {calibration['windows']} windows of "
        f"{calibration['window_tokens']}, from documents that the evaluation does not see",
        f"perplexity: {before.perplexity.protocol}; ± one standard error",
        f"prefill: {before.prefill.protocol}; [slowest-fastest]",
        f"decode: {before.decode.protocol}; [slowest-fastest]",
    ]


def make_table(comparison: Comparison) -> Table:
    """The numbers, a row each."""
    table = Table(title="before and after")
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for row in table_cells(comparison):
        table.add_row(*row)
    return table


def for_a_terminal(comparison: Comparison) -> list[Table | str]:
    """All that is shown at the end, in order."""
    return [
        make_table(comparison),
        *map(escape, protocol_notes(comparison)),
        "",
        *list_answers(comparison),
    ]


def list_answers(comparison: Comparison) -> list[str]:
    """What each model says to the same question, a line each, and how long the whole took."""
    durations = []
    for name, seconds in comparison.seconds.items():
        durations.append(f"{name} {units.format_duration(seconds)}")
    return [
        f"asked: {QUESTION}",
        f"before: {escape(comparison.before.answer)}",
        f"after: {escape(comparison.after.answer)}",
        f"took: {', '.join(durations)}",
    ]


def to_markdown(comparison: Comparison) -> str:
    """The result for a page."""
    rows = [
        ("", "before", "after", "change"),
        ("---", "---:", "---:", "---:"),
        *table_cells(comparison),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    answers = [
        f"> **before**: {comparison.before.answer}\n",
        f"> **after**: {comparison.after.answer}\n",
    ]
    asked = f"Asked (chat template, greedy, at most {ANSWER_TOKENS} tokens): {QUESTION}"
    notes = [f"- {note}" for note in protocol_notes(comparison)]
    return "\n".join([*lines, "", *notes, "", asked, "", *answers])


def to_json(comparison: Comparison) -> JSON:
    """Everything, with the machine and the day."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": day, "machine": describe_machine(), **dataclasses.asdict(comparison)}


def draw_picture(comparison: Comparison, path: Path) -> None:
    """Bars of each row, before and after, into an image file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(1, len(ROWS)), ROWS, strict=True):
        values = [row.value(m) for m in (comparison.before, comparison.after)]
        bars = axes.bar(["before", "after"], values, color=[BEFORE_COLOUR, AFTER_COLOUR], width=0.7)
        axes.bar_label(bars, [row.write(value) for value in values], padding=2, fontsize=8)
        axes.set_title(f"{row.name}\n({row.better} is better)", fontsize=9)
        axes.set_ylim(0, max(values) * 1.15)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=160)


def write_report(comparison: Comparison, output: Path, *, overwrite: bool = False) -> list[Path]:
    """Write the files of a report.

    Args:
        comparison: what they tell.
        output: their folder, made when missing.
        overwrite: replace files of those names.

    Returns:
        The paths of the files, as ``FILES`` names them.
    """
    paths = [output / name for name in FILES]
    texts = (json.dumps(to_json(comparison), indent=2) + "\n", to_markdown(comparison))
    for path, text in zip(paths, texts, strict=False):
        with new_file(path, overwrite=overwrite) as part:
            part.write_text(text)
    with new_file(paths[2], overwrite=overwrite) as part:
        draw_picture(comparison, part)
    return paths
