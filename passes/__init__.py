"""What may be done to a Program: passes, their options, and pipelines of them."""

from secateur.passes.base import Context, Pass, PassResult, PlannedEdit, Progress
from secateur.passes.calibration.data import CalibrationError, Sample, samples
from secateur.passes.depth.prune_depth import PruneDepth
from secateur.passes.importance import IMPORTANCES, Importance
from secateur.passes.importance.score import Score
from secateur.passes.language.recipe import DataSpec
from secateur.passes.lowering.lower import Lower
from secateur.passes.lowering.quantize import Quantize
from secateur.passes.pipeline import Hooks, Pipeline
from secateur.passes.registry import PASSES
from secateur.passes.repair.reconstruct import Reconstruct
from secateur.passes.repair.repair import Repair
from secateur.passes.sparsity.permute_channels import PermuteChannels
from secateur.passes.sparsity.sparsify import Sparsify
from secateur.passes.training.adapt_lora import AdaptLora
from secateur.passes.training.distill import Distill
from secateur.passes.width.allocate import Allocate
from secateur.passes.width.prune_width import PruneWidth

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
