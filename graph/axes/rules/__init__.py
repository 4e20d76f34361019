"""The table of axis rules: a row an op.  Importing this package fills it."""

from secateur.graph.axes.rules import contraction, factory, indexing, movement, pointwise, reduction
from secateur.graph.axes.rules.base import (
    DATA,
    RULES,
    Axes,
    Op,
    Rule,
    Value,
    axis_rule,
    find_rule,
    get_arg,
    set_arg,
)

__all__ = [
    "DATA",
    "RULES",
    "Axes",
    "Op",
    "Rule",
    "Value",
    "axis_rule",
    "contraction",
    "factory",
    "find_rule",
    "get_arg",
    "indexing",
    "movement",
    "pointwise",
    "reduction",
    "set_arg",
]
