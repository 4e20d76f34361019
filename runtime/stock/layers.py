"""Stacks of layers in parameter names: numbered again after some were dropped, and the
configuration's depth with them.

A stack is everything before the first whole number in a name: ``model.layers`` in
``model.layers.3.mlp.weight``."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from torch import nn

from secateur.runtime.stock.blueprint import Blueprint, Field, Shapes

Stack = tuple[str, ...]
Order = Mapping[Stack, Mapping[int, int]]
"""By stack, the new number of each layer that stays."""
Setting = bool | int | float | str | None
Facts = Mapping[str, Setting]


def new_order(names: Iterable[str], base: Iterable[str]) -> Order:
    """The layers of every stack counted from 0 without holes.

    Args:
        names: of the parameters that stay.
        base: of all parameters of the source model.

    Returns:
        New number by old number, by stack.
    """
    full = find_stacks(base)
    order: dict[Stack, dict[int, int]] = {}
    for stack, indices in find_stacks(names).items():
        if stack in full:
            order[stack] = {old: new for new, old in enumerate(indices)}
    return order


def renumber_name(name: str, order: Order) -> str | None:
    """Return the new name of a parameter, buffer or attribute; None where its layer is gone.

    Args:
        name: its old name.
        order: as ``new_order`` gives it.
    """
    stack, index, rest = split_name(name)
    if index is None or stack not in order:
        return name
    if index in order[stack]:
        return ".".join((*stack, str(order[stack][index]), *rest))
    return None


def is_apart(name: str, used: Container[str], order: Order) -> bool:
    """Whether a parameter that was not used lies in a stack of which no layer was.

    Args:
        name: of the parameter.
        used: names of those that the computation used.
        order: of the stacks that stay.
    """
    stack, index, _ = split_name(name)
    return index is not None and stack not in order and name not in used


def renumber_names(names: Iterable[str], order: Order) -> dict[str, str]:
    """Return the new name of each name whose layer stays.

    Args:
        names: old names.
        order: as ``new_order`` gives it.
    """
    renumbered: dict[str, str] = {}
    for name in names:
        new_name = renumber_name(name, order)
        if new_name is not None:
            renumbered[name] = new_name
    return renumbered


def find_stacks(names: Iterable[str]) -> dict[Stack, tuple[int, ...]]:
    """Return the layer numbers of every stack, in order.

    Args:
        names: of parameters.
    """
    stacks: dict[Stack, set[int]] = {}
    for name in names:
        stack, index, _ = split_name(name)
        if index is not None:
            stacks.setdefault(stack, set()).add(index)
    return {stack: tuple(sorted(indices)) for stack, indices in stacks.items()}


def split_name(name: str) -> tuple[Stack, int | None, tuple[str, ...]]:
    """Split a dotted name at its first whole number.

    Args:
        name: of a parameter, buffer or attribute.

    Returns:
        The stack, the layer number or None, and the rest.
    """
    parts = tuple(name.split("."))
    for position, part in enumerate(parts):
        if part.isdigit():
            return parts[:position], int(part), parts[position + 1 :]
    return parts, None, ()


def depth_settings(
    blueprint: Blueprint, wanted: Shapes, base: Shapes
) -> dict[Field, tuple[int, ...]]:
    """Find the depths of a smaller model: layers that stay by the field that counts them.

    Args:
        blueprint: of the stock class.
        wanted: shapes of the parameters that stay, under their old names.
        base: shapes of all parameters of the source model.

    Returns:
        Positions of the layers that stay, for each stack that lost some and has such a field.
    """
    full = find_stacks(base)
    settings: dict[Field, tuple[int, ...]] = {}
    for stack, kept in find_stacks(wanted).items():
        if stack in full and len(kept) < len(full[stack]):
            positions = tuple(full[stack].index(index) for index in kept)
            settings.update(_depth_field(blueprint, stack, len(full[stack]), positions))
    return settings


def depth_thresholds(
    blueprint: Blueprint, depths: Mapping[Field, tuple[int, ...]]
) -> dict[Field, int]:
    """For each number that may say how many of the first layers are of another kind, how many of
    those stay.

    Args:
        blueprint: of the stock class.
        depths: as ``depth_settings`` gives them.
    """
    thresholds: dict[Field, int] = {}
    for depth_field, kept in depths.items():
        depth = blueprint.source_value(depth_field) or 0
        for field in blueprint.fields:
            value = blueprint.source_value(field) or 0
            if field != depth_field and 0 < value <= depth:
                thresholds[field] = sum(layer < value for layer in kept)
    return thresholds


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

    A setting that counts the layers is none.

    Args:
        model: the meta device will do.
    """
    by_setting: dict[tuple[Stack, tuple[str, ...]], dict[int, Setting]] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            name = key
            if path:
                name = f"{path}.{key}"
            stack, index, rest = split_name(name)
            if index is not None and (value is None or isinstance(value, (bool, int, float, str))):
                by_setting.setdefault((stack, rest), {})[index] = value
    facts: dict[str, Setting] = {}
    for (stack, rest), values in by_setting.items():
        differs = len({repr(value) for value in values.values()}) > 1
        if rest[-1].startswith("_") or not differs or _counts_layers(values):
            continue
        for index, value in values.items():
            facts[".".join((*stack, str(index), *rest))] = value
    return facts


def find_broken_settings(before: Facts, after: nn.Module, order: Order) -> dict[str, str]:
    """Settings that a layer has in the smaller class and had not before, with both values in
    words.

    Args:
        before: ``layer_facts`` of the source model.
        after: the smaller model.
        order: new numbers of the layers that stay.
    """
    broken: dict[str, str] = {}
    attributes = {path: vars(module) for path, module in after.named_modules()}
    for old_name, value in before.items():
        path, _, key = (renumber_name(old_name, order) or "").rpartition(".")
        settings = attributes.get(path, {})
        if key in settings and settings[key] != value:
            layer = split_name(old_name)[1]
            broken[f"{path}.{key}"] = f"{value!r} in layer {layer} -> {settings[key]!r}"
    return broken


def _counts_layers(values: Mapping[int, Setting]) -> bool:
    """Whether a setting is the layer's own number, or that and a constant."""
    offsets = set[int]()
    for index, value in values.items():
        if type(value) is not int:
            return False
        offsets.add(value - index)
    return len(offsets) == 1
