"""Tensors that a stock class ignores on loading, such as multi-token-prediction blocks: carried
over to a result byte for byte where every size that they share with the model stayed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from secateur.runtime.open.checkpoint import INDEX, SINGLE, TensorRecord, read_checkpoint
from secateur.runtime.open.ignored import find_ignored

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
SHARD = "model-{:05d}-of-{:05d}.safetensors"


@dataclass(frozen=True)
class IgnoredTensors:
    """What becomes of the tensors of a source that its class ignores.

    carried: name in the source by name in the result.
    left_out: names in the source of those that the result does not hold.
    reason: why those are left out.
    """

    carried: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    reason: str = ""


def plan_ignored(
    model: PreTrainedModel, source_model: PreTrainedModel, source: Path | None
) -> IgnoredTensors:
    """Decide which ignored tensors of a source go along.

    They belong to no group of the graph, so that no cut reaches them: they go along where no tensor
    of the model changed its shape. A block whose name holds a layer's number beyond the last layer
    is renumbered where layers were dropped, if the class ignores it under its new name, too.

    Args:
        model: that is about to be written.
        source_model: what it was made from.
        source: folder of that, or None.

    Returns:
        The plan; empty where the class ignores nothing.
    """
    if source is None or not any((source / name).is_file() for name in (SINGLE, INDEX)):
        return IgnoredTensors()
    records = read_checkpoint(source)
    ignored = find_ignored(source_model, records)
    if not ignored:
        return IgnoredTensors()
    if not _has_only_shapes_of(model, records):
        reason = "sizes of the model changed, and no cut reaches these tensors"
        return IgnoredTensors(left_out=tuple(ignored), reason=reason)
    num_layers = _count_layers(source_model)
    dropped = num_layers - _count_layers(model)
    carried: dict[str, str] = {}
    for name in ignored:
        carried[_renumber(name, num_layers, dropped)] = name
    if sorted(find_ignored(model, carried)) != sorted(carried):
        reason = "the class would not ignore them under the numbers that layers have now"
        return IgnoredTensors(left_out=tuple(ignored), reason=reason)
    return IgnoredTensors(carried=carried)


def write_carried(plan: IgnoredTensors, source: Path, folder: Path) -> None:
    """Add the tensors of a plan to a checkpoint folder, in a shard of their own.

    Args:
        plan: what goes along.
        source: folder of the source model.
        folder: of the result, as ``save_pretrained`` left it.
    """
    if not plan.carried:
        return
    records = read_checkpoint(source)
    tensors: dict[str, torch.Tensor] = {}
    for new_name, name in plan.carried.items():
        with safe_open(records[name].file, framework="pt") as file:
            tensors[new_name] = file.get_tensor(name)
    places = _shards_of(folder)
    total = len(set(places.values())) + 1
    renamed: dict[str, str] = {}
    for number, file_name in enumerate(sorted(set(places.values())), 1):
        renamed[file_name] = SHARD.format(number, total)
        (folder / file_name).rename(folder / renamed[file_name])
    last = SHARD.format(total, total)
    save_file(tensors, folder / last, metadata={"format": "pt"})
    weight_map = {name: renamed[place] for name, place in places.items()}
    weight_map |= dict.fromkeys(tensors, last)
    sizes = sum((folder / place).stat().st_size for place in {*renamed.values(), last})
    index = {"metadata": {"total_size": sizes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _shards_of(folder: Path) -> dict[str, str]:
    """Return the file of each tensor of a checkpoint folder."""
    return {name: record.file.name for name, record in read_checkpoint(folder).items()}


def _has_only_shapes_of(model: PreTrainedModel, records: Mapping[str, TensorRecord]) -> bool:
    """Tell whether every tensor of a model has a shape that the same tensor of some layer has in
    the source."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, record in records.items():
        shapes.setdefault(NUMBER.sub("N", name), set()).add(record.shape)
    stored: Iterable[tuple[str, Any]] = model.state_dict().items()
    for name, tensor in stored:
        known = shapes.get(NUMBER.sub("N", name))
        if known is not None and tuple(tensor.shape) not in known:
            return False
    return True


def _count_layers(model: PreTrainedModel) -> int:
    return int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))


def _renumber(name: str, num_layers: int, dropped: int) -> str:
    """Return the name of a tensor whose layer number counts on from the last layer, after some
    layers were dropped."""
    if not dropped:
        return name

    def shift(match: re.Match[str]) -> str:
        number = int(match.group())
        return str(number - dropped if number >= num_layers else number)

    return NUMBER.sub(shift, name, count=1)
