"""What decides the result of a run, as JSON: two runs with equal fingerprints give the same
weights, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.graph import Program
from secateur.graph.errors import ArtifactError
from secateur.passes import Pipeline, Sample
from secateur.passes.storage.journal import hash_tensor
from secateur.runtime.save.artifact import collect_versions

JSON = dict[str, Any]
FOLDERS = ("graph", "passes", "kernels", "runtime")


def run_fingerprint(
    program: Program,
    source: Mapping[str, str],
    pipeline: Pipeline,
    data: Sequence[Sample] | None,
    seed: int,
) -> JSON:
    """What a run depends on: weights and graph, passes with all options, calibration tokens, files
    that passes read, seed, versions, and the machine as far as it moves bits.

    Args:
        source: the program's ``digests``.

    Raises:
        ArtifactError: a file that a pass reads is not there.
    """
    return {
        "model": {
            "class": type(program.source.model).__name__,
            "parameters": program.num_parameters,
            "weights": combine_hashes(f"{name} {value}" for name, value in source.items()),
            "graph": graph_digest(program),
        },
        "passes": {
            f"{place} {one.name}": one.to_json() for place, one in enumerate(pipeline.passes, 1)
        },
        "stop after": pipeline.hooks.stop_after,
        "calibration data": None if data is None else _data_fingerprint(data),
        "files": {str(file): _hash_content(file) for file in pipeline.files},
        "seed": seed,
        "versions": collect_versions(),
        "machine": {
            "threads": torch.get_num_threads(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "devices": sorted({_device_name(p.device) for _, p in program.named_parameters()}),
        },
    }


def list_differences(then: Any, now: Any) -> list[str]:
    """What differs between two fingerprints, one line each: where it stands, what it was, what it
    is."""
    return list(_compare_json(then, now, ""))


def hash_parameters(program: Program) -> dict[str, str]:
    """SHA-256 of each parameter and buffer of a Program's graph, by name, in its order."""
    named = [*program.named_parameters(), *program.gm.named_buffers()]
    return {name: hash_tensor(tensor) for name, tensor in named}


def graph_digest(program: Program) -> str:
    """SHA-256 of the nodes of a Program's graph: names, ops, arguments."""
    return hashlib.sha256(str(program.gm.graph).encode()).hexdigest()


def code_digest() -> str:
    """SHA-256 of this package's sources, which between two releases say more than the version."""
    root = Path(__file__).parents[2]
    sources = sorted(file for folder in FOLDERS for file in (root / folder).rglob("*.py"))
    return combine_hashes(
        f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}"
        for file in sources
    )


def combine_hashes(lines: Iterable[str]) -> str:
    """SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _data_fingerprint(data: Sequence[Sample]) -> JSON:
    lines = [
        f"{name} {_hash_value(value)}" for sample in data for name, value in _iterate_parts(sample)
    ]
    return {
        "sequences": len(data),
        "tokens": sum(sample.tokens for sample in data),
        "sha256": combine_hashes(lines),
    }


def _iterate_parts(sample: Sample) -> Iterator[tuple[str, Any]]:
    yield from sorted(sample.inputs.items())
    yield "labels of the sample", sample.labels


def _hash_value(value: Any) -> str:
    if isinstance(value, Tensor):
        return hash_tensor(value)
    return repr(value)


def _hash_content(path: Path) -> str:
    """SHA-256 of a file, or of all files below a folder with their names."""
    try:
        if path.is_dir():
            files = sorted(path.rglob("*"))
        else:
            files = [path]
        read = [(file, file.read_bytes()) for file in files if not file.is_dir()]
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}; a pass of the pipeline names it"
        ) from error
    return combine_hashes(
        f"{file.relative_to(path)} {hashlib.sha256(content).hexdigest()}" for file, content in read
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def _compare_json(then: Any, now: Any, place: str) -> Iterator[str]:
    """Two objects are compared key by key; anything else, as a whole."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in [*then, *(key for key in now if key not in then)]:
            inner = f"{place}, {key}" if place else str(key)
            yield from _compare_json(then.get(key, "nothing"), now.get(key, "nothing"), inner)
    elif then != now:
        yield f"{place}: {_show_value(then)} then, {_show_value(now)} now"


def _show_value(value: Any) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, Mapping):
        text = ", ".join(_show_entry(key, inner) for key, inner in value.items())
    else:
        text = json.dumps(value)
    if len(text) <= 80:
        return text
    return f"{text[:12]}..."


def _show_entry(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{key} ({_show_value(value)})"
    return f"{key}: {_show_value(value)}"
