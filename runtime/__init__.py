"""How a program is opened, kept, loaded, run and handed on."""

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
