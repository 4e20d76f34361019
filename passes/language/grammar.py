"""Pipeline text: ``score{metric=taylor},prune-width{mlp=0.25,skip=[0,-1]}``.

A text is a list of specs; a spec is a name with options; a value is a number, ``true``, ``false``,
``null``, a word, a quoted string, a list ``[a,b]``, a map ``{a=1}`` or another spec ``name{a=1}``.
Blanks and line ends mean nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.graph.errors import PipelineError
from secateur.graph.reading import MAX_DEPTH, MAX_NUMBER_DIGITS, reason_of, shown

TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[^\s"{}\[\],=]+)|(?P<mark>[{}\[\],=])|(?P<end>$))""",
    re.VERBOSE,
)
LINE_CHARACTERS = 160
WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Spec:
    """A name with options as they were written.  ``at`` and ``option_at`` are offsets into the
    text, for messages."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    at: int | None = field(default=None, compare=False)
    option_at: dict[str, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Token:
    """One lexical piece: kind is string, word, mark or end."""

    kind: str
    text: str
    at: int


def locate_message(message: str, text: str, at: int | None) -> str:
    """The message, its position, and the line of the text with a caret under that position.

    Args:
        message: without a position.
        text: of the pipeline.
        at: offset into the text; None: unknown.
    """
    if at is None:
        return message
    start = max(text.rfind("\n", 0, at) + 1, at - LINE_CHARACTERS // 2)
    line = text[start : start + LINE_CHARACTERS].split("\n", 1)[0]
    return f"{message} (at character {at + 1})\n  {line}\n  {' ' * (at - start)}^"


def parse_specs(text: str) -> list[Spec]:
    """The specs of a pipeline text.

    Args:
        text: of a pipeline.

    Raises:
        PipelineError: the text does not follow the grammar; says what was expected, what stands
            there, and where.
    """
    reader = _Reader(text)
    specs = reader.read_items(reader.read_spec, "end", "a pass name")
    if not specs:
        raise PipelineError(
            "the pipeline text is empty: write at least one pass, for example score,prune-width"
        )
    return specs


def format_specs(specs: Iterable[Spec]) -> str:
    """The text that ``parse_specs`` reads back to equal specs.

    Args:
        specs: with values of the grammar.
    """
    return ",".join(_format_value(spec) for spec in specs)


def read_word(word: str) -> Any:
    """The value a bare word stands for: a number, true, false, null, or the word itself.

    Args:
        word: without quotes.
    """
    if word in WORDS:
        return WORDS[word]
    if len(word) > MAX_NUMBER_DIGITS:
        return word
    for number in (int, float):
        try:
            if re.match(r"[-+.\d]", word) and "_" not in word:
                return number(word)
            return word
        except ValueError:
            continue
    return word


def tokenize(text: str) -> list[Token]:
    """The pieces of a text, an ``end`` piece last.

    Args:
        text: of a pipeline.
    """
    tokens = []
    position = 0
    while True:
        match = TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            start = len(text) - len(text[position:].lstrip())
            raise PipelineError(locate_message("a quoted string does not end", text, start))
        tokens.append(Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
        position = match.end()
        if match.lastgroup == "end":
            return tokens


class _Reader:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = tokenize(text)
        self.place = 0
        self.depth = 0

    @property
    def next_token(self) -> Token:
        """The token that is read next."""
        return self.tokens[self.place]

    def make_error(self, expected: str) -> PipelineError:
        """An error that names what was expected and what stands there."""
        if self.next_token.kind == "end":
            actual = "the end of the text"
        else:
            actual = shown(self.next_token.text)
        return PipelineError(
            locate_message(f"expected {expected}, found {actual}", self.text, self.next_token.at)
        )

    def is_mark(self, mark: str) -> bool:
        """Whether the next token is this mark, or ``end``."""
        if mark == "end":
            return self.next_token.kind == "end"
        return self.next_token.kind == "mark" and self.next_token.text == mark

    def take_mark(self, mark: str) -> bool:
        """Read this mark if it comes next; tell whether it did."""
        matches = self.is_mark(mark)
        self.place += int(matches and mark != "end")
        return matches

    def take_token(self, expected: str, *kinds: str) -> Token:
        """Read a token of one of these kinds.

        Raises:
            PipelineError: another kind comes next.
        """
        token = self.next_token
        if token.kind not in kinds:
            raise self.make_error(expected)
        self.place += 1
        return token

    def read_items(self, read_item: Callable[[], object], close: str, what: str) -> list[Any]:
        """Items between commas up to the closing mark; a comma may stand after the last."""
        items: list[Any] = []
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.make_error(f"at most {MAX_DEPTH} levels")
        while not self.take_mark(close):
            if items and not self.take_mark(","):
                raise self.make_error("',' or " + (repr(close) if close != "end" else "the end"))
            if items and self.take_mark(close):
                break
            if self.next_token.kind == "mark" and what == "a pass name":
                raise self.make_error(what)
            items.append(read_item())
        self.depth -= 1
        return items

    def read_spec(self) -> Spec:
        """A name with options, or without."""
        name = self.take_token("a name", "word")
        if self.take_mark("{"):
            return self.options_of(name)
        return Spec(name.text, at=name.at)

    def options_of(self, name: Token) -> Spec:
        """The options after an opening brace.

        Raises:
            PipelineError: an option is given twice.
        """
        spec = Spec(name.text, at=name.at)
        for key, value, position in self.read_items(self.read_option, "}", "an option"):
            if key in spec.options:
                raise PipelineError(
                    locate_message(f"option {shown(key)} is given twice", self.text, position)
                )
            spec.options[key] = value
            spec.option_at[key] = position
        return spec

    def read_option(self) -> tuple[str, Any, int]:
        """(Name, value, offset) of one option."""
        token = self.take_token("an option name", "word", "string")
        if not self.take_mark("="):
            raise self.make_error(f"'=' after {shown(token.text)[1:-1]}")
        if token.kind == "string":
            key = self.unquoted(token)
        else:
            key = token.text
        return key, self.read_value(), token.at

    def unquoted(self, token: Token) -> str:
        """The text that a quoted string stands for."""
        try:
            return str(json.loads(token.text, strict=False))
        except ValueError as error:
            message = f"the quoted string is not one of JSON: {reason_of(error)}"
            raise PipelineError(locate_message(message, self.text, token.at)) from None

    def read_value(self) -> Any:
        """A list, a map, a spec, a string or a word."""
        if self.take_mark("["):
            return self.read_items(self.read_value, "]", "a value")
        if self.is_mark("{"):
            self.place += 1
            return self.options_of(Token("word", "", self.next_token.at)).options
        token = self.take_token("a value", "word", "string")
        if token.kind == "string":
            return self.unquoted(token)
        if self.take_mark("{"):
            return self.options_of(token)
        return read_word(token.text)


def _format_value(value: object) -> str:
    """The text of one value."""
    if isinstance(value, Spec):
        return value.name + (_format_options(value.options) if value.options else "")
    if isinstance(value, dict):
        return _format_options(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_format_value, value)) + "]"
    if isinstance(value, str):
        return _quote_word(value)
    return next((word for word, meaning in WORDS.items() if value is meaning), repr(value))


def _format_options(options: Mapping[str, object]) -> str:
    """The text of options in braces."""
    return (
        "{"
        + ",".join(f"{_quote_word(key)}={_format_value(value)}" for key, value in options.items())
        + "}"
    )


def _quote_word(word: str) -> str:
    """The word, quoted where it would be read as something else."""
    plain = re.fullmatch(r'[^\s"{}\[\],=]+', word) is not None and isinstance(read_word(word), str)
    if plain:
        return word
    return json.dumps(word)
