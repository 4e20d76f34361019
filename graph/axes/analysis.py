"""Run the axis rules over a graph: the atoms of every value, the constants that follow them, who
uses what."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import fx

from secateur.graph.axes.atoms import Atom, Space
from secateur.graph.axes.rules import DATA, Axes, Op, Value, find_rule
from secateur.graph.axes.rules.base import Rewrite
from secateur.graph.axes.rules.pointwise import POINTWISE_NAMES
from secateur.graph.capture.calls import get_attribute
from secateur.graph.errors import UnsupportedOp
from secateur.graph.program import Program

INPUT = "the model's input"
OUTPUT = "the model's output"
_SCALARS = (torch.SymInt, torch.SymBool, torch.SymFloat, bool, int, float)
_MOVES = """
    view reshape _unsafe_view view_copy flatten unflatten squeeze unsqueeze permute t transpose
    numpy_T mT movedim expand expand_as repeat repeat_interleave slice narrow select split
    split_with_sizes chunk unbind cat stack index index_select
    """.split()


class _SizesDisagree(Exception):
    """A rule's sizes are not the traced ones: the symbols were specialised; try the traced sizes as
    they are."""


class Analysis:
    """Atoms of every value of a graph.

    tensors: parameter and buffer name -> (axes, tensor); a tied tensor appears once, under its
        first name.
    values: node -> axes (a list of them for several results, None for scalars).
    domains: index tensor (a node or ``(node, output)``) -> axis that its values count along.
    rewrites: (node, function): run on the node's copy by an edit.
    generated: nodes whose values go by position; an edit selects after them.
    roles: (tensor name, axis, role).
    minima: (axis, least number of units that must stay).
    """

    def __init__(self, gm: fx.GraphModule, names: dict[int, str], by_hint: bool = False) -> None:
        self.gm, self.space, self.by_hint = gm, Space(), by_hint
        self.tensors: dict[str, tuple[Axes, torch.Tensor]] = {}
        self.values: dict[fx.Node, Value] = {}
        self.domains: dict[Any, Atom] = {}
        self.rewrites: list[tuple[fx.Node, Rewrite]] = []
        self.generated: list[fx.Node] = []
        self.roles: list[tuple[str, Atom, str]] = []
        self.minima: list[tuple[Atom, int]] = []
        self.parameter_names = {names[id(p)] for p in gm.parameters()}
        self.tensor_of: dict[fx.Node, str] = {}
        self._names = names
        self._origins: dict[fx.Node, frozenset[str]] = {}
        self._symbols: dict[sympy.Symbol, int] = {}
        self._prime = 1000
        for node in gm.graph.nodes:
            self.space.where = node.name
            getattr(self, f"_visit_{node.op}")(node)

    # What rules see
    def axes_of(self, node: fx.Node) -> Value:
        """The axes of a node's value, or None where it has none.

        Args:
            node: that was visited.
        """
        return self.values.get(node)

    def add_rewrite(self, node: fx.Node, rewrite: Rewrite) -> None:
        """Run a rewrite on this node's copy at every edit.

        Args:
            node: of the captured graph.
            rewrite: gets the copy and what is kept.
        """
        self.rewrites.append((node, rewrite))

    def comes_from_parameters(self, node: Any) -> bool:
        """Whether a value is computed from parameters alone.

        Args:
            node: or any argument of a node.
        """
        return node in self._origins

    def constant_value(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor that a node holds when it is a constant of the graph, not a parameter and not
        computed."""
        name = self.tensor_of.get(node)
        if name is None or name in self.parameter_names or self.tensors[name][1].is_meta:
            return None
        return self.tensors[name][1]

    def record_role(self, node: fx.Node, axis: Atom, role: str) -> None:
        """Note what an axis of a parameter does: produces, consumes, scales or looks up.

        Args:
            node: value computed from parameters.
            axis: of that value.
            role: verb of the table of members.
        """
        for name in self._origins.get(node, ()):
            self.roles.append((name, axis, role))

    def is_symbolic(self, value: Any) -> bool:
        """Whether a size depends on the input.

        Args:
            value: a number, a symbol, or the node of one.
        """
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        return isinstance(value, torch.SymInt) and not self._expression_of(value).is_number

    def is_pure_data(self, value: Any) -> bool:
        """Whether a size comes from the input alone; ``batch * 4`` may hold four heads."""
        return self.is_symbolic(value) and self._expression_of(value).as_coeff_Mul()[0] == 1

    def int_of(self, value: Any) -> int:
        """An int for a size.  Input sizes become distinct primes, so that factoring a view is plain
        arithmetic."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if not isinstance(value, torch.SymInt):
            return int(value)
        if self.by_hint and value.node.has_hint():
            return int(value.node.hint)
        expr = self._expression_of(value)
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self._symbols:
                self._prime = int(sympy.nextprime(self._prime))
                self._symbols[symbol] = self._prime
        return int(expr.subs(self._symbols))

    @staticmethod
    def _expression_of(value: torch.SymInt) -> Any:
        return value.node.expr

    # One method a kind of node
    def _visit_placeholder(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            axes = [self.space.make_locked_leaf(self.int_of(size), INPUT) for size in value.shape]
            for atom, size in zip(axes, value.shape, strict=True):
                if self.is_symbolic(size):
                    atom.locks.add(DATA)
            self.values[node] = axes

    def _visit_get_attr(self, node: fx.Node) -> None:
        owner = get_attribute(self.gm, str(node.target))
        if not isinstance(owner, torch.Tensor):
            return
        name = self._names.get(id(owner), str(node.target))
        if name not in self.tensors:
            self.tensors[name] = ([Atom(size) for size in owner.shape], owner)
        self.values[node], self.tensor_of[node] = self.tensors[name][0], name
        self._origins[node] = frozenset([name])

    def _visit_call_function(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.target is operator.getitem:
            self._visit_getitem(node)
        elif not isinstance(node.target, torch._ops.OpOverload):
            if value is not None and not isinstance(value, _SCALARS):
                raise UnsupportedOp(describe_missing_rule(node))
        else:
            rule = find_rule(node.target)
            if rule is not None:
                self.values[node] = rule(Op(node, self))
                self._check_sizes(node, value)
                self._trace_origin(node)
            elif value is not None and not isinstance(value, _SCALARS):
                raise UnsupportedOp(describe_missing_rule(node))

    def _visit_getitem(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        at: Any = node.args[1]
        values: Any = self.values.get(source)
        if values is not None:
            self.values[node] = values[at]
        else:
            self.values[node] = None
        if (source, at) in self.domains:
            self.domains[node] = self.domains[source, at]
        if source in self._origins:
            self._origins[node] = self._origins[source]

    def _visit_output(self, node: fx.Node) -> None:
        for source in self._find_frozen_outputs(node):
            for axes in flat_axes(self.values.get(source)):
                for atom in axes:
                    self.space.lock(atom, OUTPUT)

    def _find_frozen_outputs(self, node: fx.Node) -> list[fx.Node]:
        """The outputs whose shape is the model's face: all of a tuple, the first of a record such
        as ModelOutput."""
        info = getattr(self.gm.graph._codegen, "pytree_info", None)
        plain = info is None or info.out_spec.type in (tuple, list, dict, None)
        outputs = []
        for x in node.all_input_nodes:
            if isinstance(x.meta.get("val"), torch.Tensor):
                outputs.append(x)
        if plain:
            return outputs
        return outputs[:1]

    # Helpers
    def _check_sizes(self, node: fx.Node, value: Any) -> None:
        for axes, tensor in zip(
            flat_axes(self.values[node]), _iterate_tensors(value), strict=False
        ):
            if [a.size for a in axes] != [self.int_of(s) for s in tensor.shape]:
                raise _SizesDisagree(
                    f"{node.name} ({node.target}): rule {axes}, traced {tuple(tensor.shape)}"
                )

    def _trace_origin(self, node: fx.Node) -> None:
        """Values made of parameters alone, by moves and pointwise ops, keep the names of those
        parameters."""
        assert isinstance(node.target, torch._ops.OpOverload)
        name = node.target._schema.name.split("::")[1].rstrip("_")
        sources = [
            n
            for n in node.all_input_nodes
            if isinstance(n.meta.get("val"), torch.Tensor) or n in self._origins
        ]
        moves = name in _MOVES or name in POINTWISE_NAMES or torch.Tag.pointwise in node.target.tags
        if moves and sources and all(n in self._origins for n in sources):
            self._origins[node] = frozenset().union(*(self._origins[n] for n in sources))


def flat_axes(value: Value) -> Iterator[Axes]:
    """The axes of a value, one list a result."""
    if value is None:
        return
    atoms = [item for item in value if isinstance(item, Atom)]
    if len(atoms) == len(value):
        yield atoms
        return
    for item in value:
        assert not isinstance(item, Atom)
        yield from flat_axes(item)


def _iterate_tensors(value: Any) -> Iterator[torch.Tensor]:
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, torch.Tensor):
            yield item


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward made a node, "" for the model's own."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = []
    for entry in stack.values():
        if isinstance(entry[0], str):
            paths.append(entry[0])
    if paths:
        return paths[-1]
    return ""


def layer_path(path: str) -> str:
    """A dotted path up to its first number: the layer of a list of layers; "" where there is
    none."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return ""
    return ".".join(parts[: at + 1])


def describe_missing_rule(node: fx.Node) -> str:
    """What to tell about an op without a rule."""
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name
    else:
        name = str(node.target)
    return (
        f"no axis rule for {node.target} (node {node.name}, module "
        f"{module_path(node) or 'the model itself'}): "
        "which of its axes are tied is not known, and it is not guessed.  "
        f"Register one with @axis_rule({name!r}), see graph/rules/."
    )


_cache: WeakKeyDictionary[Program, Analysis] = WeakKeyDictionary()


def analyse(program: Program) -> Analysis:
    """The axis analysis of a Program, computed once.

    Raises:
        UnsupportedOp: an op of the graph has no rule.
    """
    if program not in _cache:
        _cache[program] = _run_analysis(program.gm)
    return _cache[program]


def _run_analysis(gm: fx.GraphModule) -> Analysis:
    names = {id(t): n for n, t in [*gm.named_buffers(), *gm.named_parameters()]}
    try:
        return Analysis(gm, names)
    except _SizesDisagree:
        try:
            return Analysis(gm, names, by_hint=True)
        except _SizesDisagree as error:
            raise UnsupportedOp(
                f"the axis rule disagrees with the traced sizes at {error}"
            ) from None
