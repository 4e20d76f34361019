"""What a model is: capture, axis atoms, rules, coupled groups, rewriting, verification."""

from secateur.graph.axes.analysis import analyse
from secateur.graph.axes.coupling import (
    FAMILIES,
    CoupledGroup,
    Member,
    coupled_groups,
    coupling_graph,
)
from secateur.graph.axes.rules import axis_rule
from secateur.graph.blocks.chain import Chain, Stage, chain
from secateur.graph.blocks.find import Block, SubBlock, blocks
from secateur.graph.blocks.parts import Part, parts
from secateur.graph.capture.export import capture
from secateur.graph.edit.drop import drop
from secateur.graph.edit.permute import permute
from secateur.graph.edit.rewrite import keep, with_parameters
from secateur.graph.errors import SecateurError
from secateur.graph.oracle.masked import masked_call
from secateur.graph.oracle.verifier import verify
from secateur.graph.pattern import Pattern, Share, parse_pattern
from secateur.graph.program import Cut, Program, Source, Step
from secateur.graph.sparse import Sparse

__all__ = [
    "FAMILIES",
    "Block",
    "Chain",
    "CoupledGroup",
    "Cut",
    "Member",
    "Part",
    "Pattern",
    "Program",
    "SecateurError",
    "Share",
    "Source",
    "Sparse",
    "Stage",
    "Step",
    "SubBlock",
    "analyse",
    "axis_rule",
    "blocks",
    "capture",
    "chain",
    "coupled_groups",
    "coupling_graph",
    "drop",
    "keep",
    "masked_call",
    "parse_pattern",
    "parts",
    "permute",
    "verify",
    "with_parameters",
]
