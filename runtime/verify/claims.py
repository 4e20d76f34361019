"""What a folder claims of its zeros: our manifest and packed plan, and ``sparsity_config`` of other
tools.

A claim is checked, never believed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.graph import parse_pattern
from secateur.graph.errors import SourceError
from secateur.graph.pattern import Pattern, Share
from secateur.runtime.open.declared import read_declared
from secateur.runtime.packed.store import FOLDER, PLAN, has_packed, read_plan
from secateur.runtime.save.artifact import MANIFEST

JSON = Mapping[str, Any]
FIELD = "sparsity_config"
UNSTRUCTURED = ("0:0", "unstructured", "None", "")


@dataclass(frozen=True)
class Claim:
    """One weight is said to be sparse.

    source: which file says so.
    tensor: its name in the model.
    """

    source: str
    tensor: str
    pattern: Pattern | Share


@dataclass(frozen=True)
class Overall:
    """Some weights together are said to hold a share of zeros, 0..1."""

    source: str
    tensors: tuple[str, ...]
    share: float


def from_manifest(folder: Path) -> Iterator[Claim]:
    """What an artifact of ours says."""
    for name, weight in read_declared(folder).items():
        yield Claim(MANIFEST, name, weight.pattern)


def from_plan(folder: Path) -> Iterator[Claim]:
    """Weights that lie in a packed 2:4 form."""
    if has_packed(folder):
        for row in read_plan(folder / FOLDER).packed_layers:
            if row.kind.startswith("2:4"):
                yield Claim(f"{FOLDER}/{PLAN}", row.layer, Pattern(2, 4))


OURS: tuple[Callable[[Path], Iterable[Claim]], ...] = (from_manifest, from_plan)


def sparsity_configs(value: object, path: str = "") -> dict[str, JSON]:
    """Every ``sparsity_config`` in a configuration, by its place: compressed-tensors nests it in
    others.

    Args:
        value: a configuration, or a part of one.
        path: of that part, dotted.
    """
    configs: dict[str, JSON] = {}
    if not isinstance(value, Mapping):
        return configs
    for key, inner in value.items():
        place = str(key)
        if path:
            place = f"{path}.{key}"
        if key == FIELD and isinstance(inner, Mapping) and inner:
            configs[place] = inner
        else:
            configs |= sparsity_configs(inner, place)
    return configs


def from_config(source: str, value: JSON, model: nn.Module) -> list[Claim] | Overall:
    """What one ``sparsity_config`` says of the modules of a class.

    Args:
        source: where it stands, for messages.
        value: the ``sparsity_config``.
        model: the stock class, on the meta device.

    Returns:
        A claim for each weight, or one about the share of zeros in all of them.

    Raises:
        SourceError: it does not say what is sparse, or in which pattern.
    """
    names = tuple(f"{name}.weight" for name in _target_modules(value, model))
    if not names:
        raise SourceError(
            f"{source} names no module of {type(model).__name__}: its targets are "
            f"{value.get('targets')}"
        )
    structure = str(value.get("sparsity_structure") or "")
    if structure not in UNSTRUCTURED:
        pattern = parse_pattern(structure)
        return [Claim(source, name, pattern) for name in names]
    share = value.get("global_sparsity")
    if not isinstance(share, (int, float)) or not 0 <= share <= 100:
        raise SourceError(
            f"{source} says neither a pattern (sparsity_structure) nor a share (global_sparsity)"
        )
    if share > 1:  # per cent
        share = share / 100
    return Overall(source, names, float(share))


def _target_modules(value: JSON, model: nn.Module) -> Iterator[str]:
    """Modules with a weight that are targets and not ignored: by class, by name, or by ``re:`` and
    an expression."""
    targets = _list_of_text(value.get("targets")) or ["Linear"]
    ignored = _list_of_text(value.get("ignore"))
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        matrix = isinstance(weight, nn.Parameter) and weight.dim() == 2
        if not matrix or _matches_pattern(ignored, name, module):
            continue
        if _matches_pattern(targets, name, module):
            yield name


def _matches_pattern(patterns: Iterable[str], name: str, module: nn.Module) -> bool:
    for text in patterns:
        if text.startswith("re:"):
            if re.match(text[3:], name) is not None:
                return True
        elif text in (name, type(module).__name__):
            return True
    return False


def _list_of_text(value: object) -> list[str]:
    if isinstance(value, list):
        return [item for item in value if isinstance(item, str)]
    return []
