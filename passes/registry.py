"""The table of passes.  To add one: its file, its row here, its test."""

from secateur.passes.adapt_lora import AdaptLora
from secateur.passes.allocate import Allocate
from secateur.passes.base import Pass
from secateur.passes.compensate import Compensate
from secateur.passes.distill import Distill
from secateur.passes.fill_dropped import FillDropped
from secateur.passes.fill_widths import FillWidths
from secateur.passes.importance import IMPORTANCES, Importance
from secateur.passes.lower import Lower
from secateur.passes.options import Table
from secateur.passes.permute_channels import PermuteChannels
from secateur.passes.plugins import load_class
from secateur.passes.prune_depth import PruneDepth
from secateur.passes.prune_width import PruneWidth
from secateur.passes.quantize import Quantize
from secateur.passes.reconstruct import Reconstruct
from secateur.passes.repair import Repair
from secateur.passes.retrain_sparse import RetrainSparse
from secateur.passes.score import Score
from secateur.passes.search import Search
from secateur.passes.sparsify import Sparsify

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
    """Let pipeline texts and recipes name a pass or an importance of another module, ``module:Class``.

    Raises: PluginError: see ``plugins.load_class``; or its name is taken.
    """
    found = load_class(where, (Pass, Importance))
    (PASSES if issubclass(found, Pass) else IMPORTANCES).add(found)
