"""Pipeline text: ``score{metric=taylor},prune-width{mlp=0.25,skip=[0,-1]}``.

A text is a list of specs; a spec is a name with options; a value is a number, ``true``, ``false``, ``null``, a word, a
quoted string, a list ``[a,b]``, a map ``{a=1}`` or another spec ``name{a=1}``.  Blanks and line ends mean nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from secateur.graph.errors import PipelineError
from secateur.graph.reading import MAX_DEPTH, MAX_NUMBER_DIGITS, reason_of, shown

TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[^\s"{}\[\],=]+)|(?P<mark>[{}\[\],=])|(?P<end>$))""", re.VERBOSE
)
LINE_CHARACTERS = 160
WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Spec:
    """A name with options as they were written.  ``at`` and ``option_at`` are offsets into the text, for messages."""

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


def located(message: str, text: str, at: int | None) -> str:
    """The message, its position, and the line of the text with a caret under that position."""
    if at is None:
        return message
    start = max(text.rfind("\n", 0, at) + 1, at - LINE_CHARACTERS // 2)
    line = text[start : start + LINE_CHARACTERS].split("\n", 1)[0]
    return f"{message} (at character {at + 1})\n  {line}\n  {' ' * (at - start)}^"


def parse_specs(text: str) -> list[Spec]:
    """The specs of a pipeline text.

    Raises: PipelineError: the text does not follow the grammar; says what was expected, what stands there, and where.
    """
    reader = _Reader(text)
    specs = reader.several(reader.spec, "end", "a pass name")
    if not specs:
        raise PipelineError("the pipeline text is empty: write at least one pass, for example score,prune-width")
    return specs


def format_specs(specs: Iterable[Spec]) -> str:
    """The text that ``parse_specs`` reads back to equal specs."""
    return ",".join(_format(spec) for spec in specs)


def read_word(word: str) -> Any:
    """The value a bare word stands for: a number, true, false, null, or the word itself."""
    if word in WORDS:
        return WORDS[word]
    if len(word) > MAX_NUMBER_DIGITS:
        return word
    for number in (int, float):
        try:
            return number(word) if re.match(r"[-+.\d]", word) and "_" not in word else word
        except ValueError:
            continue
    return word


def tokenize(text: str) -> list[Token]:
    """The pieces of a text, an ``end`` piece last."""
    tokens, at = [], 0
    while True:
        match = TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            start = len(text) - len(text[at:].lstrip())
            raise PipelineError(located("a quoted string does not end", text, start))
        tokens.append(Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
        at = match.end()
        if match.lastgroup == "end":
            return tokens


class _Reader:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.place = text, tokenize(text), 0
        self.depth = 0

    @property
    def token(self) -> Token:
        return self.tokens[self.place]

    def fail(self, expected: str) -> PipelineError:
        found = "the end of the text" if self.token.kind == "end" else shown(self.token.text)
        return PipelineError(located(f"expected {expected}, found {found}", self.text, self.token.at))

    def is_mark(self, mark: str) -> bool:
        return self.token.kind == "end" if mark == "end" else (self.token.kind == "mark" and self.token.text == mark)

    def take_mark(self, mark: str) -> bool:
        found = self.is_mark(mark)
        self.place += int(found and mark != "end")
        return found

    def take(self, expected: str, *kinds: str) -> Token:
        token = self.token
        if token.kind not in kinds:
            raise self.fail(expected)
        self.place += 1
        return token

    def several(self, one: Callable[[], Any], close: str, what: str) -> list[Any]:
        """Items between commas up to the closing mark; a comma may stand after the last."""
        found: list[Any] = []
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.fail(f"at most {MAX_DEPTH} levels")
        while not self.take_mark(close):
            if found and not self.take_mark(","):
                raise self.fail("',' or " + (repr(close) if close != "end" else "the end"))
            if found and self.take_mark(close):
                break
            if self.token.kind == "mark" and what == "a pass name":
                raise self.fail(what)
            found.append(one())
        self.depth -= 1
        return found

    def spec(self) -> Spec:
        name = self.take("a name", "word")
        return self.options_of(name) if self.take_mark("{") else Spec(name.text, at=name.at)

    def options_of(self, name: Token) -> Spec:
        spec = Spec(name.text, at=name.at)
        for key, value, at in self.several(self.option, "}", "an option"):
            if key in spec.options:
                raise PipelineError(located(f"option {shown(key)} is given twice", self.text, at))
            spec.options[key], spec.option_at[key] = value, at
        return spec

    def option(self) -> tuple[str, Any, int]:
        token = self.take("an option name", "word", "string")
        if not self.take_mark("="):
            raise self.fail(f"'=' after {shown(token.text)[1:-1]}")
        key = self.unquoted(token) if token.kind == "string" else token.text
        return key, self.value(), token.at

    def unquoted(self, token: Token) -> str:
        """The text that a quoted string stands for."""
        try:
            return str(json.loads(token.text, strict=False))
        except ValueError as error:
            message = f"the quoted string is not one of JSON: {reason_of(error)}"
            raise PipelineError(located(message, self.text, token.at)) from None

    def value(self) -> Any:
        if self.take_mark("["):
            return self.several(self.value, "]", "a value")
        if self.is_mark("{"):
            self.place += 1
            return self.options_of(Token("word", "", self.token.at)).options
        token = self.take("a value", "word", "string")
        if token.kind == "string":
            return self.unquoted(token)
        return self.options_of(token) if self.take_mark("{") else read_word(token.text)


def _format(value: Any) -> str:
    if isinstance(value, Spec):
        return value.name + (_braces(value.options) if value.options else "")
    if isinstance(value, dict):
        return _braces(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_format, value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    return next((word for word, meaning in WORDS.items() if value is meaning), repr(value))


def _braces(options: dict[str, Any]) -> str:
    return "{" + ",".join(f"{_quoted(key)}={_format(value)}" for key, value in options.items()) + "}"


def _quoted(word: str) -> str:
    plain = re.fullmatch(r'[^\s"{}\[\],=]+', word) is not None and isinstance(read_word(word), str)
    return word if plain else json.dumps(word)
