"""The configuration file of a result: it opens wherever the source's did.

Transformers writes its own spelling of the day; other readers, older releases among them, know an
older one. So both are written where a field was renamed, and what the class makes of the file is
compared before and after: no spelling may change it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from secateur.graph.errors import ArtifactError
from secateur.graph.reading import read_json_object
from secateur.runtime.open.classes import BUILD_FAILURES
from secateur.runtime.open.special_floats import config_values, decode_special_floats
from secateur.runtime.save.side_files import CODE_MAP

CONFIG = "config.json"
TIE = "tie_word_embeddings"
ROPE = "rope_parameters"
OLD_ROPE_FIELDS = (
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "global_rope_theta",
    "local_rope_theta",
    "partial_rotary_factor",
)
"""Fields of rotary embeddings that readers before transformers 5 know."""
UNTOLD = frozenset(
    {"transformers_version", "_name_or_path", "torch_dtype", "dtype", ROPE, *OLD_ROPE_FIELDS}
)
"""Fields whose spelling changes by rule, or that say nothing of the model."""
JSON = dict[str, Any]
GENERATION_DEFAULTS = GenerationConfig()


@dataclass
class ConfigurationReport:
    """What differs between the source's configuration file and the result's.

    changed: value before and after, by dotted field.
    left_out: fields of the source that the result lacks.
    """

    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def to_json(self) -> JSON:
        """Return the entries that are not empty, for the manifest."""
        entries = {"changed": self.changed, "left_out": self.left_out}
        return {name: value for name, value in entries.items() if value}


def finish_configuration(
    folder: Path, source: Path | None, model: PreTrainedModel
) -> ConfigurationReport:
    """Rewrite the configuration that transformers wrote, so that it opens where the source's did.

    Args:
        folder: of the result, with its ``config.json``.
        source: folder of the source model, or None.
        model: that was written.

    Returns:
        What differs from the source's file, field by field.

    Raises:
        ArtifactError: a configuration cannot be read, or the class would open the file as another
            one.
    """
    written = read_json_object(folder / CONFIG, ArtifactError)
    original: JSON = {}
    if source is not None and (source / CONFIG).is_file():
        original = read_json_object(source / CONFIG, ArtifactError)
    values = copy.deepcopy(written)
    _remove_code_maps(values)
    _state_ties(values, model)
    reference = _open_values(model.config, values)
    _add_old_spellings(values, original)
    values = _carry_fields(values, original, model.config, reference)
    if _open_values(model.config, values) != reference:
        raise ArtifactError(
            f"{type(model.config).__name__} opens the older spelling of rotary fields as something "
            "else: please report the configuration"
        )
    if _has_bare_infinity(original):
        values = decode_special_floats(values)
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, "utf-8")
    return compare_configurations(original, values)


def _carry_fields(values: JSON, original: JSON, config: PretrainedConfig, reference: JSON) -> JSON:
    """Return values with what the source says that the class reads in the same way: fields that
    transformers dropped, and its spelling of those that it renamed.

    A field that changes what the class makes of the file speaks of a size that was cut, and is left
    as the result has it.

    Args:
        values: of the result.
        original: of the source.
        config: of the model that was written.
        reference: what the class makes of the result.
    """
    opened = _try_to_open(config, original)
    if opened is None:
        return values  # a file that this class does not read says nothing of its fields
    candidates = list(_candidate_fields(values, original, opened))
    carried = copy.deepcopy(values)
    for path, value in candidates:
        _set_field(carried, path, value)
    if _try_to_open(config, carried) == reference:
        return carried
    carried = copy.deepcopy(values)
    for path, value in candidates:
        trial = copy.deepcopy(carried)
        _set_field(trial, path, value)
        if _try_to_open(config, trial) == reference:
            carried = trial
    return carried


def _candidate_fields(
    values: JSON, original: JSON, opened: JSON, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of what the source says and the result does not.

    Fields that name code, that belong to the generation settings, or that hold an entry a layer
    where the number of layers changed, are left out.

    Args:
        values: of the result.
        original: of the source.
        opened: what the class makes of the source.
        path: where these are.
    """
    layers = [side.get("num_hidden_layers") for side in (values, original)]
    for name, value in original.items():
        present = values.get(name)
        read = opened.get(name)
        if isinstance(value, dict) and isinstance(present, dict) and _is_config(name, value):
            inner = read if isinstance(read, dict) else {}
            yield from _candidate_fields(present, value, inner, (*path, name))
        elif name in values:
            if isinstance(value, list) and isinstance(present, list) and isinstance(read, list):
                yield (*path, name), _respell(present, value, read)
            elif value != present and name not in UNTOLD:
                yield (*path, name), value
        elif name != CODE_MAP and not hasattr(GENERATION_DEFAULTS, name):
            is_by_layer = isinstance(value, list) and len(value) == layers[1]
            if layers[0] == layers[1] or not is_by_layer:
                yield (*path, name), value


def _respell(entries: list[Any], original: list[Any], read: list[Any]) -> list[Any]:
    """Return a list of the result in the words of the source.

    Args:
        entries: of the result.
        original: of the source, as its file has them.
        read: of the source, as the class reads them.
    """
    if len(original) != len(read):
        return entries
    words = {json.dumps(new): old for old, new in zip(original, read, strict=True)}
    return [words.get(json.dumps(entry), entry) for entry in entries]


def _set_field(values: JSON, path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        values = values[name]
    values[path[-1]] = copy.deepcopy(value)


def _is_config(name: str, value: JSON) -> bool:
    """Tell whether an entry of a configuration is a configuration itself."""
    return "model_type" in value or name.endswith("_config")


def compare_configurations(before: JSON, after: JSON) -> ConfigurationReport:
    """Compare two configuration files field by field.

    Args:
        before: of the source; empty where there is none.
        after: of the result. Fields that it has more are the defaults of its class.

    Returns:
        The differences, those of spelling alone left out.
    """
    report = ConfigurationReport()
    old = dict(_iterate_fields(decode_special_floats(before)))
    new = dict(_iterate_fields(decode_special_floats(after)))
    for place, value in old.items():
        if place.rpartition(".")[2] in UNTOLD or _is_inside_rope(place):
            continue
        if place not in new:
            if not hasattr(GENERATION_DEFAULTS, place.rpartition(".")[2]):
                report.left_out.append(place)
        elif not _is_equal(value, new[place]):
            report.changed[place] = (value, new[place])
    return report


def _is_inside_rope(place: str) -> bool:
    return any(part in (ROPE, "rope_scaling") for part in place.split("."))


def _iterate_fields(values: JSON, place: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        inner = f"{place}.{name}" if place else name
        if isinstance(value, dict) and _is_config(name, value):
            yield from _iterate_fields(value, inner)
        else:
            yield inner, value


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)


def _open_values(config: PretrainedConfig, values: JSON) -> JSON:
    """Return every field of the configuration that the class makes of a file."""
    opened = type(config).from_dict(decode_special_floats(copy.deepcopy(values)))
    fields = config_values(opened)
    for name in OLD_ROPE_FIELDS:
        fields.pop(name, None)
    return _without_old_fields(fields)


def _try_to_open(config: PretrainedConfig, values: JSON) -> JSON | None:
    """Return what the class makes of a file, or None where it does not take it."""
    try:
        return _open_values(config, values)
    except BUILD_FAILURES:
        return None


def _without_old_fields(fields: JSON) -> JSON:
    """Return fields without the older spellings, which a configuration keeps as attributes that
    nothing reads."""
    kept: JSON = {}
    for name, value in fields.items():
        if name in OLD_ROPE_FIELDS or name == "torch_dtype":
            continue
        kept[name] = _without_old_fields(value) if isinstance(value, dict) else value
    return kept


def _remove_code_maps(values: JSON) -> None:
    """Remove what names code of the source folder, which does not travel."""
    values.pop(CODE_MAP, None)
    for value in values.values():
        if isinstance(value, dict):
            _remove_code_maps(value)


def _state_ties(values: JSON, model: PreTrainedModel) -> None:
    """Say that head and embedding are not tied where the model holds two tensors."""
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    weights = [getattr(module, "weight", None) for module in (head, table)]
    if weights[0] is None or weights[1] is None or weights[0] is weights[1]:
        return
    places = [values, *(value for value in values.values() if isinstance(value, dict))]
    for place in places:
        if place.get(TIE):
            place[TIE] = False


def _add_old_spellings(values: JSON, original: JSON) -> None:
    """Add what readers before transformers 5 look for: the base of rotary embeddings at the top
    level, and the dtype under its first name."""
    rope = values.get(ROPE)
    if isinstance(rope, dict):
        for name, value in _old_rope_fields(rope, original).items():
            values.setdefault(name, value)
    if values.get("dtype") is not None:
        values.setdefault("torch_dtype", values["dtype"])
    for name, value in values.items():
        if isinstance(value, dict) and _is_config(name, value):
            inner = original.get(name)
            _add_old_spellings(value, inner if isinstance(inner, dict) else {})


def _old_rope_fields(rope: JSON, original: JSON) -> JSON:
    """Return rotary parameters as older readers look for them.

    Args:
        rope: parameters of one kind of layers, or of each kind by its name.
        original: the same part of the source's configuration.
    """
    if "rope_theta" not in rope:
        return _old_fields_by_kind(rope, original)
    fields: JSON = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {name: value for name, value in rope.items() if name not in fields}
    older = original.get("rope_scaling")
    if isinstance(older, dict) and "type" in older:
        scaling["type"] = older["type"]
    is_plain = set(scaling) <= {"rope_type", "type"} and scaling.get("rope_type") == "default"
    fields["rope_scaling"] = None if is_plain else scaling
    return fields


def _old_fields_by_kind(rope: JSON, original: JSON) -> JSON:
    """Return the older fields of rotary parameters that differ by the kind of a layer: those of the
    source, or what layers of full and of sliding attention were given in them."""
    fields = {name: original[name] for name in OLD_ROPE_FIELDS if name in original}
    full = rope.get("full_attention")
    sliding = rope.get("sliding_attention")
    if not fields and isinstance(full, dict) and isinstance(sliding, dict):
        fields = _old_rope_fields(full, {})
        fields["rope_local_base_freq"] = sliding["rope_theta"]
    return fields


def _has_bare_infinity(value: Any) -> bool:
    """Tell whether a file spells an infinite number by the bare word, as transformers 4 did."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(_has_bare_infinity(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_has_bare_infinity(inner) for inner in value)
    return False
