"""Stacks of layers in parameter names: numbered again after some were dropped, and the configuration's depth with them.

A stack is everything before the first whole number in a name: ``model.layers`` in ``model.layers.3.mlp.weight``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from secateur.runtime.blueprint import Blueprint, Field, Shapes

Stack = tuple[str, ...]


def renumber(names: Iterable[str], base: Iterable[str]) -> dict[str, str]:
    """New name of each name, with the layers of every stack counted from 0 without holes.

    Args:  names: of the parameters that stay.   base: of all parameters of the source model."""
    names = list(names)
    kept = stacks(names)
    full = stacks(base)
    order = {stack: {old: new for new, old in enumerate(found)} for stack, found in kept.items() if stack in full}
    return {name: _renumbered(name, order) for name in names}


def stacks(names: Iterable[str]) -> dict[Stack, tuple[int, ...]]:
    """The layer numbers of every stack, in order."""
    found: dict[Stack, set[int]] = {}
    for name in names:
        stack, index, _ = split(name)
        if index is not None:
            found.setdefault(stack, set()).add(index)
    return {stack: tuple(sorted(indices)) for stack, indices in found.items()}


def split(name: str) -> tuple[Stack, int | None, tuple[str, ...]]:
    """A name as (stack, layer number or None, the rest)."""
    parts = tuple(name.split("."))
    for position, part in enumerate(parts):
        if part.isdigit():
            return parts[:position], int(part), parts[position + 1 :]
    return parts, None, ()


def depth_settings(blueprint: Blueprint, wanted: Shapes, base: Shapes) -> Mapping[Field, tuple[int, ...]]:
    """For each stack that lost layers, the field that counts them, set to the layers that stay."""
    full = stacks(base)
    found: dict[Field, tuple[int, ...]] = {}
    for stack, kept in stacks(wanted).items():
        if stack in full and len(kept) < len(full[stack]):
            positions = tuple(full[stack].index(index) for index in kept)
            found.update(_depth_field(blueprint, stack, len(full[stack]), positions))
    return found


def _depth_field(blueprint: Blueprint, stack: Stack, depth: int, kept: tuple[int, ...]) -> dict[Field, tuple[int, ...]]:
    for field in blueprint.fields:
        if blueprint.value(field) == depth:
            shapes = blueprint.shapes({field: kept})
            if shapes is not None and len(stacks(shapes).get(stack, ())) == len(kept):
                return {field: kept}
    return {}


def _renumbered(name: str, order: Mapping[Stack, Mapping[int, int]]) -> str:
    stack, index, rest = split(name)
    if index is None or stack not in order:
        return name
    return ".".join((*stack, str(order[stack][index]), *rest))
