"""The grammar of pipeline text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.graph.errors import PipelineError
from secateur.passes.language.grammar import Spec, format_specs, parse_specs, read_word

WORD = st.from_regex(r"[a-z][a-z0-9_.@#:-]{0,8}", fullmatch=True)
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    WORD,
)


def specs(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Spec]:
    return st.builds(Spec, WORD, st.dictionaries(WORD, values, max_size=3))


def nested(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    maps = st.dictionaries(st.text(min_size=1), children, max_size=3)
    filled = specs(children).filter(
        lambda spec: bool(spec.options)
    )  # a bare name as a value is a word
    return st.one_of(st.lists(children, max_size=3), maps, filled)


@given(st.lists(specs(st.recursive(SCALAR, nested, max_leaves=8)), min_size=1, max_size=3))
def test_what_is_written_reads_back(written: list[Spec]) -> None:
    assert parse_specs(format_specs(written)) == written


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("2e6", 2e6),
        (".5", 0.5),
        ("-3", -3),
        ("+7", 7),
        ("1e", "1e"),
        ("1_000", "1_000"),
        ("nan", "nan"),
        ("-inf", float("-inf")),
        ("true", True),
        ("null", None),
        ("none", "none"),
        ("2:4", "2:4"),
        ("re:.*", "re:.*"),
    ],
)
def test_words(word: str, value: Any) -> None:
    assert read_word(word) == value
    assert type(read_word(word)) is type(value)


def test_values_of_every_kind() -> None:
    text = """
      a { x = 2e6 , y = [1, [two], "th,ree"], z = inner{p=1}, m = {"k 1"=null} , } ,
      b ,
    """
    options = {
        "x": 2e6,
        "y": [1, ["two"], "th,ree"],
        "z": Spec("inner", {"p": 1}),
        "m": {"k 1": None},
    }
    assert parse_specs(text) == [Spec("a", options), Spec("b")]


@pytest.mark.parametrize(
    ("text", "at", "says"),
    [
        ("", None, "empty"),
        ("  ", None, "empty"),
        ("a{", 3, "option name"),
        ("a{x}", 4, "'=' after x"),
        ("a{x=}", 5, "a value"),
        ("a{x=1", 6, "',' or '}'"),
        ("a{x=[1,2}", 9, "',' or ']'"),
        ("a,,b", 3, "a pass name"),
        (",a", 1, "a pass name"),
        ("a b", 3, "',' or the end"),
        ("a}", 2, "',' or the end"),
        ('a{x="y}', 5, "does not end"),
        ("a{x=1,x=2}", 7, "twice"),
        ("a{x=1}\n,b{y}", 12, "'=' after y"),
    ],
)
def test_errors_say_what_and_where(text: str, at: int | None, says: str) -> None:
    with pytest.raises(PipelineError) as caught:
        parse_specs(text)
    assert says in str(caught.value)
    if at is not None:
        assert f"(at character {at})" in str(caught.value)
        line, caret = str(caught.value).splitlines()[-2:]
        assert caret.index("^") - 2 == at - 1 - (text.rfind("\n", 0, at - 1) + 1)
        assert line.strip() in text
