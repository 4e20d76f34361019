"""What passes that train share: text, losses, a teacher, a student, the loop, and steps that
outlive a kill."""

from secateur.passes.training.chunked import Losses, Weights, compute_chunked_losses
from secateur.passes.training.rows import HeadRows, LogitRows, Rows, TopRows, top_rows

__all__ = [
    "HeadRows",
    "LogitRows",
    "Losses",
    "Rows",
    "TopRows",
    "Weights",
    "compute_chunked_losses",
    "top_rows",
]
