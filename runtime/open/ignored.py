"""Stored tensors that a stock class leaves out on loading, such as multi-token-prediction blocks.

A class names patterns of tensors that it ignores.  What such a tensor belongs to is not part of the
captured graph, so that no edit reaches it: a result does not hold it, and its configuration must
not announce it either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import PretrainedConfig, PreTrainedModel

ANNOUNCING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Numbers of a configuration that announce blocks which a stock class may not build."""


def find_ignored(model: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """List the stored tensors of modules that a class does not build and ignores on loading.

    A stale buffer of a module that the class has, such as a rotary table, is none of them: the
    class derives it anew.

    Args:
        model: the stock model; the meta device will do.
        stored: names of the tensors in the folder.

    Returns:
        The names, in the order of the folder.
    """
    patterns = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    if not patterns:
        return []
    modules = {name for name, _ in model.named_modules()}
    known = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    ignored: list[str] = []
    for name in stored:
        if name in known or not any(pattern.search(name) for pattern in patterns):
            continue
        owner = name.rpartition(".")[0]
        places = {owner, f"{prefix}{owner}", owner.removeprefix(prefix)}
        if not places & modules:
            ignored.append(name)
    return ignored


def announced_blocks(config: PretrainedConfig) -> dict[str, int]:
    """Return the numbers by which a configuration announces blocks that its class does not build.

    Args:
        config: of the stock model; nested configurations are looked into.

    Returns:
        Number by dotted field, those above zero alone.
    """
    announced: dict[str, int] = {}
    for field in ANNOUNCING:
        number = getattr(config, field, None)
        if isinstance(number, int) and number > 0:
            announced[field] = number
    for key in config.sub_configs:
        nested = getattr(config, key, None)
        if isinstance(nested, PretrainedConfig):
            for field, number in announced_blocks(nested).items():
                announced[f"{key}.{field}"] = number
    return announced


def withdraw_announcement(config: PretrainedConfig) -> dict[str, int]:
    """Set the numbers of ``announced_blocks`` to zero, in place.

    Args:
        config: of the model that is about to be written.

    Returns:
        What they were before, by dotted field.
    """
    announced = announced_blocks(config)
    for field in announced:
        *path, leaf = field.split(".")
        owner = config
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, leaf, 0)
    return announced


def describe_ignored(names: list[str]) -> str:
    """Say which tensors are left out: ``37 tensors (mtp.norm.weight, ...)``."""
    shown = ", ".join(names[:3])
    if len(names) > 3:
        shown += ", ..."
    return f"{len(names)} tensors ({shown})"
