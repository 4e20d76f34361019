"""What an architecture search found: a table, and the picture of damage against cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from secateur.graph import Program, SecateurError
from secateur.graph.program import JSON
from secateur.tools.report.picture import CANVASES, save_figure


def search_table(figures: JSON) -> Table:
    """The candidates of a ``search`` step, the least damage first.

    Args:
        figures: of the step in a Program's history.
    """
    candidates = figures["candidates"]
    table = Table(title=f"{len(candidates)} of {figures['within']:,} shapes within the budget")
    columns = ["shape", figures["budget"], "KL", "+-"]
    distilled = any("kl_distilled" in row for row in candidates)
    if distilled:
        columns.append("KL distilled")
    for column in (*columns, ""):
        table.add_column(column)
    front = pareto_front(figures)
    for row in sorted(candidates, key=row_damage):
        cells = [
            describe_shape(row["shape"]),
            f"{row['cost']:,.6g}",
            f"{row['kl']:.4f}",
            f"{row['stderr']:.4f}",
        ]
        if "kl_distilled" in row:
            cells.append(f"{row['kl_distilled']:.4f}")
        elif distilled:
            cells.append("")
        marks = []
        if row["shape"] == figures["chosen"]:
            marks.append("chosen")
        if row in front:
            marks.append("front")
        table.add_row(*cells, ", ".join(marks))
    return table


def search_tables(program: Program) -> list[Table]:
    """The table of every search in a Program's history."""
    return [search_table(step.figures) for step in program.history if step.name == "search"]


def pareto_front(figures: JSON) -> list[JSON]:
    """The candidates that no cheaper one beats, the cheapest first."""
    front: list[JSON] = []
    for row in sorted(figures["candidates"], key=lambda row: (row["cost"], row_damage(row))):
        if not front or row_damage(row) < row_damage(front[-1]):
            front.append(row)
    return front


def row_damage(row: JSON) -> float:
    """The KL of a candidate, after distillation where it was distilled."""
    damage: float = row["kl"]
    if "kl_distilled" in row:
        damage = row["kl_distilled"]
    return damage


def describe_shape(shape: Mapping[str, int]) -> str:
    """A shape in words."""
    return ", ".join(f"{name} {count}" for name, count in shape.items())


def draw_search(figures: JSON, file: Path) -> None:
    """KL against cost of every candidate, the Pareto front as a line.  file: .png or .svg.

    Raises:
        SecateurError: another ending, or the file cannot be written.
    """
    if file.suffix.lower() not in CANVASES:
        raise SecateurError(f"{file.name}: a picture ends in {' or '.join(CANVASES)}")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    rows = figures["candidates"]
    front = pareto_front(figures)
    axes.errorbar(
        [row["cost"] for row in rows],
        [row_damage(row) for row in rows],
        yerr=[row["stderr"] for row in rows],
        fmt="o",
        color="#3d6fa5",
        ecolor="#b9c9da",
        label="compared",
    )
    axes.plot(
        [row["cost"] for row in front],
        [row_damage(row) for row in front],
        color="#c2703d",
        label="front",
    )
    for row in front:
        axes.annotate(
            describe_shape(row["shape"]),
            (row["cost"], row_damage(row)),
            xytext=(4, 6),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(xlabel=figures["budget"], ylabel="KL(dense || candidate), nats a token")
    axes.legend(frameon=False)
    save_figure(figure, file)
