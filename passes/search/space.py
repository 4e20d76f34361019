"""Exact costs of all uniform shapes of a Program, from its coupled groups and blocks.

A shape gives every group of a family one number of units, and the model a number of layers.  A
parameter's size is the product of its dims, a dim's size follows from the structure of its axis, so
the count of a shape is a polynomial that is read off the graph; nothing is built.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from secateur.graph import CoupledGroup, Program, analyse, blocks, coupled_groups
from secateur.graph.axes.atoms import Atom, Kind
from secateur.graph.errors import EditError
from secateur.passes.search.latency import LatencyTable, matrix_uses

Array = npt.NDArray[np.float64]
Shape = Mapping[str, int]
"""Units by family, and ``layers``."""
Polynomial = Mapping[tuple[str, ...], int]
"""Factors by product of families: ``{("hidden", "mlp"): 3, (): 5}`` is ``3 * hidden * mlp + 5``."""
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
    full: what the Program has of each.

    Raises:
        EditError: a family is missing, locked, or has groups of several sizes; layers that differ.
    """

    def __init__(
        self, program: Program, varied: Sequence[str], table: LatencyTable | None = None
    ) -> None:
        self.program = program
        self.table = table or LatencyTable()
        groups = {}
        for family in varied:
            if family != LAYERS:
                groups[family] = groups_to_search(program, family)
        self.leaves = dict[Atom, str]()
        self.full = dict[str, int]()
        for family, groups_of_family in groups.items():
            self.full[family] = groups_of_family[0].units
            for group in groups_of_family:
                self.leaves[group.leaf] = family
        self.full[LAYERS] = len(blocks(program))
        self.dims = {name: self._dim_polynomials(name) for name, _ in program.named_parameters()}
        if LAYERS in varied:
            self._inside, self._outside = self._split_parameters()
        else:
            self._inside = []
            self._outside = list(self.dims)

    def cost(self, shapes: Mapping[str, Sequence[int]], budget: Budget) -> Array:
        """[shapes]: what each costs.  shapes: by family (and "layers"), the units of every
        shape.

        Args:
            shapes: units of every shape, by family.
            budget: what is counted.
        """
        columns = {}
        for name, values in shapes.items():
            columns[name] = np.asarray(values, dtype=np.float64)
        columns = {
            **{name: np.asarray(float(value)) for name, value in self.full.items()},
            **columns,
        }
        if budget == "latency":
            total = _sum_seconds
        else:
            total = _count_numbers
        inside = total(self, self._inside, columns, budget)
        outside = total(self, self._outside, columns, budget)
        count = len(next(iter(shapes.values())))
        return np.broadcast_to(np.asarray(outside + columns[LAYERS] * inside), (count,))

    def _split_parameters(self) -> tuple[list[str], list[str]]:
        """The parameters of one layer, of which all others are copies, and those outside of the
        layers."""
        program_blocks = blocks(self.program)
        kinds = []
        for block in program_blocks:
            kinds.append(sorted(repr(self.dims[name]) for name in block.parameters))
        if any(kind != kinds[0] for kind in kinds):
            other = next(
                block.name
                for block, kind in zip(program_blocks, kinds, strict=True)
                if kind != kinds[0]
            )
            raise EditError(
                f"search: {program_blocks[0].name} and {other} are of different sizes: "
                "leave layers out"
            )
        inside = set()
        for block in program_blocks:
            for name in block.parameters:
                inside.add(name)
        return list(program_blocks[0].parameters), [
            name for name in self.dims if name not in inside
        ]

    def _dim_polynomials(self, name: str) -> tuple[Polynomial, ...]:
        """The polynomial of every dim of a parameter."""
        return tuple(self._axis_polynomial(axis) for axis in analyse(self.program).tensors[name][0])

    def _axis_polynomial(self, axis: Atom) -> Polynomial:
        """The size of an axis in units of the varied families."""
        atom = axis.resolve()
        if atom.kind is Kind.LEAF:
            if atom in self.leaves:
                return {(self.leaves[atom],): 1}
            return {(): atom.size}
        parts = [self._axis_polynomial(part) for part in atom.parts]
        if atom.kind is Kind.PRODUCT:
            return _multiply_polynomials(parts)
        return _add_polynomials(parts)


def _count_numbers(
    costs: ShapeCosts, names: Sequence[str], columns: Mapping[str, Array], budget: Budget
) -> Array:
    """Parameters or bytes of some parameters."""
    weights = {}
    for name in names:
        weights[name] = (
            costs.program.gm.get_parameter(name).element_size() if budget == "bytes" else 1
        )
    return _evaluate_polynomial(
        _add_polynomials(
            _multiply_polynomials([{(): weights[name]}, *costs.dims[name]]) for name in names
        ),
        columns,
    )


def _sum_seconds(
    costs: ShapeCosts, names: Sequence[str], columns: Mapping[str, Array], budget: Budget
) -> Array:
    """Time of the matrices among some parameters."""
    total = np.asarray(0.0)
    uses = matrix_uses(costs.program)
    for name in names:
        if name not in uses:
            continue
        sizes = []
        for dim in costs.dims[name]:
            sizes.append(_evaluate_polynomial(dim, columns))
        total = total + uses[name] * costs.table.seconds(
            sizes[0], sizes[1], costs.program.gm.get_parameter(name)
        )
    return total


def _multiply_polynomials(factors: Iterable[Polynomial]) -> Polynomial:
    """The product of polynomials."""
    product: Polynomial = {(): 1}
    for factor in factors:
        pairs = itertools.product(product.items(), factor.items())
        product = _add_polynomials({tuple(sorted((*a, *b))): m * n} for (a, m), (b, n) in pairs)
    return product


def _add_polynomials(terms: Iterable[Polynomial]) -> Polynomial:
    """The sum of polynomials, monomials sorted."""
    total: dict[tuple[str, ...], int] = {}
    for term in terms:
        for monomial, factor in term.items():
            total[monomial] = total.get(monomial, 0) + factor
    return dict(sorted(total.items()))


def _evaluate_polynomial(polynomial: Polynomial, columns: Mapping[str, Array]) -> Array:
    """The value of a polynomial for every shape."""
    total = np.asarray(0.0)
    for monomial, factor in polynomial.items():
        value = np.asarray(float(factor))
        for name in monomial:
            value = value * columns[name]
        total = total + value
    return total


def groups_to_search(program: Program, family: str) -> list[CoupledGroup]:
    """The groups of a family, which must be free and of one size.

    Args:
        program: the model.
        family: by name.

    Raises:
        EditError: they are not; says which.
    """
    groups = []
    for group in coupled_groups(program):
        if group.family == family:
            groups.append(group)
    if not groups:
        present = ", ".join(sorted({group.family for group in coupled_groups(program)}))
        raise EditError(f"search: the model has no group of family {family!r}; it has: {present}")
    if locked := [group for group in groups if group.locked]:
        raise EditError(f"search: {locked[0].name} must not be pruned: {locked[0].locked}")
    if len({group.units for group in groups}) > 1:
        sizes = sorted({group.units for group in groups})
        raise EditError(
            f"search: groups of family {family!r} have {sizes} units; one number cannot stand "
            "for all"
        )
    return groups


def shapes_within(
    choices: Mapping[str, Sequence[int]],
    cost: Callable[[Mapping[str, Sequence[int]]], Array],
    at_most: float,
    at_least: float,
    expansion: Sequence[float] = (),
) -> Iterator[Candidate]:
    """The shapes of a grid whose cost lies within a budget, the dearest first.

    Args:
        choices: numbers to choose among, by family.
        cost: of the shapes of the grid.
        at_most: highest cost.
        at_least: lowest cost.
        expansion: mlp units as multiples of hidden (then mlp is no choice of its own); a shape
            appears once, however it comes about.

    Raises:
        EditError: the grid is too large.
    """
    names = [*choices, *(["expansion"] if expansion else [])]
    grid = [*choices.values(), *([expansion] if expansion else [])]
    if (total := int(np.prod([len(values) for values in grid]))) > MOST:
        raise EditError(
            f"search: {total:,} shapes are too many (at most {MOST:,}): give fewer choices"
        )
    columns: dict[str, Any] = dict(
        zip(names, np.array(list(itertools.product(*grid))).T, strict=True)
    )
    if expansion:
        columns["mlp"] = np.rint(columns.pop("expansion") * columns["hidden"])
    table = np.unique(np.stack([columns[name] for name in columns], 1).astype(np.int64), axis=0)
    shapes = dict(zip(columns, table.T, strict=True))
    costs = cost(shapes)
    inside = np.flatnonzero((costs >= at_least) & (costs <= at_most))
    for row in inside[np.argsort(-costs[inside], kind="stable")]:
        yield Candidate(
            {name: int(column[row]) for name, column in shapes.items()}, float(costs[row])
        )
