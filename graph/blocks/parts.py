"""The graph cut at its sub-blocks: attention and MLP as stages of their own."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import fx

from secateur.graph.blocks.block import SubBlock
from secateur.graph.blocks.chain import Chain, Stage, make_stage
from secateur.graph.blocks.find import blocks
from secateur.graph.program import Program


@dataclass(frozen=True, eq=False)
class Part:
    """A stage that ends where sub-blocks do.

    name: of its sub-blocks, joined by "+" where several are added at once.
    start, end: names of the stream before and after.
    parameters: names in the source model of those that the sub-blocks alone read.
    """

    name: str
    stage: Stage
    sub_blocks: tuple[SubBlock, ...]
    start: str
    end: str
    parameters: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Parts:
    """chain: the whole Program, cut where sub-blocks begin and end.
    by_stage: the stages that are sub-blocks.
    """

    chain: Chain
    by_stage: dict[Stage, Part]


_cache: WeakKeyDictionary[Program, Parts] = WeakKeyDictionary()


def parts(program: Program) -> Parts:
    """A Program as a chain of its sub-blocks and what stands between them.

    Raises:
        UnsupportedOp: no residual block is found.
    """
    if program not in _cache:
        _cache[program] = _find_parts(program)
    return _cache[program]


def _find_parts(program: Program) -> Parts:
    nodes = [node for node in program.gm.graph.nodes if node.op not in ("get_attr", "output")]
    ends: dict[fx.Node, list[SubBlock]] = {}
    for block in blocks(program):
        for sub in block.sub_blocks:
            ends.setdefault(sub.end, []).append(sub)
    cuts = {*ends, *(sub.start for found in ends.values() for sub in found)}
    stages = list[Stage]()
    by_stage = dict[Stage, Part]()
    run = list[fx.Node]()
    for node in nodes:
        run.append(node)
        if node in cuts or node is nodes[-1]:
            stage = make_stage("+".join(sub.name for sub in ends.get(node, ())) or "between", run)
            stages.append(stage)
            if node in ends:
                by_stage[stage] = _make_part(stage, ends[node])
            run = []
    return Parts(Chain(program, stages), by_stage)


def _make_part(stage: Stage, subs: list[SubBlock]) -> Part:
    owned = tuple(dict.fromkeys(name for sub in subs for name in sub.parameters))
    return Part(stage.name, stage, tuple(subs), subs[0].start.name, subs[0].end.name, owned)
