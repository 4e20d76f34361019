"""Evaluation for a person: one table for all models, the protocol under it, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from secateur.graph import SecateurError
from secateur.tools.evaluate.tasks import TaskScore
from secateur.tools.evaluate.texts import Interval, TextReport
from secateur.tools.report.picture import CANVASES, COLOURS, save_figure
from secateur.tools.report.units import format_count

Tasks = Mapping[str, Sequence[TaskScore]]


def evaluation_tables(
    parameters: Mapping[str, int], text: TextReport | None, tasks: Tasks
) -> list[Table | str]:
    """All models in one table each for the text and for the tasks, and their protocols."""
    pieces: list[Table | str] = []
    if text is not None:
        pieces += [_text_table(parameters, text)]
        if text.reference is not None:
            pieces += [_distance_table(text), f"KL: nats a token, against {text.reference}"]
            pieces += ["worst: the part of the whole KL that the worst tokens carry"]
        pieces.append(f"protocol: {text.protocol}")
    if tasks:
        pieces += [_task_table(tasks), _task_protocol(tasks)]
    return pieces


def _text_table(parameters: Mapping[str, int], text: TextReport) -> Table:
    columns = ["model", "parameters", "perplexity"]
    if text.reference is not None:
        columns += ["to reference", "same top 1"]
    table = _make_table("text", columns)
    for name, scores in text.models.items():
        cells = [name, format_count(parameters[name]), interval_text(scores.perplexity, 2)]
        if text.reference is not None:
            cells += [_optional_interval(scores.ratio), _optional_interval(scores.agreement)]
        table.add_row(*cells)
    return table


def _optional_interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return interval_text(interval, 3)


def _distance_table(text: TextReport) -> Table:
    table = _make_table(
        "distance", ["model", "KL", "median", "90 %", "99 %", "worst 1 %", "worst 20 %"]
    )
    for name, scores in text.models.items():
        if scores.kl is not None and scores.kl_mean is not None:
            quantiles = [f"{value:.4f}" for value in scores.kl.quantiles.values()]
            shares = [f"{value:.0%}" for value in scores.kl.shares.values()]
            table.add_row(name, interval_text(scores.kl_mean, 4), *quantiles, *shares)
    return table


def _task_table(tasks: Tasks) -> Table:
    metrics = [(score.task, score.metric) for score in next(iter(tasks.values()))]
    table = _make_table("tasks", ["model", *(f"{task} {metric}" for task, metric in metrics)])
    for name, scores in tasks.items():
        by_metric = {(score.task, score.metric): score for score in scores}
        table.add_row(name, *(_task_cell(by_metric[key]) for key in metrics))
    return table


def _task_cell(score: TaskScore) -> str:
    result = interval_text(score.result, 3)
    if score.difference is None:
        return result
    return f"{result}\ndifference {interval_text(score.difference, 3, signed=True)}"


def _task_protocol(tasks: Tasks) -> str:
    lines = dict[str, None]()
    for score in next(iter(tasks.values())):
        lines[f"{score.task}: {score.items} items, {score.shots} shots"] = None
    return (
        f"protocol: {'; '.join(lines)}; intervals: 95%, items resampled, differences on "
        "the same items"
    )


def interval_text(interval: Interval, digits: int, signed: bool = False) -> str:
    """14.38 [14.02, 14.77]."""
    shape = f".{digits}f"
    if signed:
        shape = "+" + shape
    return f"{interval.value:{shape}} [{interval.low:{shape}}, {interval.high:{shape}}]"


def _make_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def draw_evaluation(text: TextReport, file: Path) -> None:
    """Left: perplexity with its interval.  Right: what part of the KL the worst tokens carry.

    Raises:
        SecateurError: the file ends in neither .png nor .svg, or cannot be written.
    """
    if file.suffix.lower() not in CANVASES:
        raise SecateurError(f"{file.name}: a picture ends in {' or '.join(CANVASES)}")
    figure = Figure(figsize=(11, 1.8 + max(2.2, 0.45 * len(text.models))), layout="constrained")
    perplexities, damages = figure.subplots(1, 2)
    names = list(text.models)
    for row, (name, scores) in enumerate(text.models.items()):
        interval = scores.perplexity
        colour = COLOURS[row % len(COLOURS)]
        below = max(0.0, interval.value - interval.low)
        above = max(0.0, interval.high - interval.value)
        spread = [[below], [above]]
        perplexities.errorbar(
            [interval.value], [row], xerr=spread, fmt="o", color=colour, capsize=4
        )
        if scores.curve:
            worst, carried = zip(*scores.curve, strict=True)
            damages.plot(worst, carried, color=colour, marker=".", label=name)
    perplexities.set_yticks(range(len(names)), names)
    perplexities.set_ylim(len(names) - 0.5, -0.5)
    perplexities.set_xlabel("perplexity, 95 % interval")
    damages.set_xscale("log")
    damages.set_xlabel("part of the tokens, worst first")
    damages.set_ylabel("part of the KL they carry")
    if damages.lines:
        damages.legend(frameon=False)
    else:
        damages.text(0.5, 0.5, "no reference", ha="center", transform=damages.transAxes)
    figure.suptitle(text.protocol, fontsize=8)
    save_figure(figure, file)
