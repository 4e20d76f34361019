"""Stacks of layers in parameter names: numbered again after some were dropped, and the
configuration's depth with them.

A stack is everything before the first whole number in a name: ``model.layers`` in
``model.layers.3.mlp.weight``."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import nn

from secateur.runtime.stock.blueprint import Blueprint, Field, Shapes

Stack = tuple[str, ...]
Order = Mapping[Stack, Mapping[int, int]]
"""By stack, the new number of each layer that stays."""
Facts = Mapping[str, Any]


def new_order(names: Iterable[str], base: Iterable[str]) -> Order:
    """The layers of every stack counted from 0 without holes.

    Args:
        names: of the parameters that stay.
        base: of all parameters of the source model.
    """
    full = find_stacks(base)
    return {
        stack: {old: new for new, old in enumerate(f)}
        for stack, f in find_stacks(names).items()
        if stack in full
    }


def renumber_name(name: str, order: Order) -> str | None:
    """The new name of a parameter, buffer or attribute; None where its layer is gone."""
    stack, index, rest = split_name(name)
    if index is None or stack not in order:
        return name
    if index in order[stack]:
        return ".".join((*stack, str(order[stack][index]), *rest))
    return None


def is_apart(name: str, used: Container[str], order: Order) -> bool:
    """Whether a parameter that was not used lies in a stack of which no layer was."""
    stack, index, _ = split_name(name)
    return index is not None and stack not in order and name not in used


def renumber_names(names: Iterable[str], order: Order) -> dict[str, str]:
    """New name of each name whose layer stays."""
    pairs = ((name, renumber_name(name, order)) for name in names)
    return {name: new for name, new in pairs if new is not None}


def find_stacks(names: Iterable[str]) -> dict[Stack, tuple[int, ...]]:
    """The layer numbers of every stack, in order."""
    found: dict[Stack, set[int]] = {}
    for name in names:
        stack, index, _ = split_name(name)
        if index is not None:
            found.setdefault(stack, set()).add(index)
    return {stack: tuple(sorted(indices)) for stack, indices in found.items()}


def split_name(name: str) -> tuple[Stack, int | None, tuple[str, ...]]:
    """A name as (stack, layer number or None, the rest)."""
    parts = tuple(name.split("."))
    for position, part in enumerate(parts):
        if part.isdigit():
            return parts[:position], int(part), parts[position + 1 :]
    return parts, None, ()


def depth_settings(
    blueprint: Blueprint, wanted: Shapes, base: Shapes
) -> dict[Field, tuple[int, ...]]:
    """For each stack that lost layers, the field that counts them, set to the layers that stay."""
    full = find_stacks(base)
    found: dict[Field, tuple[int, ...]] = {}
    for stack, kept in find_stacks(wanted).items():
        if stack in full and len(kept) < len(full[stack]):
            positions = tuple(full[stack].index(index) for index in kept)
            found.update(_depth_field(blueprint, stack, len(full[stack]), positions))
    return found


def depth_thresholds(
    blueprint: Blueprint, depths: Mapping[Field, tuple[int, ...]]
) -> dict[Field, int]:
    """For each number that may say how many of the first layers are of another kind, how many of
    those stay."""
    found: dict[Field, int] = {}
    for depth_field, kept in depths.items():
        depth = blueprint.source_value(depth_field) or 0
        for field in blueprint.fields:
            value = blueprint.source_value(field) or 0
            if field != depth_field and 0 < value <= depth:
                found[field] = sum(layer < value for layer in kept)
    return found


def _depth_field(
    blueprint: Blueprint, stack: Stack, depth: int, kept: tuple[int, ...]
) -> dict[Field, tuple[int, ...]]:
    for field in blueprint.fields:
        if blueprint.source_value(field) == depth:
            shapes = blueprint.parameter_shapes({field: kept})
            if shapes is not None and len(find_stacks(shapes).get(stack, ())) == len(kept):
                return {field: kept}
    return {}


# What layers are beside their shapes
def layer_facts(model: nn.Module) -> Facts:
    """The settings in which the layers of a stack differ, by dotted name: windows, kinds of
    attention, scales.

    A setting that counts the layers is none."""
    by_setting: dict[tuple[Stack, tuple[str, ...]], dict[int, Any]] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            stack, index, rest = split_name(f"{path}.{key}" if path else key)
            if index is not None and (value is None or isinstance(value, (bool, int, float, str))):
                by_setting.setdefault((stack, rest), {})[index] = value
    facts: dict[str, Any] = {}
    for (stack, rest), values in by_setting.items():
        if (
            not rest[-1].startswith("_")
            and len({repr(v) for v in values.values()}) > 1
            and not _counts_layers(values)
        ):
            facts |= {
                ".".join((*stack, str(index), *rest)): value for index, value in values.items()
            }
    return facts


def find_broken_settings(before: Facts, after: nn.Module, order: Order) -> dict[str, str]:
    """Settings that a layer has in the smaller class and had not before, with both values in
    words."""
    found: dict[str, str] = {}
    now = {path: vars(module) for path, module in after.named_modules()}
    for old, value in before.items():
        path, _, key = (renumber_name(old, order) or "").rpartition(".")
        if key in now.get(path, {}) and now[path][key] != value:
            found[f"{path}.{key}"] = (
                f"{value!r} in layer {split_name(old)[1]} -> {now[path][key]!r}"
            )
    return found


def _counts_layers(values: Mapping[int, Any]) -> bool:
    """Whether a setting is the layer's own number, or that and a constant."""
    whole = all(type(value) is int for value in values.values())
    return whole and len({value - index for index, value in values.items()}) == 1
