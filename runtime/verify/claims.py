"""What a folder claims of its zeros: our manifest and packed plan, and ``sparsity_config`` of other tools.

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
from secateur.runtime.artifact import MANIFEST
from secateur.runtime.declared import declared
from secateur.runtime.lowering import FOLDER, PLAN, has_packed, read_plan

JSON = Mapping[str, Any]
FIELD = "sparsity_config"
UNSTRUCTURED = ("0:0", "unstructured", "None", "")


@dataclass(frozen=True)
class Claim:
    """One weight is said to be sparse.   source: which file says so.   tensor: its name in the model."""

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
    for name, one in declared(folder).items():
        yield Claim(MANIFEST, name, one.pattern)


def from_plan(folder: Path) -> Iterator[Claim]:
    """Weights that lie in a packed 2:4 form."""
    if has_packed(folder):
        for row in read_plan(folder / FOLDER).packed:
            if row.kind.startswith("2:4"):
                yield Claim(f"{FOLDER}/{PLAN}", row.layer, Pattern(2, 4))


OURS: tuple[Callable[[Path], Iterable[Claim]], ...] = (from_manifest, from_plan)


def sparsity_configs(value: Any, path: str = "") -> dict[str, JSON]:
    """Every ``sparsity_config`` in a configuration, by its place: compressed-tensors nests it in others."""
    found: dict[str, JSON] = {}
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        here = f"{path}.{key}" if path else str(key)
        if key == FIELD and isinstance(inner, Mapping) and inner:
            found[here] = inner
        else:
            found |= sparsity_configs(inner, here)
    return found


def from_config(source: str, value: JSON, model: nn.Module) -> list[Claim] | Overall:
    """What one ``sparsity_config`` says of the modules of a class.

    Raises: SourceError: it does not say what is sparse, or in which pattern.
    """
    names = tuple(f"{name}.weight" for name in _targets(value, model))
    if not names:
        raise SourceError(f"{source} names no module of {type(model).__name__}: its targets are {value.get('targets')}")
    structure = str(value.get("sparsity_structure") or "")
    if structure not in UNSTRUCTURED:
        pattern = parse_pattern(structure)
        return [Claim(source, name, pattern) for name in names]
    share = value.get("global_sparsity")
    if not isinstance(share, (int, float)) or not 0 <= share <= 100:
        raise SourceError(f"{source} says neither a pattern (sparsity_structure) nor a share (global_sparsity)")
    return Overall(source, names, share / 100 if share > 1 else float(share))


def _targets(value: JSON, model: nn.Module) -> Iterator[str]:
    """Modules with a weight that are targets and not ignored: by class, by name, or by ``re:`` and an expression."""
    targets, ignored = _texts(value.get("targets")) or ["Linear"], _texts(value.get("ignore"))
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        matrix = isinstance(weight, nn.Parameter) and weight.dim() == 2
        if matrix and _named(targets, name, module) and not _named(ignored, name, module):
            yield name


def _named(patterns: Iterable[str], name: str, module: nn.Module) -> bool:
    return any(
        re.match(text[3:], name) is not None if text.startswith("re:") else text in (name, type(module).__name__)
        for text in patterns
    )


def _texts(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
