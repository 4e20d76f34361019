"""How a program is opened, kept, loaded, run and handed on."""

from secateur.runtime.artifact import Draft, Manifest, check_target, read_manifest, verify_artifact, writing
from secateur.runtime.compress import compress
from secateur.runtime.config_plan import ConfigPlan, StockMisfit, plan_config
from secateur.runtime.engine import open_engine
from secateur.runtime.huggingface import SaveReport, load, save, save_weights
from secateur.runtime.lowered_graph import lower_graph
from secateur.runtime.lowering import running
from secateur.runtime.package import load_package, write_package
from secateur.runtime.raising import Raised, raise_model, raise_with_plan
from secateur.runtime.resume import ResumeError, working
from secateur.runtime.source import open_model
from secateur.runtime.verify import verify_folder

__all__ = [
    "ConfigPlan",
    "Draft",
    "Manifest",
    "Raised",
    "ResumeError",
    "SaveReport",
    "StockMisfit",
    "check_target",
    "compress",
    "load",
    "load_package",
    "lower_graph",
    "open_engine",
    "open_model",
    "plan_config",
    "raise_model",
    "raise_with_plan",
    "read_manifest",
    "running",
    "save",
    "save_weights",
    "verify_artifact",
    "verify_folder",
    "working",
    "write_package",
    "writing",
]
