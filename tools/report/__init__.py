"""What a person looks at: tables and pictures."""

from secateur.tools.report.curves import Panel, draw_curves
from secateur.tools.report.picture import draw_groups
from secateur.tools.report.tables import (
    inspection_tables,
    pass_tables,
    plan_tables,
    recipe_tables,
    run_tables,
)

__all__ = [
    "Panel",
    "draw_curves",
    "draw_groups",
    "inspection_tables",
    "pass_tables",
    "plan_tables",
    "recipe_tables",
    "run_tables",
]
