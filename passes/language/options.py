"""Typed options: frozen dataclasses built from a name and options, and tables of such classes."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from secateur.graph.errors import PipelineError
from secateur.graph.reading import reason_of, shown
from secateur.passes.language.grammar import Spec, format_specs
from secateur.passes.language.plugins import PluginError, list_installed, load_installed

LONGEST_NAME = 60
LONGEST_REASON = 400
OPTION_LINE = re.compile(r"(\w+(?:, [\w.]+)*): (.+)")


class OptionError(PipelineError):
    """An option is unknown or has a wrong value.  ``at`` is the offset into the pipeline text,
    where known."""

    def __init__(self, message: str, at: int | None = None, option: str | None = None) -> None:
        super().__init__(message)
        self.at = at
        self.option = option


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A tail for an error message: the nearest known name, or all of them.

    Args:
        word: that was given.
        known: names that exist.
    """
    names = sorted(known)
    near = difflib.get_close_matches(word[:LONGEST_NAME], names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(names) or 'none'}"


_types: dict[type[object], dict[str, TypeAdapter[Any]]] = {}


def option_types(cls: type[Any]) -> dict[str, TypeAdapter[Any]]:
    """A validator for each dataclass field of cls, by name."""
    if cls not in _types:
        hints = get_type_hints(cls, include_extras=True)
        _types[cls] = {
            f.name: TypeAdapter(hints[f.name]) for f in dataclasses.fields(cls) if f.init
        }
    return _types[cls]


@dataclass(frozen=True)
class Options:
    """A frozen dataclass whose fields are its options, checked against their types on construction.

    name: how a pipeline text calls it, in kebab case.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for option in option_types(type(self)):
            object.__setattr__(
                self, option, check_option(type(self), option, getattr(self, option))
            )

    @classmethod
    def summary(cls) -> str:
        """The first sentences of the docstring: its lines up to a blank line or an option."""
        lines: list[str] = []
        for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
            if not line.strip() or OPTION_LINE.match(line):
                break
            lines.append(line.strip())
        return " ".join(lines)

    def to_spec(self, *, defaults: bool = False) -> Spec:
        """Name and options, as ``Table.build`` reads them back; options at their default are left
        out unless
        ``defaults``.

        Args:
            defaults: whether options at their default are included.
        """
        fields = []
        for f in dataclasses.fields(self):
            if f.init:
                fields.append(f)
        values = {}
        for f in fields:
            if defaults or getattr(self, f.name) != _default_of(f):
                values[f.name] = getattr(self, f.name)
        return Spec(
            self.name, {key: _to_plain_value(value, defaults) for key, value in values.items()}
        )

    def to_json(self) -> dict[str, Any]:
        """All options as JSON values."""
        options: dict[str, Any] = spec_to_json(self.to_spec(defaults=True), always_map=True)[
            self.name
        ]
        return options


def check_option(cls: type[Options], option: str, value: object) -> Any:
    """The value in the option's type.  Numbers, booleans and strings never stand in for each other.

    Args:
        option: by name.
        value: as given.

    Raises:
        OptionError: naming the option, the value, and what is allowed.
    """
    try:
        checked = option_types(cls)[option].validate_python(value)
    except ValidationError as error:
        raise _option_error(cls, option, value, error) from None
    if not _is_same_kind(value, checked):
        kind = type(checked).__name__
        message = f"expected {kind}, found {type(value).__name__}"
        raise OptionError(f"{cls.name}: {option}={shown(value)}: {message}", option=option)
    if _beyond_64_bits(checked):
        raise OptionError(
            f"{cls.name}: {option}={shown(value)}: the number is too large", option=option
        )
    return checked


def _option_error(
    cls: type[Options], option: str, value: object, error: ValidationError
) -> OptionError:
    """The most telling of a validator's complaints: what an inner name says of itself, else the
    deepest one."""
    first = max(error.errors(), key=lambda e: (len(e["loc"]), e["type"] == "literal_error"))
    cause = first.get("ctx", {}).get("error")
    given_value = first["input"]
    if isinstance(cause, OptionError):
        return OptionError(f"{cls.name}: {option}: {cause}", cause.at, option)
    text = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if len(text) > LONGEST_REASON:
        text = text[:LONGEST_REASON] + "..."
    if first["type"] == "literal_error" and isinstance(given_value, str):
        known = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        text = f"{shown(given_value)} is unknown; {did_you_mean(given_value, known)}"
    elif given_value is not value and shown(given_value) not in text:
        text = f"{shown(given_value)}: {text}"
    return OptionError(f"{cls.name}: {option}={shown(value)}: {text}", option=option)


def _beyond_64_bits(value: object) -> bool:
    """Whether a value holds an integer of more than 64 bits."""
    if isinstance(value, list | tuple):
        return any(map(_beyond_64_bits, value))
    if isinstance(value, dict):
        return any(map(_beyond_64_bits, value.values()))
    return isinstance(value, int) and abs(value) >= 2**63


def _is_same_kind(given: object, checked: object) -> bool:
    """Whether validation kept a boolean, a number or a string what it was."""
    if isinstance(given, list | tuple) and isinstance(checked, list | tuple):
        return all(map(_is_same_kind, given, checked))
    if isinstance(given, dict) and isinstance(checked, dict):
        return all(map(_is_same_kind, given.values(), checked.values()))
    kinds = [_describe_kind(given), _describe_kind(checked)]
    return kinds[0] == kinds[1] or "other" in kinds


def _describe_kind(value: object) -> str:
    """boolean, number, string or other."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "other"


def _default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field."""
    if callable(field.default_factory):
        return field.default_factory()
    return field.default


def _to_plain_value(value: object, defaults: bool) -> Any:
    """A value of the grammar: options as specs, tuples as lists."""
    if isinstance(value, Options):
        return value.to_spec(defaults=defaults)
    if isinstance(value, list | tuple):
        return [_to_plain_value(v, defaults) for v in value]
    if isinstance(value, Mapping):
        plain = {}
        for key, v in value.items():
            plain[key] = _to_plain_value(v, defaults)
        return plain
    return value


def spec_to_json(value: object, *, always_map: bool = False) -> Any:
    """A spec as JSON: its name alone, or ``{name: {option: value}}``.

    Args:
        value: a spec, or a value of the grammar.
        always_map: write the map even without options.
    """
    if isinstance(value, Spec):
        if not value.options and not always_map:
            return value.name
        return {value.name: {key: spec_to_json(v) for key, v in value.options.items()}}
    if isinstance(value, list):
        return [spec_to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: spec_to_json(v) for k, v in value.items()}
    return value


def spec_from_json(value: object, what: str) -> Spec:
    """The inverse of ``spec_to_json``.

    Args:
        value: a name, or a map of one name.
        what: kind of thing, for messages.

    Raises:
        OptionError: the value is neither a name nor a map with one name.
    """
    if isinstance(value, str):
        return Spec(value)
    if isinstance(value, dict) and len(value) == 1:
        ((name, options),) = value.items()
        if isinstance(name, str) and isinstance(options, dict | None):
            for option in options or ():
                if not isinstance(option, str):
                    raise OptionError(f"{shown(name)}: {shown(option)} is no name of an option")
            return Spec(name, options or {})
    raise OptionError(
        f"expected the name of {what}, or {{name: {{option: value}}}}, found {shown(value)}"
    )


O_co = TypeVar("O_co", bound=Options, covariant=True)


class Table(Generic[O_co]):
    """``Options`` classes by name: ours, those added, and those that installed packages bring.

    what: what the classes are, for messages ("a pass").
    base: what each is a subclass of.
    plugins: the entry-point group of installed ones, or None.
    """

    def __init__(
        self,
        what: str,
        *classes: type[O_co],
        base: type[object] = Options,
        plugins: str | None = None,
    ) -> None:
        self.what = what
        self.base = base
        self.plugins = plugins
        self.classes = {cls.name: cls for cls in classes}
        assert len(self.classes) == len(classes), f"two classes of {what} share a name"

    def __iter__(self) -> Iterator[type[O_co]]:
        for name in sorted(self.names() - set(self.classes)):
            self.find_class(name)
        return iter(self.classes.values())

    def add_class(self, cls: type[Any]) -> None:
        """Let texts and recipes name this class, too.

        Raises:
            PluginError: its name is taken by another.
        """
        if self.classes.setdefault(cls.name, cls) is not cls:
            raise PluginError(
                f"{cls.__module__}:{cls.__qualname__} is named {cls.name!r}, as {self.what} "
                "is already"
            )

    def names(self) -> set[str]:
        """All names that ``build`` knows; installed plug-ins are not imported for it."""
        return {*self.classes, *(list_installed(self.plugins) if self.plugins else ())}

    def find_class(self, name: str) -> type[O_co] | None:
        """The class of a name, an installed plug-in imported if need be; ours go first.

        Args:
            name: of a class.

        Returns:
            the class, or None.
        """
        if name not in self.classes and self.plugins is not None:
            plugin = load_installed(self.plugins, name, self.base)
            if plugin is not None:
                self.add_class(plugin)
        return self.classes.get(name)

    def build(self, spec: object) -> O_co:
        """An instance from a spec, a bare name, the JSON form, or an instance already.

        Args:
            spec: of any of these forms.

        Raises:
            OptionError: unknown name or option, wrong type, value out of range; with the nearest
                valid name.
        """
        if isinstance(spec, Options):  # one that a caller wrote need not stand in the table
            return cast(O_co, spec)
        if not isinstance(spec, Spec):
            spec = spec_from_json(spec, self.what)
        cls = self.find_class(spec.name)
        if cls is None:
            hint = did_you_mean(spec.name, self.names())
            raise OptionError(f"{shown(spec.name)} is not the name of {self.what}; {hint}", spec.at)
        for option in spec.options:
            if option not in option_types(cls):
                message = (
                    f"{cls.name} has no option {shown(option)}; "
                    f"{did_you_mean(option, option_types(cls))}"
                )
                raise OptionError(message, spec.option_at.get(option))
        return self._construct(cls, spec)

    @staticmethod
    def _construct(cls: type[O_co], spec: Spec) -> O_co:
        """An instance of the class.

        Raises:
            OptionError: an option has a wrong value; with its position.
        """
        try:
            return cls(**spec.options)
        except OptionError as error:
            position = spec.option_at.get(error.option or "", spec.at)
            raise OptionError(str(error), position if error.at is None else error.at) from None
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise OptionError(f"{cls.name}: {reason_of(error)}", spec.at) from None


def options_table(cls: type[Options]) -> list[tuple[str, str, str]]:
    """(option, default, meaning) of each option of a class.

    The meaning is the docstring's line ``option: meaning``; an option without one shares that of
    the option before.
    """
    rows = []
    descriptions = _describe_options(cls)
    meaning = ""
    for field in (f for f in dataclasses.fields(cls) if f.init):
        meaning = descriptions.get(field.name, meaning)
        rows.append((field.name, _default_text(field), meaning))
    return rows


def _describe_options(cls: type[Options]) -> dict[str, str]:
    """Meanings by option, from docstring lines ``a, b: meaning`` and the indented lines after them;
    those of a class go before those of the classes that it extends."""
    descriptions: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        descriptions |= _parse_option_lines(base.__doc__ or "")
    return descriptions


def _parse_option_lines(text: str) -> dict[str, str]:
    """Meanings by option of one docstring."""
    descriptions: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(text).splitlines()[1:]:
        match = OPTION_LINE.match(line)
        if match:
            names = match[1].split(", ")
            descriptions |= dict.fromkeys(names, match[2])
        elif line.startswith(" "):
            descriptions |= {name: f"{descriptions[name]} {line.strip()}" for name in names}
        else:
            names = []
    return descriptions


def _default_text(field: dataclasses.Field[Any]) -> str:
    """The default as pipeline text; empty for None."""
    value = _to_plain_value(_default_of(field), False)
    if value is None:
        return ""
    return format_specs([value])
