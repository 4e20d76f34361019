"""The demo: a real model, pruned and measured before and after."""

from secateur.tools.demo.command import demo_command
from secateur.tools.demo.compare import (
    FULL,
    SHORT,
    Comparison,
    DemoSize,
    ModelMeasures,
    compare_models,
)

__all__ = [
    "FULL",
    "SHORT",
    "Comparison",
    "DemoSize",
    "ModelMeasures",
    "compare_models",
    "demo_command",
]
