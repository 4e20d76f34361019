"""The table of passes.  To add one: its file, its row here, its test."""

from secateur.passes.base import Pass
from secateur.passes.distill import Distill
from secateur.passes.lower import Lower
from secateur.passes.options import Table
from secateur.passes.prune_width import PruneWidth
from secateur.passes.quantize import Quantize
from secateur.passes.repair import Repair
from secateur.passes.score import Score

PASSES: Table[Pass] = Table("a pass", Score, PruneWidth, Repair, Quantize, Lower, Distill)
