"""Why no configuration of a stock class has the wanted shapes, and what would make one fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Sized

from secateur.graph.errors import SecateurError
from secateur.runtime.stock.blueprint import (
    COUNT,
    Blueprint,
    Settings,
    Shapes,
    Slot,
    dotted_name,
    sizes_by_slot,
)
from secateur.runtime.stock.layers import split_name

SHOWN = 3
Pattern = tuple[str, ...]


class UnsupportedConfigError(SecateurError):
    """No configuration gives the stock class these shapes; says which parameters do not fit and
    what would help."""


class UnseenParametersError(UnsupportedConfigError):
    """A cut would reach parameters that the captured computation never used."""


def explain_incompatibility(
    blueprint: Blueprint, wanted: Shapes, nearest: Settings, refused: Mapping[str, str]
) -> str:
    """Write one message: the parameters that do not fit, and what would make them fit.

    Args:
        blueprint: of the stock class.
        wanted: shapes of the program's parameters, by name.
        nearest: the settings with the fewest gaps.
        refused: settings that would have fitted, and the class's own words on them.
    """
    name = f"{blueprint.cls.__name__} cannot hold this model"
    if unequal := _layers_that_differ(wanted, blueprint.parameter_shapes({}) or {}):
        return (
            f"{name}: layers differ in {'; '.join(unequal[:SHOWN])}. Choose one shape for "
            "all layers"
        )
    shapes = blueprint.parameter_shapes(nearest) or {}
    have = sizes_by_slot(shapes)
    want = sizes_by_slot(wanted)
    gaps = sorted(slot for slot in want if slot != COUNT and have.get(slot) != want[slot])
    misfits = []
    for parameter in dict.fromkeys(slot[0] for slot in gaps):
        misfits.append(
            f"{parameter} needs {list(wanted[parameter])}, the nearest configuration gives "
            f"{_shape_text(shapes, parameter)}"
        )
    advice = "Parameters were added or lost"
    if gaps:
        advice = _advise_fields(blueprint, nearest, gaps[0])
    listed = "; ".join(misfits[:SHOWN]) + _count_more(misfits)
    return f"{name}: {listed}. {describe_refusals(refused)}{advice}"


def _count_more(items: Sized) -> str:
    if len(items) > SHOWN:
        return f" and {len(items) - SHOWN} more"
    return ""


def sub_block_misfit(name: str, lost: Sequence[str]) -> str:
    """Write the message on parameters of dropped sub-blocks that the class has in every layer.

    Args:
        name: of the class.
        lost: names of the parameters.
    """
    return (
        f"{name} cannot hold this model: it has {', '.join(lost[:SHOWN])}{_count_more(lost)}, "
        "which were "
        "dropped from layers of "
        "which something stays. Drop whole blocks; or put the pass fill-dropped at the end, which "
        "brings them "
        "back with an output of zero (opens everywhere, saves nothing); or, in Python, keep the "
        "program with save_weights"
    )


def pattern_misfit(name: str, wrong: Mapping[str, str]) -> str:
    """Write the message on settings that a class derives from the number of a layer.

    Args:
        name: of the class.
        wrong: by setting, both values in words.
    """
    settings = [f"{setting} ({words})" for setting, words in list(wrong.items())[:SHOWN]]
    return (
        f"{name} cannot hold this model: it derives the kind of a layer from its number, and "
        "layers that stay would "
        f"change: {'; '.join(settings)}{_count_more(wrong)}. "
        "Drop whole periods of the pattern, or the last layers"
    )


def describe_refusals(refused: Mapping[str, str]) -> str:
    """The class's own words on values that would have fitted, or nothing."""
    sentences = ""
    for value, words in list(refused.items())[:SHOWN]:
        if words:
            sentences += f"The class refuses {value}: {words}. "
    return sentences


def _shape_text(shapes: Shapes, name: str) -> str:
    if name in shapes:
        return str(list(shapes[name]))
    return "no such parameter"


def _advise_fields(blueprint: Blueprint, nearest: Settings, slot: Slot) -> str:
    """Which fields set this size, and what else they set."""
    name, dim = slot
    for field in blueprint.fields:
        line = blueprint.field_line(nearest, field)
        if line is not None and line.moves_slot(slot):
            others = []
            for p, d in line.moved_slots:
                if (p, d) not in (slot, COUNT):
                    others.append(f"{p}[{d}]")
            return (
                f"{dotted_name(field)} sets dim {dim} of {name} together with "
                f"{', '.join(others[:SHOWN])} and "
                f"{max(0, len(others) - SHOWN)} more dims: prune all of them in the same "
                "proportion (a width of the "
                "residual stream and a number of heads that divides it, for example), or none"
            )
    return f"No number of the configuration sets dim {dim} of {name}: leave it as it is"


def _layers_that_differ(wanted: Shapes, base: Shapes) -> list[str]:
    """Parameters that were alike in all layers and are not any more."""
    before = _by_pattern(base)
    after = _by_pattern(wanted)
    differing = []
    for pattern, shapes in after.items():
        if len(shapes) > 1 and len(before.get(pattern, ())) == 1:
            listed = ", ".join(str(list(shape)) for shape in sorted(shapes))
            differing.append(f"{'.'.join(pattern)} ({listed})")
    return differing


def _by_pattern(shapes: Shapes) -> dict[Pattern, set[tuple[int, ...]]]:
    by_pattern: dict[Pattern, set[tuple[int, ...]]] = defaultdict(set)
    for name, shape in shapes.items():
        stack, index, rest = split_name(name)
        if index is not None:
            by_pattern[(*stack, "*", *rest)].add(shape)
    return by_pattern
