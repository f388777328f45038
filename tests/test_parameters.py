"""The table that a dataclass of parameters makes: checks, ranges and defaults in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from trio_runner.parameters import boolean, first_complaint, integer, number, one_of, other, parameters_of, text


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    ratio: float = number(0.5, 0, 1, unit="parts", doc="A ratio.")
    pause: float = number(2.0, 0, math.inf, doc="A pause.")
    count: int | None = integer(None, 1, 9, doc="A count.", default_text="as many as there are")
    loud: bool = boolean(True, doc="Be loud.")
    name: str = text("", max_bytes=4, doc="A name.")
    mode: str = one_of("a", ("a", "b"), doc="A mode.")
    pair: tuple[int, ...] = other((1, 2), doc="A pair.")
    plain: list[int] = field(default_factory=list)


def test_a_table_has_the_parameters_in_their_order() -> None:
    table = parameters_of(Table)
    assert list(table) == ["ratio", "pause", "count", "loud", "name", "mode", "pair"]
    assert all(parameter.name == name for name, parameter in table.items())
    assert parameters_of(Table) is table


def test_the_defaults_are_allowed() -> None:
    assert first_complaint(Table()) is None


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("ratio", 2, "ratio must be between 0 and 1 parts, not 2"),
        ("ratio", math.nan, "ratio must be between 0 and 1 parts, not nan"),
        ("ratio", True, "ratio must be a number, not bool"),
        ("ratio", None, "ratio must be a number, not NoneType"),
        ("pause", -1.5, "pause must be 0 or more, not -1.5"),
        ("count", 0, "count must be between 1 and 9, not 0"),
        ("count", 10**30, "count must be between 1 and 9, not a huge number"),
        ("count", 1.0, "count must be an integer, not float"),
        ("loud", 1, "loud must be true or false, not int"),
        ("name", "four+", "name has 5 bytes, but at most 4 are allowed"),
        ("name", "\ud800", "name contains half of a surrogate pair, which is no character"),
        ("name", b"x", "name must be a string, not bytes"),
        ("mode", "c", 'mode must be "a" or "b", not "c"'),
        ("mode", "\ud800" + "c" * 100, rf'mode must be "a" or "b", not "\ud800{"c" * 39}"'),
        ("mode", ["a"], 'mode must be "a" or "b", not list'),
    ],
)
def test_a_complaint_names_the_parameter(name: str, value: Any, complaint: str) -> None:
    assert first_complaint(Table(**{name: value})) == (name, complaint)


def test_the_first_complaint_is_that_of_the_first_field() -> None:
    assert first_complaint(Table(mode="c", loud=1, pause=-1.5)) == ("pause", "pause must be 0 or more, not -1.5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "range_text", "default_words"),
    [
        ("ratio", "between 0 and 1 parts", "0.5"),
        ("pause", "0 or more", "2"),
        ("count", "between 1 and 9", "as many as there are"),
        ("loud", "true or false", "True"),
        ("name", "at most 4 bytes", ""),
        ("mode", "a, b", "a"),
        ("pair", "", "(1, 2)"),
    ],
)
def test_ranges_and_defaults_in_words(name: str, range_text: str, default_words: str) -> None:
    parameter = parameters_of(Table)[name]
    assert (parameter.range_text, parameter.default_words) == (range_text, default_words)
