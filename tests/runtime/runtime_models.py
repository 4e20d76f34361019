"""Small models and programs for the runtime tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from secateur.graph import capture, coupled_groups, keep
from secateur.graph.program import Program
from secateur.runtime.open.classes import build_on_meta, model_class

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 64, "n_head": 8, "n_layer": 2, "vocab_size": 96, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}


def tiny(
    config_name: str, class_name: str | None = None, *, meta: bool = False, **fields: Any
) -> PreTrainedModel:
    """A small model with random weights large enough that every head matters."""
    config = getattr(transformers, config_name)(**fields)
    cls = getattr(transformers, class_name) if class_name else model_class(config)
    if meta:
        return build_on_meta(cls, config)
    torch.manual_seed(0)
    model = cls(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def pruned(model: PreTrainedModel, folder: Path | None = None, **parts: float) -> Program:
    """The program of a model with this part of the units of each family kept, the same number
    everywhere."""
    program = capture(model, folder=folder)
    chosen = {}
    for group in coupled_groups(program):
        if not group.locked and group.family in parts:
            count = round(group.units * parts[group.family])
            chosen[group] = torch.randperm(group.units)[:count].sort().values.tolist()
    assert chosen
    return keep(program, chosen)
