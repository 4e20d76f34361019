"""Infinite numbers in a configuration: the two ways in which files spell them."""

from __future__ import annotations

import json
from typing import Any

from transformers import PretrainedConfig

from secateur.graph.program import JSON

TAG = "__float__"
VALUES = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def decode_special_floats(data: object) -> Any:
    """The same JSON value with every tagged number as a number.

    Transformers 5 writes ``{"__float__": "Infinity"}``; transformers 4 wrote the bare word
    ``Infinity``, which Python's reader takes for a number already.

    Args:
        data: a value as read from JSON.

    Returns:
        A copy; what is no tag is left as it is.
    """
    if isinstance(data, dict):
        tag = data.get(TAG)
        if len(data) == 1 and isinstance(tag, str) and tag in VALUES:
            return VALUES[tag]
        return {key: decode_special_floats(value) for key, value in data.items()}
    if isinstance(data, list):
        return [decode_special_floats(value) for value in data]
    return data


def config_values(config: PretrainedConfig) -> JSON:
    """Every field of a configuration as a reader of its JSON sees it.

    Args:
        config: a configuration of transformers.

    Returns:
        Plain JSON values, infinite numbers as numbers.
    """
    values = decode_special_floats(json.loads(config.to_json_string(use_diff=False)))
    assert isinstance(values, dict)
    return values
