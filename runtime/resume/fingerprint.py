"""What decides the result of a run, as JSON: two runs with equal fingerprints give the same
weights, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.graph import Program
from secateur.graph.errors import ArtifactError
from secateur.graph.program import JSON
from secateur.passes import Pipeline, Sample
from secateur.passes.storage.journal import hash_tensor
from secateur.runtime.save.artifact import collect_versions

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
        program: as it was captured.
        source: the program's ``digests``.
        pipeline: the passes.
        data: calibration sequences, None where there are none.
        seed: of everything random.

    Raises:
        ArtifactError: a file that a pass reads is not there.
    """
    passes: JSON = {}
    for place, step in enumerate(pipeline.passes, 1):
        passes[f"{place} {step.name}"] = step.to_json()
    calibration = None
    if data is not None:
        calibration = _data_fingerprint(data)
    return {
        "model": {
            "class": type(program.source.model).__name__,
            "parameters": program.num_parameters,
            "weights": combine_hashes(f"{name} {value}" for name, value in source.items()),
            "graph": graph_digest(program),
        },
        "passes": passes,
        "stop after": pipeline.hooks.stop_after,
        "calibration data": calibration,
        "files": {str(file): _hash_content(file) for file in pipeline.files},
        "seed": seed,
        "versions": collect_versions(),
        "machine": {
            "threads": torch.get_num_threads(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "devices": sorted({_device_name(p.device) for _, p in program.named_parameters()}),
        },
    }


def list_differences(then: object, now: object) -> list[str]:
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
    sources = list[Path]()
    for folder in FOLDERS:
        sources += (root / folder).rglob("*.py")
    return combine_hashes(_content_line(file, root, file.read_bytes()) for file in sorted(sources))


def combine_hashes(lines: Iterable[str]) -> str:
    """SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _data_fingerprint(data: Sequence[Sample]) -> JSON:
    lines = list[str]()
    for sample in data:
        for name, value in _iterate_parts(sample):
            lines.append(f"{name} {_hash_value(value)}")
    return {
        "sequences": len(data),
        "tokens": sum(sample.tokens for sample in data),
        "sha256": combine_hashes(lines),
    }


def _iterate_parts(sample: Sample) -> Iterator[tuple[str, object]]:
    yield from sorted(sample.inputs.items())
    yield "labels of the sample", sample.labels


def _hash_value(value: object) -> str:
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
    return combine_hashes(_content_line(file, path, content) for file, content in read)


def _content_line(file: Path, folder: Path, content: bytes) -> str:
    """The name of a file below a folder, and the SHA-256 of its content."""
    return f"{file.relative_to(folder)} {hashlib.sha256(content).hexdigest()}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def _compare_json(then: object, now: object, place: str) -> Iterator[str]:
    """Two objects are compared key by key; anything else, as a whole."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*then, *now]):
            inner = str(key)
            if place:
                inner = f"{place}, {key}"
            yield from _compare_json(then.get(key, "nothing"), now.get(key, "nothing"), inner)
    elif then != now:
        yield f"{place}: {_show_value(then)} then, {_show_value(now)} now"


def _show_value(value: object) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, Mapping):
        text = ", ".join(_show_entry(key, inner) for key, inner in value.items())
    else:
        text = json.dumps(value)
    if len(text) <= 80:
        return text
    return f"{text[:12]}..."


def _show_entry(key: str, value: object) -> str:
    if isinstance(value, Mapping):
        return f"{key} ({_show_value(value)})"
    return f"{key}: {_show_value(value)}"
