"""What the files of a model folder may name: values, and never code or another place to read from.

A configuration can ask for kernels of a hub repository, for code of its own, for another model's
weights.  Here is the one list of what is let through; what only asks for speed is dropped and told,
the rest is refused.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from transformers import GenerationConfig

from secateur.graph.errors import SourceError
from secateur.graph.program import JSON
from secateur.graph.reading import read_json_object, reading, shown

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
ATTENTION = frozenset({"eager", "sdpa", "flex_attention"})
EXPERTS = frozenset({"eager", "grouped_mm", "batched_mm"})
HINTS_OF_SPEED = ("flash_attention_", "flash_attn", "flex_flash_attention")
"""Attention kernels that transformers would fetch where they are not installed; the class computes
the same without."""
DROPPED = frozenset(
    {
        "trust_remote_code",
        "use_kernels",
        "use_pretrained_backbone",
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
    }
)
"""Fields that mean nothing here: the answer to each is no."""
CODE = frozenset({"custom_generate", "kernel_config", "kernel_mapping"})
QUANTIZED = frozenset({"quantization_config", "compression_config"})
MAX_LAYERS = 10_000
"""Of any field that counts layers or blocks: lists of that length are made before a class can
refuse it."""
LAYER_WORDS = ("layer", "depth", "block")

INTEGERS = (
    "max_length max_new_tokens min_length min_new_tokens num_beams num_beam_groups "
    "num_return_sequences top_k "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size max_cache_len prompt_lookup_num_tokens "
    "max_matching_ngram_size "
    "num_assistant_tokens assistant_early_exit assistant_lookbehind target_lookbehind "
    "prefill_chunk_size "
    "pad_token_id bos_token_id decoder_start_token_id forced_bos_token_id"
)
NUMBERS = (
    "max_time temperature top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty "
    "encoder_repetition_penalty length_penalty guidance_scale diversity_penalty penalty_alpha "
    "assistant_confidence_threshold assistant_ensemble_weight"
)
SWITCHES = (
    "do_sample use_cache use_mtp renormalize_logits remove_invalid_values token_healing "
    "output_attentions "
    "output_hidden_states output_scores output_logits return_dict_in_generate is_assistant "
    "disable_compile low_memory "
    "_from_model_config"
)
LISTS = (
    "bad_words_ids exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "force_words_ids constraints"
)
KINDS: Mapping[str, type | types.UnionType] = {
    **dict.fromkeys(INTEGERS.split(), int),
    **dict.fromkeys(NUMBERS.split(), int | float),
    **dict.fromkeys(SWITCHES.split(), bool),
    **dict.fromkeys(LISTS.split(), list),
    "eos_token_id": int | list,
    "forced_eos_token_id": int | list,
    "early_stopping": bool | str,
    "stop_strings": str | list,
    "cache_implementation": str,
    "cache_config": dict,
    "sequence_bias": dict | list,
    "watermarking_config": dict,
    "compile_config": dict,
    "transformers_version": str,
    "dola_layers": str | list,
}
"""Of the fields of generation settings; null is always allowed."""
WORDS: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a map",
}


def allowed_config(data: Mapping[str, object], file: Path) -> JSON:
    """A configuration without what it must not name, in it or in one nested in it.

    Args:
        data: as read from the file.
        file: for messages.

    Raises:
        SourceError: it names code, a repository, or a count that no model has.
    """
    return _allowed_map(data, str(file))


def read_generation(folder: Path) -> JSON | None:
    """The generation settings of a folder, each value of the type that its field has; None where
    there are none.

    Args:
        folder: of a model.

    Raises:
        SourceError: damaged, a value of another type, or a field that names code.
    """
    file = folder / GENERATION
    if not file.is_file():
        return None
    data = _allowed_map(read_json_object(file), str(file))
    for name, value in data.items():
        expected = KINDS.get(name)
        if value is None or expected is None:
            continue
        strange_switch = isinstance(value, bool) and not _takes(expected, bool)
        if strange_switch or not isinstance(value, expected):
            raise SourceError(
                f"{file}: {name} is {shown(value)}, expected {_named(expected)}. Mend the "
                "field, or drop it"
            )
        if name.endswith("_token_id"):
            _check_ids(value, f"{file}: {name}")
    data.pop("compile_config", None)  # how to compile is asked of the command line
    with reading(file, SourceError, "Mend the field, or delete the file"):
        GenerationConfig.from_dict(dict(data)).to_json_string()
    return data


def _check_ids(value: object, where: str) -> None:
    ids = [value]
    if isinstance(value, list):
        ids = value
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not -1 <= token < 2**31:
            raise SourceError(
                f"{where} is {shown(value)}, expected a token id. Mend the field, or drop it"
            )


def _allowed_map(data: Mapping[str, object], where: str) -> JSON:
    allowed: JSON = {}
    for name, value in data.items():
        if name in DROPPED:
            continue
        if name in CODE and value:
            raise SourceError(f"{where} has {name}, which names code to be run: drop the field")
        if "_implementation" in name and name != "cache_implementation":
            implementation = _implementation(name, value, where)
            if implementation is not None:
                allowed[name] = implementation
            continue
        _check_count(name, value, where)
        if name not in QUANTIZED:
            allowed[name] = _allowed_value(value, f"{where}: {shown(name)[1:-1]}")
        else:
            allowed[name] = value
    return allowed


def _allowed_value(value: object, where: str) -> object:
    if isinstance(value, dict):
        return _allowed_map(value, where)
    if isinstance(value, list):
        return [_allowed_value(item, where) for item in value]
    return value


def _implementation(name: str, value: object, where: str) -> JSON | str | None:
    """The value of a field that chooses a kernel, or None where it is dropped."""
    if value is None:
        return None
    if isinstance(value, dict):
        chosen: JSON = {}
        for part, kernel in value.items():
            implementation = _implementation(name, kernel, where)
            if implementation is not None:
                chosen[part] = implementation
        return chosen or None
    if "expert" in name:
        known = EXPERTS
    else:
        known = ATTENTION
    if isinstance(value, str) and value in known:
        return value
    if isinstance(value, str) and value.startswith(HINTS_OF_SPEED) and "/" not in value:
        log.info(
            "%s: %s=%s is left out: it asks for a kernel, not for other results", where, name, value
        )
        return None
    listed = ", ".join(sorted(known))
    raise SourceError(
        f"{where} names code to be fetched from the hub ({name}: {shown(value)}): drop the field, "
        f"or write {listed}"
    )


def _check_count(name: str, value: object, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        return
    if abs(value) >= 2**53:
        raise SourceError(
            f"{where}: {shown(name)[1:-1]} is {shown(value)}, which no model has. Mend the field"
        )
    counts_layers = any(word in name for word in LAYER_WORDS) and "size" not in name
    if value > MAX_LAYERS and counts_layers:
        raise SourceError(
            f"{where}: {name} is {value}, at most {MAX_LAYERS:,} are built. Mend the field"
        )


def _takes(expected: type | types.UnionType, kind: type) -> bool:
    return kind in (get_args(expected) or (expected,))


def _named(expected: type | types.UnionType) -> str:
    if isinstance(expected, types.UnionType):
        return " or ".join(WORDS[kind] for kind in get_args(expected))
    return WORDS[expected]
