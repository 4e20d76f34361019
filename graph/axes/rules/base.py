"""What an axis rule is: one function an op, that ties the axes of its operands and results.

Look-up order: exact overload (``aten::view.dtype``), op (``aten::view``), its in-place form
(``aten::add_``), the tag
``torch.Tag.pointwise``, else ``UnsupportedOp``.  Nothing is elementwise by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from secateur.graph.axes.atoms import Atom, Keep, Space

Axes = list[Atom]
Value = Sequence[Atom] | Sequence["Value"] | None
Rule = Callable[["Op"], Value]
Rewrite = Callable[[fx.Node, Keep], None]

DATA = "its size comes with the input"
RULES: dict[str, Rule] = {}


def axis_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register one rule for ops or overloads, named as in their schema (``aten::linear``); a second
    row is an error."""

    def register_rule(rule: Rule) -> Rule:
        """Enter the rule under every name."""
        for name in names:
            if name in RULES:
                raise ValueError(f"{name} has an axis rule already: {RULES[name].__name__}")
            RULES[name] = rule
        return rule

    return register_rule


def find_rule(target: torch._ops.OpOverload) -> Rule | None:
    """The rule of an overload, or None when it has none."""
    name = target._schema.name
    overload = target._schema.overload_name
    if name.endswith("_") and not name.endswith("__"):
        functional = name[:-1]
    else:
        functional = name
    for key in (f"{name}.{overload}", name, functional):
        if key in RULES:
            return RULES[key]
    if torch.Tag.pointwise in target.tags:
        return RULES["tag::pointwise"]
    return None


class State(Protocol):
    """What a rule sees of the analysis at work."""

    space: Space
    domains: dict[Any, Atom]
    minima: list[tuple[Atom, int]]
    generated: list[fx.Node]

    def axes_of(self, node: fx.Node) -> Value:
        """The axes of a node's value; a list of lists where it has several, None where it has
        none."""

    def int_of(self, value: Any) -> int:
        """A size as a number: sizes of the input are stood for by distinct primes."""

    def is_symbolic(self, value: Any) -> bool:
        """Whether a size depends on the input."""

    def is_pure_data(self, value: Any) -> bool:
        """Whether a size comes from the input alone, without a factor of the model."""

    def record_role(self, node: fx.Node, axis: Atom, role: str) -> None:
        """Note what an axis of a parameter does: produces, consumes, scales or looks up."""

    def comes_from_parameters(self, node: Any) -> bool:
        """Whether a value is computed from parameters alone."""

    def constant_value(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor of a node that is a constant of the graph, or None."""

    def add_rewrite(self, node: fx.Node, rewrite: Rewrite) -> None:
        """Run a rewrite on this node's copy at every edit."""


class Op:
    """One call of the graph, as a rule sees it: arguments by schema name, axes, and the means to
    tie and to rewrite."""

    def __init__(self, node: fx.Node, state: State) -> None:
        assert isinstance(node.target, torch._ops.OpOverload)
        self.node, self.state, self.space = node, state, state.space
        self.name = (
            node.target._schema.name.split("::")[1].rstrip("_")
            or node.target._schema.name.split("::")[1]
        )
        self.value: Any = node.meta.get("val")
        self.args: dict[str, Any] = {
            a.name: a.default_value if a.has_default_value() else None
            for a in node.target._schema.arguments
        }
        self.args |= {
            a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)
        } | node.kwargs

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def first_argument(self, *names: str) -> Any:
        """The argument under the first of several names that the schema knows."""
        return next((self.args[n] for n in names if n in self.args), None)

    def integer_value(self, value: Any) -> int:
        """A size argument as a number.

        Args:
            value: a number, a symbol, or the node of one.
        """
        return self.state.int_of(value)

    # Axes
    def axes(self, operand: Any) -> Axes:
        """The axes of a tensor operand; [] for a scalar."""
        found = self.state.axes_of(operand) if isinstance(operand, fx.Node) else []
        return list(found) if found else []  # type: ignore[arg-type]

    def tensors(self) -> Iterator[fx.Node]:
        """Tensor operands in order, lists opened."""
        for value in self.args.values():
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, fx.Node) and isinstance(item.meta.get("val"), torch.Tensor):
                    yield item

    def sizes(self, value: Any = None) -> list[int]:
        """Integer sizes of the result (or of one of several); input sizes are stood for by distinct
        primes."""
        return [self.integer_value(d) for d in (self.value if value is None else value).shape]

    def dim(self, rank: int, *names: str) -> int:
        """The argument ``dim``, counted from the front."""
        value = self.first_argument(*(names or ("dim",)))
        if rank:
            return int(value if value is not None else 0) % rank
        return 0

    def make_fresh_axes(self, value: Any = None, lock: str | None = None) -> Axes:
        """New axes in the shape of the result; dims of the input's size are locked as data."""
        if value is None:
            value = self.value
        else:
            value = value
        out = []
        for size in value.shape:
            atom = Atom(self.integer_value(size))
            reasons = []
            for r in (lock, DATA if self.state.is_pure_data(size) else None):
                if r:
                    reasons.append(r)
            atom.locks.update(reasons)
            out.append(atom)
        return out

    def is_data(self, atom: Atom) -> bool:
        """Whether an axis has a size that comes with the input.

        Args:
            atom: axis.
        """
        return any(DATA in leaf.locks for leaf in atom.leaves())

    def lock(self, axes: Sequence[Atom], reason: str) -> None:
        """Forbid to prune axes.

        Args:
            axes: of any operand or result.
            reason: a phrase that follows "locked:"; the name of this node is added.
        """
        for atom in axes:
            self.space.lock(atom, f"{reason} ({self.node.name})")

    def broadcast(self, operands: Sequence[Axes], rank: int) -> Axes:
        """Tie operands aligned at the right; axes of size one stretch."""
        out: Axes = []
        for i in range(rank):
            present = []
            for a in operands:
                if len(a) >= rank - i and a[i - rank].size != 1:
                    present.append(a[i - rank])
            for other in present[1:]:
                self.space.unify(present[0], other)
            out.append(present[0].resolve() if present else Atom(1))
        return out

    def split_range(self, source: Atom, start: int, length: int) -> tuple[Atom, Atom, Atom] | None:
        """An axis as what lies before, in and after a range; None, and a lock, when the range cuts
        across units."""
        parts = self.space.split_concat(source, [start, length, source.size - start - length])
        if parts is None:
            self.space.conflicts.append(
                f"{self.node.name}: cannot cut {length} from {start} of {source}"
            )
            self.lock([source], "cut across its units")
            return None
        return parts[0], parts[1], parts[2]

    # Index domains
    def index_domain(self, operand: Any) -> Atom | None:
        """The axis whose positions are the values of an index tensor, when known."""
        return self.state.domains.get(operand)

    def set_domain(self, axis: Atom | None, output: int | None = None) -> None:
        """Declare that the values of a result count along an axis.

        Args:
            axis: whose positions the values are; None declares nothing.
            output: number of the result where the op has several.
        """
        if axis is not None:
            self.state.domains[self.node if output is None else (self.node, output)] = axis

    def index_into(
        self, axis: Atom, index: Any, reason: str = "looked up by an index from outside"
    ) -> None:
        """An index tensor reads or writes an axis: fine when its values count along that very axis,
        else a lock."""
        domain = self.index_domain(index)
        if domain is not None and domain.size == axis.size:
            self.space.unify(domain, axis)
        elif axis.size > 1:
            self.lock([axis], reason)

    # Rewriting
    def add_rewrite(self, rewrite: Rewrite) -> None:
        """Run at an edit, on this node's copy in the new graph."""
        self.state.add_rewrite(self.node, rewrite)

    def resize_list(self, name: str, axes: Sequence[Atom], start: int = 0) -> None:
        """Argument ``name`` is a list of sizes, one for each axis from ``start`` on."""

        def apply(node: fx.Node, keep: Keep) -> None:
            """Write the new sizes into the copy."""
            sizes = list(get_arg(node, name))
            for i, atom in enumerate(axes, start):
                if i < len(sizes) and keep.touches(atom):
                    sizes[i] = resize_argument(node, sizes[i], atom.size, keep.size(atom))
            set_arg(node, name, sizes)

        self.add_rewrite(apply)

    def resize(self, name: str, atom: Atom, size: Callable[[Keep], int]) -> None:
        """Argument ``name`` is an int that follows an axis."""

        def apply(node: fx.Node, keep: Keep) -> None:
            """Write the new number into the copy."""
            if keep.touches(atom):
                set_arg(node, name, size(keep))

        self.add_rewrite(apply)


def resize_argument(node: fx.Node, value: Any, old: int, new: int) -> Any:
    """A size argument after an edit: -1 stays, an int becomes the new size, a symbolic size is
    scaled."""
    if isinstance(value, fx.Node):
        shared = math.gcd(old, new)
        old = old // shared
        new = new // shared
        with node.graph.inserting_before(node):
            rows = node.graph.call_function(_divide_sizes, (value, old))
            scaled = node.graph.call_function(_multiply_sizes, (rows, new))
        symbol = value.meta.get("val")
        if symbol is not None:
            rows.meta["val"], scaled.meta["val"] = symbol // old, symbol // old * new
        return scaled
    if value == -1:
        return value
    return new


def _divide_sizes(a: int, b: int) -> int:
    return a // b


def _multiply_sizes(a: int, b: int) -> int:
    return a * b


def get_arg(node: fx.Node, name: str) -> Any:
    """An argument of a call by its schema name."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            default = None
            if argument.has_default_value():
                default = argument.default_value
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, default)
    raise KeyError(f"{node.target} has no argument {name}")


def set_arg(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument of a call by its schema name, where it stands."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
