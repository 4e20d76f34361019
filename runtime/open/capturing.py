"""From a folder, an id or a module to a Program: the first step of every script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from secateur.graph import Program
from secateur.graph import capture as capture_module
from secateur.runtime.open.declared import read_declared
from secateur.runtime.open.source import open_model


def capture(model: nn.Module | str | Path, example_inputs: Any = None) -> Program:
    """Capture a model as a Program: an FX graph of ATen ops over its Parameter objects.

    Args:
        model: a checkpoint folder, a Hugging Face id, a PreTrainedModel, or any nn.Module; the meta
            device will do.
        example_inputs: a tensor, a tuple, or a dict by argument name; needed where the model's
            configuration does not say what it takes.

    Returns:
        The Program; sparse weights that the folder declares are declared in it.

    Raises:
        SourceError: a folder that cannot be opened safely.
        CaptureError: names the module and the reason.
    """
    if isinstance(model, nn.Module):
        return capture_module(model, example_inputs)
    path = Path(model)
    folder = path if path.is_dir() else None
    program = capture_module(open_model(model), example_inputs, folder=folder)
    return program.replace(sparse=read_declared(path))
