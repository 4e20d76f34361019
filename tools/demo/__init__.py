"""The demo: a real model, pruned and measured before and after."""

from secateur.tools.demo.command import demo_command
from secateur.tools.demo.compare import FULL, SHORT, Comparison, Measured, Size, compare

__all__ = ["FULL", "SHORT", "Comparison", "Measured", "Size", "compare", "demo_command"]
