"""The table of passes.  To add one: its file, its row here, its test."""

from secateur.passes.base import Pass
from secateur.passes.depth.fill_dropped import FillDropped
from secateur.passes.depth.prune_depth import PruneDepth
from secateur.passes.importance import IMPORTANCES, Importance
from secateur.passes.importance.score import Score
from secateur.passes.language.options import Table
from secateur.passes.language.plugins import load_class
from secateur.passes.lowering.lower import Lower
from secateur.passes.lowering.quantize import Quantize
from secateur.passes.repair.compensate import Compensate
from secateur.passes.repair.reconstruct import Reconstruct
from secateur.passes.repair.repair import Repair
from secateur.passes.search.search import Search
from secateur.passes.sparsity.permute_channels import PermuteChannels
from secateur.passes.sparsity.sparsify import Sparsify
from secateur.passes.training.adapt_lora import AdaptLora
from secateur.passes.training.distill import Distill
from secateur.passes.training.retrain_sparse import RetrainSparse
from secateur.passes.width.allocate import Allocate
from secateur.passes.width.fill_widths import FillWidths
from secateur.passes.width.prune_width import PruneWidth

PASSES: Table[Pass] = Table(
    "a pass",
    Score,
    PruneWidth,
    PruneDepth,
    Allocate,
    Search,
    Repair,
    Compensate,
    PermuteChannels,
    Sparsify,
    Reconstruct,
    Quantize,
    Lower,
    Distill,
    AdaptLora,
    RetrainSparse,
    FillDropped,
    FillWidths,
    base=Pass,
    plugins="secateur.passes",
)


def add_plugin(where: str) -> None:
    """Let pipeline texts and recipes name a pass or an importance of another module,
    ``module:Class``.

    Args:
        where: ``module:Class`` of a Pass or an Importance.

    Raises:
        PluginError: see ``plugins.load_class``; or its name is taken.
    """
    plugin = load_class(where, (Pass, Importance))
    (PASSES if issubclass(plugin, Pass) else IMPORTANCES).add_class(plugin)
