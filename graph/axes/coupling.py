"""Coupled groups: what must be pruned together.

The axis analysis leaves one leaf atom for every set of units that stay or go together.  Here those
leaves become a networkx graph whose nodes are places (a parameter, a buffer or a value of the FX
graph that carries the leaf) and whose edges are the ops that tie them; its connected components are
the coupled groups, the dependency criterion of LLM-Pruner (Ma et al. 2023, arXiv:2305.11627,
section 3.1) applied to axes instead of whole neurons.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import networkx as nx
import torch
from torch import fx

from secateur.graph.axes.analysis import OUTPUT, Analysis, analyse, flat_axes, layer_path
from secateur.graph.axes.atoms import Atom, axis_labels, unit_positions
from secateur.graph.axes.coordinates import find_outers
from secateur.graph.program import Cut, Program

FAMILIES = {
    "hidden": "channels of the residual stream",
    "mlp": "neurons between two projections",
    "kv_heads": "attention heads; under grouped queries a key/value head with all its query heads",
    "query_heads": "query heads that share one key/value head: equally many for each, its own "
    "ones or the same",
    "head_dim": "channels inside an attention head; rotary pairs stay whole",
    "experts": "experts of a mixture, with their router rows",
    "channels": "convolution channels",
    "latent": "a normalised low-rank bottleneck",
    "vocabulary": "tokens",
    "table": "rows of a look-up table other than the vocabulary",
    "outputs": "what the model returns",
    "kernel": "the extent of a convolution kernel",
    "other": "none of these",
}
BY_COORDINATE = {
    "query_heads"
}  # families whose units may differ from one unit of an outer group to the next
_NORMS = {
    "normalized",
    "reduced by mean",
    "reduced by var",
    "reduced by var_mean",
    "reduced by linalg_vector_norm",
}


class Place(NamedTuple):
    """A node of the coupling graph: a tensor or value that carries a leaf."""

    name: str
    kind: str
    leaf: int


@dataclass(frozen=True, eq=False)
class Member:
    """One dim of a parameter (or buffer) that a group's units run through.

    parameter: name in the source model; a tied parameter goes by its first name.
    role: "produces" (output rows, biases), "consumes" (input columns), "scales" (norm weights and
        other elementwise factors), "looks_up" (embedding).
    """

    parameter: str
    dim: int
    role: str
    _axis: Atom = field(repr=False)
    _leaf: Atom = field(repr=False)
    _outer: Atom | None = field(default=None, repr=False)
    _as_cells: bool = field(default=False, repr=False)

    @cached_property
    def positions(self) -> torch.Tensor:
        """[units, k] int64: the positions along ``dim`` of each unit, ascending."""
        if self._as_cells:
            return self.cells.flatten(0, 1)
        return torch.from_numpy(unit_positions(self._axis, self._leaf))

    @cached_property
    def cells(self) -> torch.Tensor:
        """[units, coordinates, k] int64: the positions of each unit at each coordinate of the
        group, ascending."""
        positions = torch.from_numpy(unit_positions(self._axis, self._leaf))
        if self._outer is None:
            return positions[:, None]
        where = torch.from_numpy(axis_labels(self._axis, self._outer))[positions]
        order = torch.argsort(where, dim=1, stable=True)
        return positions.gather(1, order).reshape(len(positions), self._outer.size, -1)

    def indices(self, unit: int) -> torch.Tensor:
        """[k] int64: the positions along ``dim`` that belong to one unit."""
        return self.positions[unit]

    def positions_of(self, mask: torch.Tensor) -> torch.Tensor:
        """The positions along ``dim`` of some units, unordered: [n] int64.

        Args:
            mask: [units] bool, or [units, coordinates] for units at some coordinates only.
        """
        if mask.dim() == 1:
            chosen = self.positions[mask]
        else:
            chosen = self.cells[mask]
        return chosen.flatten()


@dataclass(frozen=True, eq=False)
class CoupledGroup:
    """Units that stay or go together, and everywhere they appear.

    name: unique in its Program and stable over edits, e.g. ``mlp@model.layers.3.mlp``.
    family: a key of FAMILIES.
    units: how many.
    locked: why no unit may go, or None.
    members: dims of parameters.
    buffers: dims of buffers and constants, sliced along with them.
    block: path of the residual layer that holds the group, "" when it runs through several.
    min_units: at least so many must stay (a top-k needs k experts).
    within: name of the group (key/value heads) for each of whose units other units of this one
        (query heads) may stay, as long as they are equally many; None where a unit stays or goes
        everywhere.
    coordinates: how many units that group has; 1 where there is none.
    """

    name: str
    family: str
    units: int
    locked: str | None
    members: list[Member]
    buffers: list[Member]
    block: str
    min_units: int
    leaf: Atom = field(repr=False)
    within: str | None = None
    coordinates: int = 1
    outer: Atom | None = field(default=None, repr=False)

    def mask(self, kept: torch.Tensor) -> torch.Tensor:
        """[units] bool of kept units [n]; [units, coordinates] bool of those at each coordinate [n,
        coordinates]."""
        if kept.dim() == 1:
            return torch.zeros(self.units, dtype=torch.bool).index_fill(0, kept, True)
        return torch.zeros(self.units, self.coordinates, dtype=torch.bool).scatter(0, kept, True)

    def as_cells(self) -> CoupledGroup:
        """The same group with each unit at each coordinate as a unit of its own, unit after unit:
        to be scored, not to be edited."""
        if self.outer is None:
            return self
        members, buffers = (
            [replace(member, _as_cells=True) for member in found]
            for found in (self.members, self.buffers)
        )
        return replace(self, units=self.units * self.coordinates, members=members, buffers=buffers)

    def __repr__(self) -> str:
        if self.locked:
            state = f", locked: {self.locked}"
        else:
            state = ""
        return f"CoupledGroup({self.name}, {self.units} units, {len(self.members)} members{state})"


_cache: WeakKeyDictionary[Program, list[CoupledGroup]] = WeakKeyDictionary()


def coupled_groups(program: Program) -> list[CoupledGroup]:
    """All groups of more than one unit that own a parameter, in the order of the source model's
    parameters.

    Raises:
        UnsupportedOp: an op of the graph has no axis rule.
    """
    if program not in _cache:
        _cache[program] = _find_groups(program)
    return _cache[program]


def coupling_graph(program: Program) -> nx.Graph:
    """The graph whose connected components are the coupled groups.

    Nodes are Places with ``dims`` (where the leaf runs in the tensor); edges carry ``op`` (name of
    the FX node that ties its ends) and ``target``.  ``networkx.shortest_path`` between two
    parameters says why they are coupled.
    """
    analysis = analyse(program)
    graph: nx.Graph = nx.Graph()
    held: dict[fx.Node, dict[Atom, Place]] = {}
    for node in analysis.gm.graph.nodes:
        held[node] = _leaf_places(analysis, node)
        for leaf, place in held[node].items():
            graph.add_node(place, dims=_dims_of_leaf(analysis, node, leaf))
        if node.op != "call_function":
            continue
        around = [held[node], *(held[n] for n in node.all_input_nodes)]
        for leaf in set().union(*around):
            first, *others = [places[leaf] for places in around if leaf in places]
            graph.add_edges_from(
                (first, other, {"op": node.name, "target": str(node.target)}) for other in others
            )
    return graph


def _leaf_places(analysis: Analysis, node: fx.Node) -> dict[Atom, Place]:
    """The leaves that a node's value carries, as axes or as the domain of its integers."""
    name = node.name
    kind = "value"
    if node.op == "get_attr":
        name = analysis.tensor_of.get(node, node.name)
        if name in analysis.parameter_names:
            kind = "parameter"
        else:
            kind = "buffer"
    axes = [atom for group in flat_axes(analysis.values.get(node)) for atom in group]
    domains = []
    for key in (node, (node, 0), (node, 1)):
        if key in analysis.domains:
            domains.append(analysis.domains[key])
    leaves = {leaf for atom in [*axes, *domains] for leaf in atom.leaves() if leaf.size > 1}
    return {leaf: Place(name, kind, leaf.number) for leaf in leaves}


def _dims_of_leaf(analysis: Analysis, node: fx.Node, leaf: Atom) -> tuple[int, ...]:
    axes = next(flat_axes(analysis.values.get(node)), [])
    return tuple(d for d, atom in enumerate(axes) if leaf in atom.leaves())


# Groups
def _find_groups(program: Program) -> list[CoupledGroup]:
    analysis = analyse(program)
    roles = _collect_roles(analysis)
    members: dict[Atom, list[Member]] = defaultdict(list)
    buffers: dict[Atom, list[Member]] = defaultdict(list)
    rank = {name: i for i, (name, _) in enumerate(program.source.model.named_parameters())}
    for name, (axes, _) in sorted(
        analysis.tensors.items(), key=lambda item: rank.get(item[0], len(rank))
    ):
        for dim, axis in enumerate(axes):
            for leaf in dict.fromkeys(axis.leaves()):
                if leaf.size > 1:
                    if name in analysis.parameter_names:
                        into = members
                    else:
                        into = buffers
                    into[leaf].append(
                        Member(name, dim, roles.get((name, leaf, dim), "scales"), axis, leaf)
                    )
    outers = find_outers(
        analysis,
        [leaf for leaf, own in members.items() if _classify_family(leaf, own) in BY_COORDINATE],
    )
    outers = {leaf: outer for leaf, outer in outers.items() if outer in members}
    for leaf, outer in outers.items():
        for found in (members, buffers):
            found[leaf] = [replace(member, _outer=outer) for member in found.get(leaf, [])]
    known = None
    if program.cut:
        known = _KnownNames(program.cut)
    minima = {leaf: least for atom, least in analysis.minima for leaf in atom.leaves()}
    taken: dict[str, int] = defaultdict(int)
    groups = []
    for leaf, own in members.items():
        family = _classify_family(leaf, own)
        prefix = _common_path(m.parameter for m in own)
        name = (known and known.dense_name(own[0])) or (f"{family}@{prefix}" if prefix else family)
        taken[name] += 1
        groups.append(
            CoupledGroup(
                name=name if taken[name] == 1 else f"{name}#{taken[name]}",
                family=family,
                units=leaf.size,
                locked="; ".join(sorted(leaf.locks)) or None,
                members=own,
                buffers=buffers.get(leaf, []),
                block=layer_path(prefix),
                min_units=minima.get(leaf, 1),
                leaf=leaf,
                coordinates=outers[leaf].size if leaf in outers else 1,
                outer=outers.get(leaf),
            )
        )
    names = {group.leaf: group.name for group in groups}
    return [
        group if group.outer is None else replace(group, within=names[group.outer])
        for group in groups
    ]


def _collect_roles(analysis: Analysis) -> dict[tuple[str, Atom, int], str]:
    """What an axis of a parameter does, by the first op that says so; a product tells more than a
    scale."""
    ranked = sorted(analysis.roles, key=lambda row: row[2] == "scales")
    found: dict[tuple[str, Atom, int], str] = {}
    for name, atom, role in ranked:
        leaves = set(atom.leaves())
        for dim, axis in enumerate(analysis.tensors[name][0]):
            for leaf in leaves.intersection(axis.leaves()):
                found.setdefault((name, leaf, dim), role)
    return found


def _classify_family(leaf: Atom, members: list[Member]) -> str:
    roles = [m.role for m in members]
    made = roles.count("produces") + roles.count("looks_up")
    read = roles.count("consumes")
    makers = len({m.parameter.rpartition(".")[0] for m in members if m.role == "produces"})
    beside = {other for m in members for other in m._axis.leaves()} - {leaf}
    shared = any("heads" in other.marks and "broadcast" not in other.marks for other in beside)
    inner = "head_dim" in leaf.marks and "looks_up" not in roles
    normed = bool(_NORMS & leaf.marks)
    tests = {
        "vocabulary": "vocabulary" in leaf.marks,
        "table": "table" in leaf.marks,
        "hidden": normed
        and made >= 2
        and read >= 2
        and not {"heads", "experts"} & leaf.marks
        and not inner,
        "kernel": "kernel" in leaf.marks,
        "outputs": OUTPUT in leaf.locks,
        "experts": bool({"experts", "chosen"} & leaf.marks),
        "query_heads": "queries" in leaf.marks
        or ({"heads", "broadcast"} <= leaf.marks and (shared or makers < 2)),
        "kv_heads": "heads" in leaf.marks,
        "head_dim": "head_dim" in leaf.marks,
        "channels": "conv" in leaf.marks,
        "latent": normed and made > 0 and read > 0,
        "mlp": made > 0 and read > 0,
    }
    return next((family for family, holds in tests.items() if holds), "other")


def _common_path(names: Iterable[str]) -> str:
    """The module path that all parameters share."""
    paths = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


class _KnownNames:
    """The names that groups had before any edit, by the positions of their units in the dense
    parameters."""

    def __init__(self, cut: Cut) -> None:
        self.kept = cut.kept
        self.members: dict[tuple[str, int], list[tuple[CoupledGroup, Member]]] = defaultdict(list)
        for group in coupled_groups(cut.dense):
            for member in group.members:
                self.members[member.parameter, member.dim].append((group, member))

    def dense_name(self, member: Member) -> str | None:
        """The name of the dense group of which a member's units are what is left, or None."""
        there = self.members[member.parameter, member.dim]
        size = max((int(dense.positions.max()) + 1 for _, dense in there), default=0)
        stayed = self._remaining_positions(there, size)
        if len(stayed) <= int(member.positions.max()):
            return None
        for group, dense in there:
            unit_at = self._unit_at(group, dense, size)
            units = unit_at[stayed[member.positions]]
            left = torch.bincount(unit_at[stayed] + 1, minlength=group.units + 1)[1:]
            one_each = bool((units == units[:, :1]).all()) and len(units[:, 0].unique()) == len(
                units
            )
            if (
                one_each
                and bool((units >= 0).all())
                and bool((left[units[:, 0]] == units.shape[1]).all())
            ):
                return group.name
        return None

    def _remaining_positions(
        self, there: list[tuple[CoupledGroup, Member]], size: int
    ) -> torch.Tensor:
        """The dense positions along a dim that are left, ascending."""
        mask = torch.ones(size, dtype=torch.bool)
        for group, member in there:
            if group.name in self.kept:
                mask[member.positions_of(~group.mask(self.kept[group.name]))] = False
        return mask.nonzero()[:, 0]

    def _unit_at(self, group: CoupledGroup, dense: Member, size: int) -> torch.Tensor:
        """[size]: the unit at each dense position, -1 for none; where units were kept by
        coordinate, the place of a unit among those kept at its coordinate."""
        unit_at = torch.full((size,), -1)
        kept = self.kept.get(group.name)
        if kept is None or kept.dim() == 1:
            unit_at[dense.positions] = torch.arange(group.units)[:, None]
            return unit_at
        cells = dense.cells[kept, torch.arange(group.coordinates)]  # [kept, coordinates, k]
        unit_at[cells] = torch.arange(len(kept))[:, None, None]
        return unit_at
