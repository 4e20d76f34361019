"""Secateur: a pruning compiler for language models.

::

    program = secateur.capture("path/to/model")
    groups = secateur.coupled_groups(program)
    program = secateur.Pipeline.parse("score{metric=taylor},prune-width{ratio=0.25}").run(program,
    data=windows) secateur.save(program, "path/to/smaller")
    model = secateur.load("path/to/smaller")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from secateur import graph as _graph
from secateur.graph import (
    CoupledGroup,
    Member,
    Program,
    SecateurError,
    coupled_groups,
    coupling_graph,
    keep,
    masked_call,
    verify,
)
from secateur.passes import Pipeline
from secateur.runtime import (
    compress,
    load,
    open_engine,
    open_model,
    plan_config,
    running,
    save,
    save_weights,
    to_transformers,
    verify_folder,
)
from secateur.runtime.open.declared import read_declared

__version__ = "0.2.0.dev0"

# Names that earlier versions had, and what they are called now.
RENAMED = {"raise_model": "to_transformers"}


if not TYPE_CHECKING:  # a checker shall see that other names are missing

    def __getattr__(name: str) -> NoReturn:
        if name in RENAMED:
            raise AttributeError(f"secateur.{name} is called secateur.{RENAMED[name]} now")
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def capture(model: nn.Module | str | Path, example_inputs: Any = None) -> Program:
    """Capture a model as a Program: an FX graph of ATen ops over its Parameter objects.

    Args:
        model: a checkpoint folder, a Hugging Face id, a PreTrainedModel, or any nn.Module; the meta
            device will do.
        example_inputs: a tensor, a tuple, or a dict by argument name; needed where the model's
            configuration does not say what it takes.

    Raises:
        SourceError: a folder that cannot be opened safely.
        CaptureError: names the module and the reason.
    """
    if isinstance(model, nn.Module):
        return _graph.capture(model, example_inputs)
    folder = Path(model)
    program = _graph.capture(
        open_model(model), example_inputs, folder=folder if folder.is_dir() else None
    )
    return program.replace(sparse=read_declared(folder))


__all__ = [
    "CoupledGroup",
    "Member",
    "Pipeline",
    "Program",
    "SecateurError",
    "capture",
    "compress",
    "coupled_groups",
    "coupling_graph",
    "keep",
    "load",
    "masked_call",
    "open_engine",
    "open_model",
    "plan_config",
    "running",
    "save",
    "save_weights",
    "to_transformers",
    "verify",
    "verify_folder",
]
