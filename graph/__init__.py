"""What a model is: capture, axis atoms, rules, coupled groups, rewriting, verification."""

from secateur.graph.analysis import analyse
from secateur.graph.capture import capture
from secateur.graph.coupling import FAMILIES, CoupledGroup, Member, coupled_groups, coupling_graph
from secateur.graph.errors import SecateurError
from secateur.graph.masked import masked_call
from secateur.graph.program import Cut, Program, Source, Step
from secateur.graph.rewrite import keep, with_parameters
from secateur.graph.rules import axis_rule
from secateur.graph.verifier import verify

__all__ = [
    "FAMILIES",
    "CoupledGroup",
    "Cut",
    "Member",
    "Program",
    "SecateurError",
    "Source",
    "Step",
    "analyse",
    "axis_rule",
    "capture",
    "coupled_groups",
    "coupling_graph",
    "keep",
    "masked_call",
    "verify",
    "with_parameters",
]
