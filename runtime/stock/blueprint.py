"""What a configuration's numbers do to a class: built on the meta device with some of them
replaced, and looked at.

Nothing here knows a model: a field matters if changing it moves a parameter's shape, and only then.

Words: a *slot* is one dim of one parameter; the slot ``("", 0)`` stands for the number of
parameters.  A *field* is the path of a number in the configuration.  *Settings* are the values
given to some fields."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

from transformers import PretrainedConfig, PreTrainedModel

from secateur.graph.program import JSON
from secateur.runtime.open.classes import (
    BUILD_FAILURES,
    build_on_meta,
    build_with_buffers,
    innermost_reason,
    silence_transformers,
)
from secateur.runtime.open.special_floats import config_values
from secateur.runtime.stock.constants import Constant, constants_of

Field = tuple[str | int, ...]
Value = int | tuple[int, ...]
"""A tuple is for a depth field: the indices of the layers that stay."""
Settings = Mapping[Field, Value]
Key = tuple[tuple[Field, Value], ...]
Slot = tuple[str, int]
Sizes = Mapping[Slot, int]
Shapes = Mapping[str, tuple[int, ...]]

COUNT: Slot = ("", 0)
EVERY = -1
"""Last part of the path of a list whose items are all equal: one field sets them all."""
UNSET_PROBES = ((8, 16), (1, 2), (2, 4), (64, 128))
LONGEST_LIST = 256


@dataclass(frozen=True)
class FieldLine:
    """Sizes of all slots for two values of a field: enough to solve for a third."""

    field: Field
    values: tuple[int, int]
    sizes: tuple[Sizes, Sizes]

    def moves_slot(self, slot: Slot) -> bool:
        """Whether the field changes the size of this slot."""
        return self.sizes[0].get(slot) != self.sizes[1].get(slot)

    def solve_for(self, slot: Slot, want: int) -> int | None:
        """The value that gives the slot this size if the size is affine in the value; None if that
        is no count."""
        low = self.sizes[0].get(slot)
        high = self.sizes[1].get(slot)
        if low is None or high is None or low == high:
            return None
        step = self.values[1] - self.values[0]
        value = self.values[0] + Fraction((want - low) * step, high - low)
        if value.denominator == 1 and value > 0:
            return int(value)
        return None

    @property
    def moved_slots(self) -> list[Slot]:
        """The slots that the field changes."""
        return [slot for slot in self.sizes[0] if self.moves_slot(slot)]


class Blueprint:
    """A class and its configuration, to be built with some fields replaced.  Builds are remembered.

    fields: the numbers of the configuration, nested configurations included.
    unset: fields that are None, or that the class asks for although the configuration has none of
        that name."""

    def __init__(self, cls: type[PreTrainedModel], config: PretrainedConfig) -> None:
        self.cls = cls
        self.source = config
        self.data: JSON = config_values(config)
        self.fields: list[Field] = []
        self.unset: list[Field] = []
        for path, value in _iterate_numbers(config, self.data):
            if value is None:
                self.unset.append(path)
            else:
                self.fields.append(path)
        for path in _find_read_fields(cls, config):
            if path not in self.unset:
                self.unset.append(path)
        self._words: dict[Key, str] = {}
        self._sizes: dict[Key, Sizes | None] = {}

    def source_value(self, field: Field) -> int | None:
        """The value that a field has in the source configuration, or None."""
        value: Any = self.data
        for part in field:
            if isinstance(value, dict):
                value = value.get(part)
            elif part == EVERY:
                value = value[0]
            else:
                value = value[part]
        if isinstance(value, int):
            return value
        return None

    def make_config(self, settings: Settings) -> PretrainedConfig:
        """The configuration with these values, as a reader of its JSON would see it."""
        data = copy.deepcopy(self.data)
        for field, value in settings.items():
            _put_field(data, field, value)
        with silence_transformers():
            config: PretrainedConfig = type(self.source).from_dict(data)
        config._attn_implementation = self.source._attn_implementation
        return config

    def build_model(self, settings: Settings) -> PreTrainedModel:
        """The class under these values, on the meta device."""
        return build_on_meta(self.cls, self.make_config(settings))

    def parameter_shapes(self, settings: Settings) -> dict[str, tuple[int, ...]] | None:
        """Shape of every unique parameter under these values, or None where the class refuses
        them."""
        try:
            model = self.build_model(settings)
        except BUILD_FAILURES as error:
            self._words[_settings_key(settings)] = innermost_reason(error).strip().rstrip(".")
            return None
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def slot_sizes(self, settings: Settings) -> Sizes | None:
        """The same by slot."""
        key = _settings_key(settings)
        if key not in self._sizes:
            shapes = self.parameter_shapes(settings)
            if shapes is None:
                self._sizes[key] = None
            else:
                self._sizes[key] = sizes_by_slot(shapes)
        return self._sizes[key]

    def derived_constants(self, settings: Settings) -> dict[str, Constant]:
        """What the class derives from these values besides the shapes."""
        return constants_of(build_with_buffers(self.cls, self.make_config(settings)))

    def reason_of_refusal(self, settings: Settings) -> str:
        """Why the class refused these settings."""
        return self._words.get(_settings_key(settings), "")

    @property
    def build_count(self) -> int:
        """How many settings have been built so far."""
        return len(self._sizes)

    def field_line(self, settings: Settings, field: Field) -> FieldLine | None:
        """How a field moves the sizes around these settings; None if it moves none or the class
        accepts no change."""
        value = settings.get(field, self.source_value(field))
        pairs: Iterable[tuple[int, int]] = UNSET_PROBES
        if isinstance(value, int):
            pairs = [(value, other) for other in _other_values(value)]
        for low, high in pairs:
            below = self.slot_sizes({**settings, field: low})
            above = self.slot_sizes({**settings, field: high})
            if below is not None and above is not None:
                if below != above:
                    return FieldLine(field, (low, high), (below, above))
                return None
        return None


def sizes_by_slot(shapes: Shapes) -> Sizes:
    """Sizes by slot, with the number of parameters as one more."""
    sizes = {}
    for name, shape in shapes.items():
        for dim, size in enumerate(shape):
            sizes[(name, dim)] = size
    return {**sizes, COUNT: len(shapes)}


def _settings_key(settings: Settings) -> Key:
    return tuple(sorted(settings.items(), key=str))


def dotted_name(field: Field) -> str:
    """A field as a person writes it."""
    return ".".join(str(part) for part in field if part != EVERY)


def _other_values(value: int) -> list[int]:
    others = dict.fromkeys((2 * value, value + 1, value // 2))
    return [other for other in others if other > 0 and other != value]


def _iterate_numbers(
    config: PretrainedConfig, data: JSON, prefix: Field = ()
) -> Iterator[tuple[Field, int | None]]:
    """Integers, unset values and lists of integers of a configuration and of those nested in it."""
    for key, value in data.items():
        nested = None
        if key in (config.sub_configs or {}):
            nested = getattr(config, key, None)
        if isinstance(nested, PretrainedConfig) and isinstance(value, dict):
            yield from _iterate_numbers(nested, value, (*prefix, key))
        elif isinstance(value, list):
            for index in _integer_items(value):
                if index == EVERY:
                    yield (*prefix, key, index), value[0]
                else:
                    yield (*prefix, key, index), value[index]
        elif value is None or type(value) is int:
            yield (*prefix, key), value


def _integer_items(values: list[object]) -> list[int]:
    if not values or len(values) > LONGEST_LIST or any(type(value) is not int for value in values):
        return []
    if len(set(values)) == 1:
        return [EVERY]
    return list(range(len(values)))


def _find_read_fields(cls: type[PreTrainedModel], config: PretrainedConfig) -> list[Field]:
    """Names that the class reads from its configuration, or from a nested one, and that are not
    there."""
    asked: list[Field] = []
    spied = copy.deepcopy(config)
    _spy_on_reads(spied, (), asked)
    try:
        build_on_meta(cls, spied)
    except BUILD_FAILURES:
        return []
    return [path for path in dict.fromkeys(asked) if not str(path[-1]).startswith("_")]


def _spy_on_reads(config: PretrainedConfig, prefix: Field, asked: list[Field]) -> None:
    for key in config.sub_configs or {}:
        if isinstance(nested := getattr(config, key, None), PretrainedConfig):
            _spy_on_reads(nested, (*prefix, key), asked)

    def record_missing(self: PretrainedConfig, name: str) -> NoReturn:
        asked.append((*prefix, name))
        raise AttributeError(name)

    spy = type(type(config).__name__, (type(config),), {"__getattr__": record_missing})
    object.__setattr__(config, "__class__", spy)


def _put_field(data: JSON, field: Field, value: Value) -> None:
    *parents, last = field
    owner: Any = data
    for part in parents[:-1] if last == EVERY else parents:
        owner = owner[part]
    if isinstance(value, tuple):
        _keep_layers(owner, str(last), value)
    elif last == EVERY:
        owner[parents[-1]] = [value] * len(owner[parents[-1]])
    else:
        owner[last] = value


def _keep_layers(data: JSON, depth_field: str, kept: tuple[int, ...]) -> None:
    """Set a depth.  Lists that have one entry a layer keep those of the layers that stay; lists of
    layer numbers keep those numbers, counted anew."""
    depth = data[depth_field]
    for key, value in data.items():
        if isinstance(value, list) and "layer" in key and _are_numbers_below(depth, value):
            data[key] = [kept.index(number) for number in value if number in kept]
        elif isinstance(value, list) and len(value) == depth:
            data[key] = [value[index] for index in kept]
    data[depth_field] = len(kept)


def _are_numbers_below(depth: int, values: list[int]) -> bool:
    for value in values:
        if type(value) is not int or not 0 <= value < depth:
            return False
    return values == sorted(set(values))
