"""Malformed files of every kind end in an error of this package: no other exception, no hang,
nothing written.

The readers are called in this process, inside the same boundary that the command line has: what may
leave it is
``SecateurError`` and ``MemoryError``, which it tells in a sentence, and ``OSError``, whose text
names the file.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from runtime_models import SMALL, tiny
from safetensors.torch import save_file

from secateur.graph.errors import SecateurError
from secateur.passes import Pipeline
from secateur.passes.language.recipe import load_recipe
from secateur.runtime.open.checkpoint import INDEX, read_checkpoint, read_header
from secateur.runtime.open.declared import read_declared
from secateur.runtime.open.source import open_model
from secateur.runtime.packed.store import read_plan
from secateur.runtime.serving.package import read_facts
from secateur.runtime.verify import verify_folder
from secateur.tools.evaluate.corpus import read_documents

LONGEST_SECONDS = 10.0
SCALE = int(os.environ.get("SECATEUR_FUZZ_EXAMPLES", "180"))

ODD: list[Any] = [None, True, False, 0, -1, 2**31, 2**63, 2**64, 10**30, 10**8, 1 << 40, 1e308]
ODD += [
    float("inf"),
    float("nan"),
    "",
    "owner/repo",
    "auto",
    "../../etc/passwd",
    "eval",
    "bfloat16",
]
ODD += ["\ud800", "\x00", "\x1b[2J", "x" * 5000, "flash_attention_2", [], {}, [[]], {"": {}}]
ODD += [{"": "owner/repo"}]
SPECIAL = st.sampled_from(ODD)
VALUES = st.recursive(
    SPECIAL | st.integers() | st.text(max_size=8) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = st.sampled_from(
    "model_type architectures attn_implementation experts_implementation auto_map "
    "quantization_config text_config "
    "rope_parameters rope_scaling dtype torch_dtype generation_config custom_generate "
    "compile_config "
    "eos_token_id pad_token_id num_labels id2label tie_word_embeddings layer_types "
    "head_dim hidden_act "
    "kernel_config watermarking_config metadata weight_map __metadata__ "
    "version layers figures history sparse signature use_cache".split()
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a value."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value[:6]):
            found += places(inner, (*path, place))
    return found


@st.composite
def mutations(draw: st.DrawFn, sound: Any) -> bytes:
    """A sound JSON value with one to three values replaced, added or removed; or its bytes cut or
    changed."""
    value = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            if isinstance(value, dict) and draw(st.integers(0, 9)):
                value[draw(NAMES | st.text(max_size=6))] = copy.deepcopy(draw(VALUES))
            else:
                value = copy.deepcopy(draw(VALUES))
            continue
        holder = value
        for step in path[:-1]:
            holder = holder[step]
        if draw(st.booleans()):
            holder[path[-1]] = copy.deepcopy(draw(VALUES))
        elif isinstance(holder, dict):
            del holder[path[-1]]
        else:
            holder.append(copy.deepcopy(draw(VALUES)))
    data = json.dumps(value).encode()
    how = draw(st.integers(0, 19))
    if how == 0:
        data = data[: draw(st.integers(0, len(data)))]
    elif how == 1:
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + 1 :]
    elif how == 2:
        depth = draw(st.sampled_from([65, 500, 5000, 100_000]))
        data = b'{"a":' * depth + b"1" + b"}" * depth
    elif how == 3:
        data = data.replace(b"1", b"9" * draw(st.sampled_from([30, 400, 5000])), 1)
    return data


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of all files around, to see that nothing was written."""
    return {
        str(f): (f.stat().st_size, f.stat().st_mtime_ns)
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def refuses_or_reads(read: Callable[[], Any], around: Path) -> None:
    before, began = listing(around), time.perf_counter()
    try:
        read()
    except (SecateurError, OSError, MemoryError) as error:
        text = str(error)
        assert text and len(text) < 3000, text[:200]
        assert "x" * 500 not in text, "a whole value was printed"
    assert time.perf_counter() - began < LONGEST_SECONDS
    assert listing(around) == before


class Folder:
    """A sound model folder in memory of which one file at a time is replaced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        tiny("LlamaConfig", **SMALL | {"hidden_size": 16, "intermediate_size": 16}).save_pretrained(
            root
        )
        settings_of = {
            "eos_token_id": 2,
            "pad_token_id": 0,
            "temperature": 0.5,
            "do_sample": True,
            "top_k": 5,
        }
        (root / "generation_config.json").write_text(json.dumps(settings_of))
        self.sound = {file.name: file.read_bytes() for file in root.iterdir() if file.is_file()}

    def json_of(self, name: str) -> Any:
        return json.loads(self.sound[name])

    def with_file(self, name: str, data: bytes, read: Callable[[], Any]) -> None:
        (self.root / name).parent.mkdir(exist_ok=True)
        (self.root / name).write_bytes(data)
        try:
            refuses_or_reads(read, self.root)
        finally:
            if name in self.sound:
                (self.root / name).write_bytes(self.sound[name])
            else:
                (self.root / name).unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("fuzz"))


def many(part: float = 1.0, scale: int = SCALE) -> Any:
    return settings(
        max_examples=max(1, int(scale * part)),
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def check_config(folder: Folder, scale: int) -> None:
    @many(1.0, scale)
    @given(mutations(folder.json_of("config.json")))
    def check(data: bytes) -> None:
        folder.with_file("config.json", data, lambda: open_model(folder.root, weights=False))

    check()


def check_loading(folder: Folder, scale: int) -> None:
    @many(0.25, scale)
    @given(mutations(folder.json_of("config.json")))
    def check(data: bytes) -> None:
        folder.with_file("config.json", data, lambda: open_model(folder.root))

    check()


def check_generation(folder: Folder, scale: int) -> None:
    @many(1.75, scale)
    @given(mutations(folder.json_of("generation_config.json")))
    def check(data: bytes) -> None:
        folder.with_file(
            "generation_config.json", data, lambda: open_model(folder.root, weights=False)
        )

    check()


def check_header(folder: Folder, scale: int) -> None:
    whole = folder.sound["model.safetensors"]
    length = struct.unpack("<Q", whole[:8])[0]
    header, rest = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    @many(1.0, scale)
    @given(mutations(header), st.integers(-2, 2))
    def check(data: bytes, off: int) -> None:
        file = struct.pack("<Q", max(0, len(data) + (off if off > 1 else 0))) + data + rest
        folder.with_file(
            "model.safetensors", file, lambda: read_header(folder.root / "model.safetensors")
        )

    check()


def check_opened_header(folder: Folder, scale: int) -> None:
    whole = folder.sound["model.safetensors"]
    length = struct.unpack("<Q", whole[:8])[0]
    header, rest = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    @many(0.5, scale)
    @given(VALUES, st.sampled_from(sorted(header)))
    def check(value: Any, name: str) -> None:
        data = json.dumps({**header, "__metadata__": value}).encode()
        if len(name) % 2:
            data = json.dumps({**header, name: {**header[name], "dtype": value}}).encode()
        file = struct.pack("<Q", len(data)) + data + rest
        folder.with_file("model.safetensors", file, lambda: open_model(folder.root))

    check()


def check_index(folder: Folder, scale: int) -> None:
    place = folder.root / "sharded"
    place.mkdir(exist_ok=True)
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, place / "one.safetensors")
    index = {
        "metadata": {"total_size": 20},
        "weight_map": {"a": "one.safetensors", "b": "one.safetensors"},
    }

    @many(1.0, scale)
    @given(mutations(index))
    def check(data: bytes) -> None:
        folder.with_file(f"sharded/{INDEX}", data, lambda: read_checkpoint(place))

    check()


def check_manifest(folder: Folder, scale: int) -> None:
    manifest = {
        "format": "secateur-artifact",
        "version": 1,
        "versions": {"torch": "2"},
        "history": [],
    }
    manifest |= {"files": {"config.json": {"bytes": 3, "sha256": "0" * 64}}}
    manifest |= {"figures": {"sparse": {"a.weight": {"pattern": "2:4", "metric": "wanda"}}}}

    @many(1.0, scale)
    @given(mutations(manifest))
    def check(data: bytes) -> None:
        folder.with_file("secateur.json", data, lambda: read_declared(folder.root))

    check()


def check_verify(folder: Folder, scale: int) -> None:
    manifest = {
        "format": "secateur-artifact",
        "version": 1,
        "versions": {},
        "history": [{"name": "a", "figures": {}}],
    }
    manifest |= {"files": {"config.json": {"bytes": 3, "sha256": "0" * 64}}, "figures": {}}

    @many(0.25, scale)
    @given(mutations(manifest))
    def check(data: bytes) -> None:
        folder.with_file("secateur.json", data, lambda: verify_folder(folder.root, quick=True))

    check()


def check_plan(folder: Folder, scale: int) -> None:
    row = {
        "layer": "a.weight",
        "kind": "2:4",
        "shape": [4, 8],
        "bytes": 1,
        "dense_bytes": 2,
        "ms": 1.0,
    }
    row |= {"dense_ms": 1.0, "measured": False, "reason": "", "rounds": False, "shares": ""}
    plan = {
        "version": 1,
        "dtype": "float32",
        "machine": "m",
        "source": "s",
        "batch": 1,
        "left_alone": {},
    }
    plan |= {"layers": [row], "chosen": True}

    @many(1.25, scale)
    @given(mutations(plan))
    def check(data: bytes) -> None:
        folder.with_file("packed/plan.json", data, lambda: read_plan(folder.root / "packed"))

    check()


def check_package(folder: Folder, scale: int) -> None:
    facts = {
        "cache": [[[1, 4], [1, 4]]],
        "length": 8,
        "batch": 1,
        "dtype": "float32",
        "device": "cpu",
    }
    facts |= {"vocabulary": 8, "end": [2], "compiled_for": "x", "ops": False, "version": 1}

    @many(0.75, scale)
    @given(mutations(facts))
    def check(data: bytes) -> None:
        folder.with_file("package.json", data, lambda: read_facts(folder.root))

    check()


TEXT = ["score", "prune-width", "{", "}", "[", "]", ",", "=", "mlp", "0.25", '"', "\\", "metric"]
TEXT += [
    "taylor",
    "1e999",
    "-",
    "9" * 5000,
    "null",
    "true",
    "\ud800",
    "\n",
    " ",
    ":",
    "2:4",
    "repair",
]
TEXT += ["sparsify", "lower", "distill", "{" * 300]
PIECES = st.sampled_from(TEXT)


def check_pipeline(folder: Folder, scale: int) -> None:
    @many(1.0, scale)
    @given(st.lists(PIECES | st.text(max_size=3), max_size=12))
    def check(pieces: list[str]) -> None:
        refuses_or_reads(lambda: Pipeline.parse("".join(pieces)), folder.root)

    check()


YAML = [
    "passes:",
    "- score",
    "seed:",
    "data:",
    "{",
    "}",
    "[",
    "]",
    "&a",
    "*a",
    "<<: *a",
    "!!bool x",
]
YAML += ["!!int", "!!python/x", "? ", ": ", "\n", "\n  ", "2020-13-99", ".inf", "0x" + "f" * 5000]
YAML += ["1:60", "'", '"', "#", "|", "null", "[" * 400]
WORDS = st.sampled_from(YAML)


def check_recipe(folder: Folder, scale: int) -> None:
    @many(0.5, scale)
    @given(st.lists(WORDS | st.text(max_size=3), max_size=12))
    def check_text(pieces: list[str]) -> None:
        refuses_or_reads(lambda: Pipeline.from_recipe(" ".join(pieces) + "\n"), folder.root)

    recipe = {
        "seed": 0,
        "data": {"file": "a", "tokens": 9, "window": 3},
        "passes": [{"prune-width": {"mlp": 0.25}}],
    }

    @many(0.5, scale)
    @given(mutations(recipe))
    def check_map(data: bytes) -> None:
        text = data.decode("utf-8", "replace") + "\n"
        refuses_or_reads(lambda: (load_recipe(text), Pipeline.from_recipe(text)), folder.root)

    check_text()
    check_map()


def check_text_lines(folder: Folder, scale: int) -> None:
    @many(0.5, scale)
    @given(st.lists(mutations({"text": "some words"}), min_size=1, max_size=3))
    def check(lines: list[bytes]) -> None:
        file = folder.root / "text.jsonl"
        folder.with_file("text.jsonl", b"\n".join(lines), lambda: read_documents([file]))

    check()


CHECKS = [
    check_config,
    check_loading,
    check_generation,
    check_header,
    check_opened_header,
    check_index,
    check_manifest,
    check_verify,
    check_plan,
    check_package,
    check_pipeline,
    check_recipe,
    check_text_lines,
]


@pytest.mark.parametrize("check", CHECKS)
def test_malformed_files_end_in_a_sentence(
    check: Callable[[Folder, int], None], folder: Folder
) -> None:
    check(folder, SCALE)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_many_malformed_files_end_in_a_sentence(
    check: Callable[[Folder, int], None], folder: Folder
) -> None:
    check(folder, 10 * SCALE)
