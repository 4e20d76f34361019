"""The numbers that a class derives from its configuration and that no checkpoint holds: scales,
slopes, frequencies.

Pruning keeps the trained ones; a stock class computes its own.  Where the two differ, the class
cannot hold the model, however well the shapes fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

Constant = float | torch.Tensor
RELATIVE = 1e-6
SHOWN = 3


def constants_of(model: nn.Module) -> dict[str, Constant]:
    """Floating attributes of the modules and floating buffers, by dotted name.

    Args:
        model: with its buffers; parameters may be on the meta device.
    """
    constants: dict[str, Constant] = {}
    for path, module in model.named_modules():
        prefix = ""
        if path:
            prefix = f"{path}."
        for name, value in vars(module).items():
            if isinstance(value, float):
                constants[f"{prefix}{name}"] = value
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            constants[name] = buffer
    return constants


def find_changes(before: Mapping[str, Constant], after: Mapping[str, Constant]) -> dict[str, str]:
    """Constants of the same name and shape whose values differ, with both values in words.

    Args:
        before: of the source model.
        after: of the smaller one, under the same names.
    """
    changes: dict[str, str] = {}
    for name, old in before.items():
        if name in after and _is_different(old, after[name]):
            changes[name] = _describe_change(old, after[name])
    return changes


def describe_changes(constants: Mapping[str, str]) -> str:
    """A sentence on changed constants, or nothing."""
    if not constants:
        return ""
    few = ", ".join(f"{name} ({words})" for name, words in list(constants.items())[:SHOWN])
    if len(constants) > SHOWN:
        few += f" and {len(constants) - SHOWN} more"
    return f"The class derives constants from these numbers, and they would change: {few}. "


def _is_different(old: Constant, new: Constant) -> bool:
    before = torch.as_tensor(old).double()
    after = torch.as_tensor(new).double()
    if before.shape != after.shape:
        return False
    return not torch.allclose(before, after, rtol=RELATIVE, atol=0.0, equal_nan=True)


def _describe_change(old: Constant, new: Constant) -> str:
    if isinstance(old, float) or old.numel() == 1:
        return f"{float(old):.6g} -> {float(new):.6g}"
    return f"{old.numel()} numbers"
