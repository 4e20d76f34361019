"""What may be done to a Program: passes, their options, and pipelines of them."""

from secateur.passes.adapt_lora import AdaptLora
from secateur.passes.allocate import Allocate
from secateur.passes.base import Context, Pass, PassResult, PlannedEdit, Progress
from secateur.passes.data import CalibrationError, Sample, samples
from secateur.passes.distill import Distill
from secateur.passes.importance import IMPORTANCES, Importance
from secateur.passes.lower import Lower
from secateur.passes.permute_channels import PermuteChannels
from secateur.passes.pipeline import Hooks, Pipeline
from secateur.passes.prune_depth import PruneDepth
from secateur.passes.prune_width import PruneWidth
from secateur.passes.quantize import Quantize
from secateur.passes.recipe import DataSpec
from secateur.passes.reconstruct import Reconstruct
from secateur.passes.registry import PASSES
from secateur.passes.repair import Repair
from secateur.passes.score import Score
from secateur.passes.sparsify import Sparsify

__all__ = [
    "IMPORTANCES",
    "PASSES",
    "AdaptLora",
    "Allocate",
    "CalibrationError",
    "Context",
    "DataSpec",
    "Distill",
    "Hooks",
    "Importance",
    "Lower",
    "Pass",
    "PassResult",
    "PermuteChannels",
    "Pipeline",
    "PlannedEdit",
    "Progress",
    "PruneDepth",
    "PruneWidth",
    "Quantize",
    "Reconstruct",
    "Repair",
    "Sample",
    "Score",
    "Sparsify",
    "samples",
]
