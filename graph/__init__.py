"""What a model is: capture, axis atoms, rules, coupled groups, rewriting, verification."""

from secateur.graph.analysis import analyse
from secateur.graph.blocks import Block, SubBlock, blocks
from secateur.graph.capture import capture
from secateur.graph.chain import Chain, Stage, chain
from secateur.graph.coupling import FAMILIES, CoupledGroup, Member, coupled_groups, coupling_graph
from secateur.graph.drop import drop
from secateur.graph.errors import SecateurError
from secateur.graph.masked import masked_call
from secateur.graph.parts import Part, parts
from secateur.graph.pattern import Pattern, Share, parse_pattern
from secateur.graph.permute import permute
from secateur.graph.program import Cut, Program, Source, Step
from secateur.graph.rewrite import keep, with_parameters
from secateur.graph.rules import axis_rule
from secateur.graph.sparse import Sparse
from secateur.graph.verifier import verify

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
