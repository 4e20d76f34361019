"""Importance estimators, one a file.  To add one: its file, its row here, its test."""

from secateur.passes.importance.activation import Activation
from secateur.passes.importance.base import Importance, aggregate_members, normalize_scores
from secateur.passes.importance.fisher import Fisher
from secateur.passes.importance.flap import Flap
from secateur.passes.importance.magnitude import Magnitude
from secateur.passes.importance.obs import Obs
from secateur.passes.importance.perplexity import Perplexity
from secateur.passes.importance.random import Random
from secateur.passes.importance.taylor import Taylor
from secateur.passes.importance.wanda import Wanda
from secateur.passes.language.options import Table

IMPORTANCES: Table[Importance] = Table(
    "an importance",
    Random,
    Magnitude,
    Taylor,
    Activation,
    Wanda,
    Flap,
    Fisher,
    Obs,
    Perplexity,
    base=Importance,
    plugins="secateur.importances",
)

__all__ = [
    "IMPORTANCES",
    "Activation",
    "Fisher",
    "Flap",
    "Importance",
    "Magnitude",
    "Obs",
    "Perplexity",
    "Random",
    "Taylor",
    "Wanda",
    "aggregate_members",
    "normalize_scores",
]
