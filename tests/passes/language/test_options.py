"""Options are checked against their types, and a wrong one is named with the nearest right one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import BeforeValidator, Field, InstanceOf

from secateur.passes.language.grammar import Spec
from secateur.passes.language.options import (
    OptionError,
    Options,
    Table,
    options_table,
    spec_to_json,
)


@dataclass(frozen=True)
class Inner(Options):
    """An inner thing."""

    name: ClassVar[str] = "inner"
    depth: Annotated[int, Field(ge=1)] = 1


INNER = Table("an inner thing", Inner)


@dataclass(frozen=True)
class Outer(Options):
    """An outer thing.  More.

    ratio: how much, as a fraction
    tokens: how many
    layers: which ones,
        from the end if negative
    Source: nowhere.
    weights: how heavy
    """

    name: ClassVar[str] = "outer-thing"
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    mode: Literal["fast", "slow"] = "fast"
    tokens: int = 10
    flag: bool = False
    layers: tuple[int, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    inner: Annotated[InstanceOf[Inner], BeforeValidator(INNER.build)] = field(default_factory=Inner)


TABLE = Table("a thing", Outer)


def test_types_are_coerced_where_nothing_is_lost() -> None:
    built = TABLE.build(
        Spec("outer-thing", {"ratio": 0, "tokens": 2e6, "layers": [1, -1], "inner": "inner"})
    )
    assert built == Outer(ratio=0.0, tokens=2_000_000, layers=(1, -1))
    assert isinstance(built.tokens, int)
    assert isinstance(built.ratio, float)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 1.0}, "should be less than 1"),
        ({"ratio": "0.5"}, "expected float, found str"),
        ({"ratio": False}, "expected float, found bool"),
        ({"tokens": 2.5}, "tokens=2.5"),
        ({"tokens": True}, "expected int, found bool"),
        ({"flag": 1}, "expected bool, found int"),
        ({"layers": ["1"]}, "found list"),
        ({"layers": 1}, "layers=1"),
        ({"mode": "fats"}, "did you mean 'fast'?"),
        ({"mod": "fast"}, "has no option 'mod'; did you mean 'mode'?"),
        ({"weights": {"a": "b"}}, "'b'"),
        ({"inner": "iner"}, "did you mean 'inner'?"),
        (
            {"inner": Spec("inner", {"depth": 0})},
            "inner: depth=0: should be greater than or equal to 1",
        ),
        ({"inner": {"inner": {"deep": 1}}}, "did you mean 'depth'?"),
        ({"inner": 3}, "expected the name of an inner thing"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError) as caught:
        TABLE.build(Spec("outer-thing", options))
    assert says in str(caught.value)
    assert "outer-thing" in str(caught.value)


def test_unknown_name() -> None:
    with pytest.raises(
        OptionError, match=r"'outer' is not the name of a thing; did you mean 'outer-thing'\?"
    ):
        TABLE.build("outer")


def test_construction_in_python_is_checked_too() -> None:
    with pytest.raises(OptionError, match="ratio=2"):
        Outer(ratio=2)


def test_spec_leaves_defaults_out_and_json_does_not() -> None:
    thing = Outer(tokens=7, inner=Inner(depth=2))
    assert thing.to_spec() == Spec(
        "outer-thing", {"tokens": 7, "inner": Spec("inner", {"depth": 2})}
    )
    assert spec_to_json(thing.to_spec()) == {
        "outer-thing": {"tokens": 7, "inner": {"inner": {"depth": 2}}}
    }
    assert thing.to_json() == {
        "ratio": 0.5,
        "mode": "fast",
        "tokens": 7,
        "flag": False,
        "layers": [],
        "weights": {},
        "inner": {"inner": {"depth": 2}},
    }
    assert TABLE.build({"outer-thing": thing.to_json()}) == thing


def test_help_names_every_option() -> None:
    assert Outer.summary() == "An outer thing.  More."
    assert options_table(Outer) == [
        ("ratio", "0.5", "how much, as a fraction"),
        ("mode", "fast", "how much, as a fraction"),
        ("tokens", "10", "how many"),
        ("flag", "false", "how many"),
        ("layers", "[]", "which ones, from the end if negative"),
        ("weights", "{}", "how heavy"),
        ("inner", "inner", "how heavy"),
    ]
