"""Importance estimators, one a file.  To add one: its file, its row here, its test."""

from secateur.passes.importance.activation import Activation
from secateur.passes.importance.base import Importance, aggregate, normalize
from secateur.passes.importance.magnitude import Magnitude
from secateur.passes.importance.random import Random
from secateur.passes.importance.taylor import Taylor
from secateur.passes.options import Table

IMPORTANCES: Table[Importance] = Table("an importance", Random, Magnitude, Taylor, Activation)

__all__ = ["IMPORTANCES", "Activation", "Importance", "Magnitude", "Random", "Taylor", "aggregate", "normalize"]
