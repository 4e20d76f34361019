"""What a model consists of: sizes, and its coupled groups by family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from secateur.graph import CoupledGroup, Program, SecateurError, coupled_groups
from secateur.graph.program import JSON
from secateur.tools.plan.footprint import Footprint, measure_footprint


@dataclass(frozen=True)
class FamilySummary:
    """Groups of one family.

    units: units of a group -> number of such groups.
    locked: reason -> number of groups.
    """

    family: str
    groups: int
    units: Mapping[int, int]
    locked: Mapping[str, int]
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """What ``secateur inspect`` tells.

    sparse: pattern -> number of weights that a manifest says hold it.
    """

    model: str
    folder: str | None
    dtypes: Mapping[str, int]
    footprint: Footprint
    blocks: tuple[str, ...]
    families: tuple[FamilySummary, ...]
    nodes: int
    sparse: Mapping[str, int]

    def to_json(self) -> JSON:
        """As JSON values."""
        values = asdict(self)
        for family in values["families"]:
            family["units"] = {str(units): count for units, count in family["units"].items()}
        return values


def inspect_program(program: Program) -> Inspection:
    """Look at a Program; weights are not needed."""
    groups = coupled_groups(program)
    by_family: dict[str, list[CoupledGroup]] = {}
    for group in groups:
        by_family.setdefault(group.family, []).append(group)
    families = []
    for family, members in by_family.items():
        families.append(_summarize_family(program, family, members))
    folder = None
    if program.source.folder is not None:
        folder = str(program.source.folder)
    dtypes = Counter[str]()
    for _, parameter in program.named_parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return Inspection(
        model=type(program.source.model).__name__,
        folder=folder,
        dtypes=dict(dtypes),
        footprint=measure_footprint(program),
        blocks=tuple(layer_paths(groups)),
        families=tuple(families),
        nodes=len(program.gm.graph.nodes),
        sparse=dict(Counter(str(weight.pattern) for weight in program.sparse.values())),
    )


def layer_paths(groups: Sequence[CoupledGroup]) -> list[str]:
    """Module paths of the residual layers, in order."""
    return list(dict.fromkeys(group.block for group in groups if group.block))


def groups_of_block(program: Program, index: int) -> tuple[str, list[CoupledGroup]]:
    """One residual layer's path and the groups that touch its parameters, the layer's own first.

    Raises:
        SecateurError: no such layer.
    """
    groups = coupled_groups(program)
    paths = layer_paths(groups)
    if not paths:
        return "", groups
    if not -len(paths) <= index < len(paths):
        raise SecateurError(f"there is no block {index}: the model has blocks 0..{len(paths) - 1}")
    path = paths[index]
    inner = list[CoupledGroup]()
    outer = list[CoupledGroup]()
    for group in groups:
        if group.block == path:
            inner.append(group)
        elif any(is_inside(member.parameter, path) for member in group.members):
            outer.append(group)
    return path, inner + outer


def is_inside(parameter: str, path: str) -> bool:
    """Whether a parameter lies in a module."""
    return not path or parameter.startswith(path + ".")


def _summarize_family(program: Program, family: str, groups: list[CoupledGroup]) -> FamilySummary:
    named = dict(program.named_parameters())
    touched = set[str]()
    for group in groups:
        touched.update(member.parameter for member in group.members)
    touched &= named.keys()
    locked = Counter(group.locked for group in groups if group.locked is not None)
    units = Counter(group.units for group in groups)
    parameters = sum(named[name].numel() for name in touched)
    return FamilySummary(family, len(groups), dict(units), dict(locked), parameters)
