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
    compared = text.reference is not None
    table = _make_table(
        "text",
        [
            "model",
            "parameters",
            "perplexity",
            *(["to reference", "same top 1"] if compared else []),
        ],
    )
    for name, scores in text.models.items():
        found = [scores.ratio, scores.agreement]
        if compared:
            against = []
            for one in found:
                against.append(interval_text(one, 3) if one is not None else "")
        else:
            against = []
        table.add_row(
            name, format_count(parameters[name]), interval_text(scores.perplexity, 2), *against
        )
    return table


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
    if score.difference is None:
        against = ""
    else:
        against = f"\ndifference {interval_text(score.difference, 3, signed=True)}"
    return interval_text(score.result, 3) + against


def _task_protocol(tasks: Tasks) -> str:
    lines = dict.fromkeys(
        f"{s.task}: {s.items} items, {s.shots} shots" for s in next(iter(tasks.values()))
    )
    return (
        f"protocol: {'; '.join(lines)}; intervals: 95%, items resampled, differences on "
        "the same items"
    )


def interval_text(found: Interval, digits: int, signed: bool = False) -> str:
    """14.38 [14.02, 14.77]."""
    if signed:
        sign = "+"
    else:
        sign = ""
    value, low, high = (f"{x:{sign}.{digits}f}" for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


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
    left, right = figure.subplots(1, 2)
    names = list(text.models)
    for at, (name, scores) in enumerate(text.models.items()):
        found = scores.perplexity
        colour = COLOURS[at % len(COLOURS)]
        spread = [[max(0.0, found.value - found.low)], [max(0.0, found.high - found.value)]]
        left.errorbar([found.value], [at], xerr=spread, fmt="o", color=colour, capsize=4)
        if scores.curve:
            worst, carried = zip(*scores.curve, strict=True)
            right.plot(worst, carried, color=colour, marker=".", label=name)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_xlabel("perplexity, 95 % interval")
    right.set_xscale("log")
    right.set_xlabel("part of the tokens, worst first")
    right.set_ylabel("part of the KL they carry")
    if right.lines:
        right.legend(frameon=False)
    else:
        right.text(0.5, 0.5, "no reference", ha="center", transform=right.transAxes)
    figure.suptitle(text.protocol, fontsize=8)
    save_figure(figure, file)
