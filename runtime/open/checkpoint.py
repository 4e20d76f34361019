"""What a checkpoint folder says about its tensors, read from the headers alone and believed only
after checking.

A safetensors file is 8 bytes of little-endian header length, a JSON header (name -> dtype, shape,
[begin, end)), data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.graph.errors import SourceError
from secateur.graph.program import JSON
from secateur.graph.reading import lfs_pointer, parse_json, read_json_object, reason_of, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MEND = "Fetch or save the model again"


@dataclass(frozen=True)
class TensorRecord:
    """Shape, dtype and file of a stored tensor, and the byte of the file where its data begins."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    begin: int = 0

    def meta(self) -> torch.Tensor:
        """An empty tensor of this shape and dtype on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def read_checkpoint(folder: Path) -> dict[str, TensorRecord]:
    """Every tensor of a folder's safetensors file or shards, after checking that the files can hold
    them.

    Args:
        folder: of a model.

    Returns:
        What the headers say of each tensor, by its name.

    Raises:
        SourceError: only pickled weights, no weights, a shard is missing, a file is truncated or
            corrupted.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    if pickles := sorted(file.name for pattern in PICKLES for file in folder.glob(pattern)):
        raise SourceError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code "
            "when they are read. "
            "If you trust them, convert them once with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder), and give the new folder"
        )
    raise SourceError(f"{folder} has no weights: expected {SINGLE}, or {INDEX} and its shards")


def read_header(file: Path) -> dict[str, TensorRecord]:
    """The tensors of one safetensors file.  Checks that the header is whole, that the ranges of the
    tensors fit their shapes, follow each other without gap or overlap, and end where the file ends.

    Args:
        file: a safetensors file.

    Returns:
        What the header says of each tensor, by its name.

    Raises:
        SourceError: says what is wrong with the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if lfs_pointer(prefix + stream.read(64)):
            raise SourceError(
                f"{file} is a git-lfs pointer and not the weights: run `git lfs pull` where it "
                "was cloned, or "
                "fetch the model with `hf download`"
            )
        stream.seek(8)
        length = -1
        if len(prefix) == 8:
            length = struct.unpack("<Q", prefix)[0]
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise SourceError(
                f"{file} is truncated or corrupted: header of {length} bytes in {size} "
                f"bytes. {MEND}"
            )
        header = stream.read(length)
    try:
        entries = _entries(header)
        spans = sorted((_data_span(name, entry), name) for name, entry in entries.items())
    except (UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        cause: BaseException = error
        if isinstance(error, SourceError) and error.__cause__:
            cause = error.__cause__
        why = reason_of(cause)
        raise SourceError(
            f"{file} is corrupted: its header does not parse ({why}). {MEND}"
        ) from error
    _check_spans(file, spans, size - 8 - length)
    start = 8 + length
    records = {}
    for name, entry in entries.items():
        begin = start + entry["data_offsets"][0]
        records[name] = TensorRecord(tuple(entry["shape"]), DTYPES[entry["dtype"]], file, begin)
    return records


def _read_shards(folder: Path) -> dict[str, TensorRecord]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise SourceError(f"{index} is damaged: it has no weight_map of names to files. {MEND}")
    shards = sorted(set(weight_map.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise SourceError(
            f"{index} names a file outside the folder: {outside[0]!r}. Do not trust this checkpoint"
        )
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise SourceError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards: "
            f"{', '.join(missing[:3])}. {MEND}"
        )
    stored: dict[str, TensorRecord] = {}
    for shard in shards:
        stored |= read_header(folder / shard)
    for name, shard in weight_map.items():
        if name not in stored or stored[name].file.name != shard:
            raise SourceError(f"{index} says that {shard} holds {name}, and it does not. {MEND}")
    return stored


def read_json(file: Path) -> JSON:
    """A JSON object from a file.

    Args:
        file: to be read.

    Raises:
        SourceError: unreadable, not JSON, or not an object.
    """
    return read_json_object(file)


def _entries(header: bytes) -> JSON:
    """The tensors of a header, which must be an object; its metadata, a map of texts, is left
    out."""
    entries = parse_json(header, "the header")
    if not isinstance(entries, dict):
        raise ValueError(f"a JSON {type(entries).__name__} instead of an object")
    metadata = entries.pop("__metadata__", None)
    texts = isinstance(metadata, dict) and all(
        isinstance(value, str) for value in metadata.values()
    )
    if metadata is not None and not texts:
        raise ValueError(f"__metadata__ is {shown(metadata)}, expected a map of texts")
    return entries


def _data_span(name: str, entry: JSON) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"{shown(name)} has a shape or an offset that is no count")
    if end - begin != math.prod(shape) * DTYPES[entry["dtype"]].itemsize:
        raise ValueError(
            f"{shown(name)} of shape {shown(shape)} and dtype {entry['dtype']} does not fill bytes "
            f"{begin} to {end}"
        )
    return begin, end


def _check_spans(file: Path, spans: list[tuple[tuple[int, int], str]], data_bytes: int) -> None:
    position = 0
    for (begin, end), name in spans:
        if begin != position:
            raise SourceError(
                f"{file} is corrupted: {name} begins at byte {begin} instead of {position}. {MEND}"
            )
        position = end
    if position != data_bytes:
        raise SourceError(
            f"{file} is truncated or corrupted: its header describes {position:,} bytes of "
            "data and "
            f"{data_bytes:,} are there. {MEND}"
        )
