"""What may be done to a Program: passes, their options, and pipelines of them."""

from secateur.passes.base import Context, Pass, PassResult, PlannedEdit, Progress
from secateur.passes.data import CalibrationError, Sample, samples
from secateur.passes.importance import IMPORTANCES, Importance
from secateur.passes.pipeline import Hooks, Pipeline
from secateur.passes.prune_width import PruneWidth
from secateur.passes.recipe import DataSpec
from secateur.passes.registry import PASSES
from secateur.passes.repair import Repair
from secateur.passes.score import Score

__all__ = [
    "IMPORTANCES",
    "PASSES",
    "CalibrationError",
    "Context",
    "DataSpec",
    "Hooks",
    "Importance",
    "Pass",
    "PassResult",
    "Pipeline",
    "PlannedEdit",
    "Progress",
    "PruneWidth",
    "Repair",
    "Sample",
    "Score",
    "samples",
]
