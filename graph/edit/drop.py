"""Remove residual blocks or sub-blocks: the stream goes past them, and what only they computed is
gone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from types import MappingProxyType
from typing import Any

from torch import fx

from secateur.graph.axes.analysis import analyse
from secateur.graph.axes.coupling import CoupledGroup, coupled_groups
from secateur.graph.blocks.chain import Stage, stage_module
from secateur.graph.blocks.find import Block, SubBlock, blocks
from secateur.graph.blocks.residual import sum_of
from secateur.graph.capture.calls import accept_calls_of, get_attribute, is_mutable, trace_alias
from secateur.graph.edit.rewrite import copy_graph
from secateur.graph.errors import EditError
from secateur.graph.program import Cut, Program
from secateur.graph.sparse import keep_entries

Part = Block | SubBlock


def drop(program: Program, names: Iterable[str]) -> Program:
    """A new Program without the named blocks or sub-blocks; the given Program stays usable.

    A block hands its input on.  A sub-block adds nothing; where the sum that it was alone in is
    followed by a norm of its own (post-norm), the norm goes with it.  Names of nodes and parameters
    stay as they are: layers are numbered anew only in a stock checkpoint.  Works on the meta
        device.

    Args:
        names: of ``blocks(program)`` or of their sub-blocks.

    Raises:
        EditError: an unknown name, a block that must stay, or nothing would stay.
    """
    parts = resolve_drop(program, names)
    if not parts:
        return program.replace()
    graph, copies = copy_graph(program.gm)
    remove_parts(parts, graph, copies)
    gm = _make_module(program.gm, graph)
    before = program.cut or Cut(program, MappingProxyType({}))
    dropped = [*before.dropped, *(part.name for part in parts if part.name not in before.dropped)]
    smaller = program.replace(
        gm=gm, scores=MappingProxyType({}), cut=Cut(before.dense, before.kept, tuple(dropped))
    )
    _check_groups(program, smaller)
    _keep_conflicts(program, smaller)
    left = {name for name, _ in smaller.named_parameters()}
    stay = set()
    for g in coupled_groups(before.dense):
        if any(m.parameter in left for m in g.members):
            stay.add(g.name)
    kept = {name: units for name, units in before.kept.items() if name in stay}
    cut = Cut(before.dense, MappingProxyType(kept), tuple(dropped))
    return smaller.replace(cut=cut, sparse=keep_entries(program.sparse, left))


def resolve_drop(program: Program, names: Iterable[str]) -> list[Part]:
    """The named parts in the order of the graph; sub-blocks of a named block are left out."""
    found = {part.name: part for part in _iterate_parts(program)}
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in found:
            raise EditError(f"no block {name!r} in this program; it has: {', '.join(found)}")
        if (reason := found[name].locked) is not None:
            raise EditError(f"{name} must stay: {reason}")
    whole = [block for block in blocks(program) if block.name in wanted]
    if len(whole) == len(blocks(program)):
        raise EditError("all residual blocks are named, and one must stay")
    covered = {sub.name for block in whole for sub in block.sub_blocks}
    return [part for name, part in found.items() if name in wanted and name not in covered]


def _iterate_parts(program: Program) -> Iterator[Part]:
    for block in blocks(program):
        yield block
        yield from block.sub_blocks


def module_without(stage: Stage, names: Iterable[str]) -> fx.GraphModule:
    """The module of a block's stage without some of its sub-blocks; takes and gives what
    ``stage.module`` does."""
    assert stage.block is not None
    wanted = set(names)
    module, copies = stage_module(stage)
    remove_parts(
        [sub for sub in stage.block.sub_blocks if sub.name in wanted], module.graph, copies
    )
    module.recompile()
    return module


def remove_parts(parts: Iterable[Part], graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
    """In a copy of the graph, let the readers of what parts make read what it would be without
    them; erase the rest."""
    gone = {copies[node] for part in parts for node in part.nodes if node in copies}
    silent = set[tuple[fx.Node, int]]()
    for part in parts:
        if isinstance(part, Block) or part.alone:
            _redirect_readers(copies, part.end, part.start)
        else:
            _remove_addend(copies, part.branch.add, part.branch.place, silent)
    remove_dead(graph, gone)


def _remove_addend(
    copies: dict[fx.Node, fx.Node], add: fx.Node, place: int, silent: set[tuple[fx.Node, int]]
) -> None:
    """Take an addend out of a sum; a sum that lost both is out of the sum that it stands in."""
    silent.add((add, place))
    if (add, 1 - place) in silent:
        outer = sum_of(add)
        _remove_addend(copies, outer.add, outer.place, silent)
    else:
        other: Any = add.args[1 - place]
        _redirect_readers(copies, add, other)


def _redirect_readers(copies: dict[fx.Node, fx.Node], old: fx.Node, new: fx.Node) -> None:
    """Read ``new`` instead of ``old``, in parts that are removed later, too."""
    before = copies[old]
    after = copies[new]
    before.replace_all_uses_with(after)
    copies.update({node: after for node, copy in copies.items() if copy is before})


def remove_dead(graph: fx.Graph, gone: Collection[fx.Node] = ()) -> None:
    """Erase what nothing reads; inputs stay, and so do ops that write into what is read, but for
    those in ``gone``."""
    output = next(iter(reversed(graph.nodes)))
    writers = [node for node in graph.nodes if is_mutable(node) and node not in gone]
    live = {output}
    queue = [output]
    while queue:
        node = queue.pop()
        reached = {*node.all_input_nodes, *(w for w in writers if trace_alias(w) in live)}
        queue += reached - live
        live |= reached
    for node in reversed(list(graph.nodes)):
        if node not in live and node.op != "placeholder":
            graph.erase_node(node)


def _make_module(old: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    targets = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            targets.add(str(node.target))
    gm = fx.GraphModule(
        {t: get_attribute(old, t) for t in targets}, graph, class_name=old._get_name()
    )
    gm.meta = dict(old.meta)
    accept_calls_of(gm, old)
    gm.graph.lint()
    return gm


def _check_groups(before: Program, after: Program) -> None:
    """Every group that stays is the group of that name.

    Raises:
        EditError: a dropped part alone held a group together.
    """
    old = {group.name: group for group in coupled_groups(before)}
    for group in coupled_groups(after):
        same = old.get(group.name)
        if (
            same is None
            or same.units != group.units
            or not _member_dims(group) <= _member_dims(same)
        ):
            raise EditError(
                f"the units of {group.name} hang together by what would be dropped: drop "
                "other blocks"
            )


def _keep_conflicts(before: Program, after: Program) -> None:
    """Axes that did not align before need not now; nothing was resized, but the first place where
    it shows may move."""
    if analyse(before).space.conflicts:
        found = {conflict.split(":")[0] for conflict in analyse(after).space.conflicts}
        after.gm.meta["conflicts"] = before.gm.meta.get("conflicts", set()) | found


def _member_dims(group: CoupledGroup) -> set[tuple[str, int]]:
    return {(member.parameter, member.dim) for member in group.members}
