"""A picture of training: measures against the tokens trained on, one line a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secateur.graph import SecateurError
from secateur.tools.report.picture import CANVASES, COLOURS

STYLES = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True)
class Panel:
    """One picture beside others.

    title: what it shows.
    key: of the records.
    unit: at its y axis.
    level: a horizontal line, such as the value of the dense model, and its label; or None.
    """

    title: str
    key: str
    unit: str
    level: tuple[float, str] | None = None
    logarithmic: bool = False


Runs = Mapping[str, Sequence[Sequence[Mapping[str, float]]]]


def draw_curves(runs: Runs, panels: Sequence[Panel], file: Path, title: str = "") -> None:
    """Curves against tokens, side by side.

    Args:
        runs: by label: the runs that share it (seeds), each a list of records with ``tokens`` and
            the panels' keys; records without the key are left out.  A label has one colour; its
            seeds are thin, their mean is thick where they were measured at the same tokens.
        panels: what is drawn, left to right.
        file: .png or .svg.
        title: above all.

    Raises:
        SecateurError: another ending, nothing to draw, or the file cannot be written.
    """
    if file.suffix.lower() not in CANVASES:
        raise SecateurError(f"{file.name}: a picture ends in {' or '.join(CANVASES)}")
    if not panels or not any(run for group in runs.values() for run in group):
        raise SecateurError("there is no curve to draw: no run has a record")
    figure = Figure(figsize=(6.2 * len(panels), 4.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for place, (label, group) in enumerate(runs.items()):
            colour = COLOURS[place % len(COLOURS)]
            style = STYLES[place // len(COLOURS) % 4]
            _draw_group(axes, panel.key, label, group, colour, style)
        if panel.level is not None:
            axes.axhline(
                panel.level[0],
                color="#999999",
                linewidth=1.0,
                linestyle="dotted",
                label=panel.level[1],
            )
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel(panel.unit)
        if panel.logarithmic:
            axes.set_yscale("log")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
    try:
        CANVASES[file.suffix.lower()](figure).print_figure(file, dpi=130)
    except OSError as error:
        raise SecateurError(
            f"the picture {file} cannot be written: {error.strerror or error}"
        ) from error


def _draw_group(
    axes: Axes,
    key: str,
    label: str,
    group: Sequence[Sequence[Mapping[str, float]]],
    colour: str,
    style: str,
) -> None:
    lines = list[tuple[list[float], list[float]]]()
    for run in group:
        rows = [row for row in run if key in row]
        if rows:
            lines.append(([row["tokens"] for row in rows], [row[key] for row in rows]))
    if len(lines) == 1:
        axes.plot(*lines[0], color=colour, linestyle=style, linewidth=1.8, alpha=1.0, label=label)
    if len(lines) <= 1:
        return
    for tokens, values in lines:
        axes.plot(tokens, values, color=colour, linestyle=style, linewidth=0.7, alpha=0.6)
    places = lines[0][0]
    means = list[float]()
    thick_label = f"{label}, {len(lines)} runs"
    if all(tokens == places for tokens, _ in lines):
        for values_there in zip(*(values for _, values in lines), strict=True):
            means.append(sum(values_there) / len(lines))
        thick_label = f"{label}, mean of {len(lines)}"
    axes.plot(
        places[: len(means)],
        means,
        color=colour,
        linestyle=style,
        linewidth=2.2,
        label=thick_label,
    )
