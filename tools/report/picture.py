"""A picture of the coupled groups of one residual layer: which groups hold which parameters
together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import networkx as nx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from secateur.graph import CoupledGroup, SecateurError
from secateur.tools.inspect import is_inside

CANVASES = {".png": FigureCanvasAgg, ".svg": FigureCanvasSVG}
COLOURS = ("#2f7f4f", "#c2703d", "#3d6fa5", "#8a4f9e", "#a8963a", "#4c9a9a", "#b04a5a", "#6b6b6b")
ROLE_STYLES = {"produces": "solid", "consumes": "dashed", "scales": "dotted", "looks_up": "dashdot"}


def draw_groups(groups: Sequence[CoupledGroup], path: str, file: Path) -> None:
    """Groups left, the layer's parameters right; a line says that a dim of the parameter belongs to
    the group.

    Args:
        path: of the residual layer, "" for the whole model.
        file: .png or .svg.

    Raises:
        SecateurError: another ending, or the file cannot be written.
    """
    if file.suffix.lower() not in CANVASES:
        raise SecateurError(f"{file.name}: a picture ends in {' or '.join(CANVASES)}")
    graph = membership_graph(groups, path)
    columns: dict[str, list[str]] = {"group": [], "parameter": []}
    for node, side in graph.nodes(data="side"):
        columns[side].append(node)
    rows = max(len(columns["group"]), len(columns["parameter"]), 4)
    figure = Figure(figsize=(11, 1.2 + 0.42 * rows), layout="constrained")
    axes = figure.add_subplot()
    places = _place_column(columns["group"], 0.0) | _place_column(columns["parameter"], 1.0)
    colours = {node: COLOURS[i % len(COLOURS)] for i, node in enumerate(columns["group"])}
    for first, second, data in graph.edges(data=True):
        if first in colours:
            group = first
            parameter = second
        else:
            group = second
            parameter = first
        xs, ys = zip(places[group], places[parameter], strict=True)
        style = ROLE_STYLES.get(data["role"], "solid")
        axes.plot(xs, ys, linestyle=style, color=colours[group], linewidth=1.6, alpha=0.8)
    for node, (x, y) in places.items():
        label = graph.nodes[node]["label"]
        colour = colours.get(node, "#333333")
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": colour}
        side = "left"
        if x == 0:
            side = "right"
        axes.text(x, y, label, ha=side, va="center", fontsize=9, bbox=box)
    for role, style in ROLE_STYLES.items():
        axes.plot([], [], linestyle=style, color="#333333", label=role.replace("_", " "))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False)
    axes.set_title(f"coupled groups of {path or 'the model'}", fontsize=11)
    axes.set_xlim(-0.75, 1.75)
    axes.axis("off")
    save_figure(figure, file)


def membership_graph(groups: Sequence[CoupledGroup], path: str) -> nx.MultiGraph:
    """Bipartite: groups and the parameters inside a module; one edge a member, with dim and
    role."""
    graph = nx.MultiGraph()
    for group in groups:
        members = [m for m in group.members if is_inside(m.parameter, path)]
        lock = ""
        if group.locked:
            lock = f"\nlocked: {group.locked}"
        if members:
            reach = ", across layers"
            if group.block:
                reach = ""
            label = f"{group.family}: {group.units} units{reach}{_shorten_label(lock)}"
            graph.add_node(group.name, side="group", label=label)
        for member in members:
            name = member.parameter
            if path:
                name = name.removeprefix(path + ".")
            graph.add_node(member.parameter, side="parameter", label=name)
            graph.add_edge(group.name, member.parameter, dim=member.dim, role=member.role)
    return graph


def _shorten_label(text: str, limit: int = 60) -> str:
    if len(text) <= limit:
        return text
    return text[: limit - 1] + "…"


def _place_column(nodes: Sequence[str], x: float) -> dict[str, tuple[float, float]]:
    return {node: (x, 1.0 - (i + 0.5) / len(nodes)) for i, node in enumerate(nodes)}


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure; the ending of the file says how.

    Raises:
        SecateurError: it cannot be written.
    """
    canvas = CANVASES[file.suffix.lower()](figure)
    try:
        canvas.print_figure(file, dpi=130)
    except OSError as error:
        raise SecateurError(
            f"the picture {file} cannot be written: {error.strerror or error}"
        ) from error
