"""How large a Program is at every uniform shape, from its own coupled groups and blocks: exact, and all shapes at once.

A shape gives every group of a family one number of units, and the model a number of layers.  A parameter's size is the
product of its dims, a dim's size follows from the structure of its axis, so the count of a shape is a polynomial that
is read off the graph; nothing is built.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from secateur.graph import CoupledGroup, Program, analyse, blocks, coupled_groups
from secateur.graph.atoms import Atom, Kind
from secateur.graph.errors import EditError
from secateur.passes.search_latency import LatencyTable, matrix_uses

Array = npt.NDArray[np.float64]
Shape = Mapping[str, int]
"""Units by family, and ``layers``."""
Budget = Literal["parameters", "bytes", "latency"]
LAYERS = "layers"
MOST = 4_000_000


@dataclass(frozen=True)
class Candidate:
    """A shape and what it costs, in the unit of the budget."""

    shape: Shape
    cost: float


class ShapeCosts:
    """Costs of shapes of one Program.

    varied: the families whose units are searched, "layers" among them where the depth is.
    Raises: EditError: a family is missing, locked, or has groups of several sizes; layers that differ.
    """

    def __init__(self, program: Program, varied: Sequence[str], table: LatencyTable | None = None) -> None:
        self.program, self.table = program, table
        self.families = [name for name in varied if name != LAYERS]
        self.groups = {family: searched_groups(program, family) for family in self.families}
        self.leaves: dict[Atom, str] = {g.leaf: family for family, found in self.groups.items() for g in found}
        self.full: dict[str, int] = {family: found[0].units for family, found in self.groups.items()}
        self.full[LAYERS] = len(blocks(program))
        self._known: dict[Any, Array] = {}
        self._inside, self._outside = self._places(LAYERS in varied)

    def cost(self, shapes: Mapping[str, Sequence[int]], budget: Budget) -> Array:
        """[shapes]: what each costs.  shapes: by family (and "layers"), the units of every shape."""
        columns = {name: np.asarray(values, dtype=np.float64) for name, values in shapes.items()}
        self._known.clear()
        count = len(next(iter(columns.values())))
        outside, inside = (sum(self._of(n, columns, budget) for n in names) for names in (self._outside, self._inside))
        depth = columns.get(LAYERS, np.full(count, 1.0))
        return np.broadcast_to(np.asarray(outside + depth * inside, dtype=np.float64), (count,))

    # ------------------------------------------------------------------ where parameters stand
    def _places(self, deep: bool) -> tuple[list[str], list[str]]:
        """The parameters of one layer, of which all others are copies, and those outside of the layers."""
        named = [name for name, _ in self.program.named_parameters()]
        if not deep:
            return [], named
        found = blocks(self.program)
        kinds = [sorted(repr(self._key(name)) for name in block.parameters) for block in found]
        if any(kind != kinds[0] for kind in kinds):
            other = next(block.name for block, kind in zip(found, kinds, strict=True) if kind != kinds[0])
            raise EditError(f"search: {found[0].name} and {other} are of different sizes: leave layers out")
        inside = {name for block in found for name in block.parameters}
        return list(found[0].parameters), [name for name in named if name not in inside]

    def _key(self, name: str) -> Any:
        """The sizes of a parameter as expressions: numbers, families, products and sums of them."""
        axes, tensor = analyse(self.program).tensors[name]
        return tuple(self._axis_key(axis) for axis in axes), tensor.element_size()

    def _axis_key(self, axis: Atom) -> Any:
        atom = axis.resolve()
        if atom.kind is Kind.LEAF:
            return self.leaves.get(atom, atom.size)
        return atom.kind.value, tuple(self._axis_key(part) for part in atom.parts)

    # ------------------------------------------------------------------ what they cost
    def _of(self, name: str, columns: Mapping[str, Array], budget: Budget) -> Array | float:
        dims, element = self._key(name)
        sizes = [self._size(dim, columns) for dim in dims]
        if budget == "latency":
            assert self.table is not None
            uses = matrix_uses(self.program).get(name, 0)
            return uses * self.table.seconds(sizes[0], sizes[1], self.program.gm.get_parameter(name)) if uses else 0.0
        return np.asarray(np.prod(np.broadcast_arrays(*sizes), axis=0)) * (element if budget == "bytes" else 1)

    def _size(self, key: Any, columns: Mapping[str, Array]) -> Array:
        if key not in self._known:
            self._known[key] = self._computed(key, columns)
        return self._known[key]

    def _computed(self, key: Any, columns: Mapping[str, Array]) -> Array:
        if not isinstance(key, tuple):
            return columns.get(key, np.float64(self.full[key])) if isinstance(key, str) else np.float64(key)  # type: ignore[return-value,arg-type]
        parts = np.broadcast_arrays(*(self._size(part, columns) for part in key[1]))
        return np.asarray((np.prod if key[0] == Kind.PRODUCT.value else np.sum)(parts, axis=0))


def searched_groups(program: Program, family: str) -> list[CoupledGroup]:
    """The groups of a family, which must be free and of one size.

    Raises: EditError: they are not; says which."""
    found = [group for group in coupled_groups(program) if group.family == family]
    if not found:
        present = ", ".join(sorted({group.family for group in coupled_groups(program)}))
        raise EditError(f"search: the model has no group of family {family!r}; it has: {present}")
    if locked := [group for group in found if group.locked]:
        raise EditError(f"search: {locked[0].name} must not be pruned: {locked[0].locked}")
    if len({group.units for group in found}) > 1:
        sizes = sorted({group.units for group in found})
        raise EditError(f"search: groups of family {family!r} have {sizes} units; one number cannot stand for all")
    return found


def shapes_within(
    choices: Mapping[str, Sequence[int]],
    cost: Callable[[Mapping[str, Sequence[int]]], Array],
    at_most: float,
    at_least: float,
    expansion: Sequence[float] = (),
) -> Iterator[Candidate]:
    """The shapes of a grid whose cost lies within a budget, the dearest first.

    Args: choices: numbers to choose among, by family.   expansion: mlp units as multiples of hidden (then mlp is no
        choice of its own); a shape appears once, however it comes about.
    Raises: EditError: the grid is too large.
    """
    names = [*choices, *(["expansion"] if expansion else [])]
    grid = [*choices.values(), *([expansion] if expansion else [])]
    if (total := int(np.prod([len(values) for values in grid]))) > MOST:
        raise EditError(f"search: {total:,} shapes are too many (at most {MOST:,}): give fewer choices")
    columns: dict[str, Any] = dict(zip(names, np.array(list(itertools.product(*grid))).T, strict=True))
    if expansion:
        columns["mlp"] = np.rint(columns.pop("expansion") * columns["hidden"])
    table = np.unique(np.stack([columns[name] for name in columns], 1).astype(np.int64), axis=0)
    shapes = dict(zip(columns, table.T, strict=True))
    costs = cost(shapes)
    inside = np.flatnonzero((costs >= at_least) & (costs <= at_most))
    for at in inside[np.argsort(-costs[inside], kind="stable")]:
        yield Candidate({name: int(column[at]) for name, column in shapes.items()}, float(costs[at]))
