"""How a program is opened, kept, loaded, run and handed on."""

from typing import TYPE_CHECKING, NoReturn

from secateur.runtime.compress import compress
from secateur.runtime.open.source import open_model
from secateur.runtime.packed.graph import lower_graph
from secateur.runtime.packed.store import running
from secateur.runtime.resume.folder import ResumeError, hold_work_folder
from secateur.runtime.save.artifact import (
    Draft,
    Manifest,
    check_target,
    read_manifest,
    verify_artifact,
    write_artifact,
)
from secateur.runtime.save.stock_checkpoint import SaveReport, load, save, save_weights
from secateur.runtime.serving.engine import open_engine
from secateur.runtime.serving.package import load_package, write_package
from secateur.runtime.stock.config_search import ConfigPlan, UnsupportedConfigError, plan_config
from secateur.runtime.stock.to_transformers import (
    TransformersModel,
    to_transformers,
    to_transformers_with_plan,
)
from secateur.runtime.verify import verify_folder

RENAMED = {
    "Raised": "TransformersModel",
    "StockMisfit": "UnsupportedConfigError",
    "raise_model": "to_transformers",
    "raise_with_plan": "to_transformers_with_plan",
    "working": "hold_work_folder",
    "writing": "write_artifact",
}
"""Names that earlier versions had, and what they are called now."""


if not TYPE_CHECKING:  # a checker shall see that other names are missing

    def __getattr__(name: str) -> NoReturn:
        if name in RENAMED:
            raise AttributeError(
                f"secateur.runtime.{name} is called secateur.runtime.{RENAMED[name]} now"
            )
        raise AttributeError(f"module 'secateur.runtime' has no attribute {name!r}")


__all__ = [
    "ConfigPlan",
    "Draft",
    "Manifest",
    "ResumeError",
    "SaveReport",
    "TransformersModel",
    "UnsupportedConfigError",
    "check_target",
    "compress",
    "hold_work_folder",
    "load",
    "load_package",
    "lower_graph",
    "open_engine",
    "open_model",
    "plan_config",
    "read_manifest",
    "running",
    "save",
    "save_weights",
    "to_transformers",
    "to_transformers_with_plan",
    "verify_artifact",
    "verify_folder",
    "write_artifact",
    "write_package",
]
