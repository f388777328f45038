"""Schemas as llguidance gets them: never wider than what was asked for."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.core.pattern import rust_pattern
from trio_runner.core.schema import FORMATS, MAX_MEETING, MAX_NAME_PATTERNS, MAX_NUMBER, MAX_OPTIONAL, guided_schema
from trio_runner.errors import InvalidGrammar


def guided(schema: object) -> Any:
    result = json.loads(guided_schema(json.dumps(schema)))
    del result["x-guidance"]
    return result


@pytest.mark.parametrize(
    ("extensions", "settings"),
    [
        ({}, {"whitespace_pattern"}),
        ({"x-guidance": {"lenient": True}}, {"lenient", "whitespace_pattern"}),
        ({"x-guidance": {"whitespace_flexible": True}}, {"whitespace_flexible"}),
    ],
)
def test_white_space_is_bounded_unless_the_schema_says_how(extensions: dict[str, Any], settings: set[str]) -> None:
    result = json.loads(guided_schema(json.dumps({"type": "object", **extensions})))
    assert set(result.pop("x-guidance")) == settings
    assert result == {"type": "object"}


def test_the_order_of_properties_is_kept() -> None:
    properties: dict[str, Any] = {"b": {}, "a": {}, "z": {}, "c": {}}
    assert list(guided({"properties": properties})["properties"]) == list(properties)


def test_what_is_no_schema_is_left_alone() -> None:
    data = {"exclusiveMinimum": 0, "pattern": "\\A", "format": "date"}
    for keyword in ("const", "default"):
        assert guided({keyword: data}) == {keyword: data}
    assert guided({"enum": [data], "examples": [data]}) == {"enum": [data], "examples": [data]}
    assert guided({"properties": {"pattern": {"const": 1}}}) == {"properties": {"pattern": {"const": 1}}}


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"const": MAX_NUMBER + 1}, "const"),
        ({"enum": [1, {"a": [-MAX_NUMBER - 1]}]}, "enum"),
        ({"const": 0.12345678901234567}, "const"),
        ({"minimum": MAX_NUMBER + 1}, "minimum"),
        ({"items": {"exclusiveMaximum": -MAX_NUMBER - 1}}, "exclusiveMaximum"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"allOf": [{"required": ["a"]}, {"minProperties": 2}]}, "minProperties"),
        ({"default": {"minProperties": 2}, "$ref": "#/default"}, "minProperties"),
        ({"properties": {f"p{index}": {} for index in range(MAX_OPTIONAL + 1)}}, "properties"),
        ({"allOf": [{"multipleOf": 0.00001}, {"multipleOf": 9999}]}, "multipleOf"),
        ({"pattern": "[a&&b]"}, "pattern"),
        ({"allOf": [{"pattern": f"a{index}"} for index in range(MAX_MEETING + 1)]}, "pattern"),
        ({"allOf": [{"items": {"pattern": f"a{index}"}} for index in range(MAX_MEETING + 1)]}, "pattern"),
        ({"patternProperties": {f"a{index}": {} for index in range(MAX_NAME_PATTERNS + 1)}}, "patternProperties"),
        (
            {
                "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}", "pattern": str(n)} for n in range(20)} | {"d20": {}},
                "items": {"$ref": "#/$defs/d0"},
            },
            "pattern",
        ),
        (
            {"$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(2000)}, "$ref": "#/$defs/d0"},
            "references",
        ),
    ],
)
def test_what_llguidance_would_get_wrong_is_refused_by_name(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidGrammar, match=rf"\b{named}\b") as refused:
        guided(schema)
    assert refused.value.param == "json_schema"


@pytest.mark.parametrize(
    "schema",
    [
        {"required": ["a", "b"], "minProperties": 3},
        {"minProperties": 1},
        {"properties": {"minProperties": {"type": "integer"}}},
        {"properties": {"a": {"multipleOf": 0.01}, "b": {"multipleOf": 5}}},
        {"const": MAX_NUMBER},
        {"anyOf": [{"pattern": f"a{index}"} for index in range(100)]},
        {"properties": {f"p{index}": {"pattern": str(index)} for index in range(100)}, "allOf": [{"required": ["p0"]}]},
        {"allOf": [{"pattern": f"a{index}"} for index in range(MAX_MEETING)]},
        {"pattern": "a", "properties": {"a": {"$ref": "#"}}},
    ],
)
def test_what_llguidance_gets_right_is_unchanged(schema: dict[str, Any]) -> None:
    assert guided(schema) == schema


@given(
    st.sampled_from([0, 1]),
    st.one_of(st.integers(-MAX_NUMBER, MAX_NUMBER), st.floats(-1e6, 1e6, allow_subnormal=False)),
    st.sampled_from([{}, {"type": "integer"}, {"type": "number"}]),
)
def test_bounds_become_inclusive_and_no_wider(upper: int, bound: float, kind: dict[str, Any]) -> None:
    inclusive, exclusive = (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))[upper]
    sign = -1 if upper else 1
    for name in (inclusive, exclusive):
        try:
            result = guided({**kind, name: bound})
        except InvalidGrammar:
            assert sign * bound > MAX_NUMBER - 100  # nothing is left beyond it
            continue
        assert len({inclusive, exclusive} & result.keys()) == 1
        if inclusive in result:
            assert (result[inclusive] - bound) * sign >= 0
            assert name == inclusive or result[inclusive] != bound
            assert abs(result[inclusive] - bound) <= max(1.001, abs(bound) * 2e-14)
        else:
            assert name == exclusive
            assert bound != int(bound)


def test_bounds_of_draft_4_and_doubled_ones() -> None:
    assert guided({"minimum": 3, "exclusiveMinimum": True, "type": "integer"}) == {"type": "integer", "minimum": 4}
    assert guided({"minimum": 5, "exclusiveMinimum": 3, "type": "integer"}) == {"type": "integer", "minimum": 5}
    assert guided({"maximum": 5, "exclusiveMaximum": 3, "type": "integer"}) == {"type": "integer", "maximum": 2}
    assert guided({"minimum": -(10**30), "maximum": 10**30}) == {"minimum": -MAX_NUMBER, "maximum": MAX_NUMBER}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", ["2024-02-29", "2000-02-29", "2023-02-28", "0004-02-29", "1999-12-31", "2400-02-29"],
         ["2023-02-29", "1900-02-29", "0000-01-01", "0000-02-29", "2100-02-29"]),
        ("time", ["23:59:59Z", "00:00:00.5+01:00"], ["23:59:60Z"]),
        ("date-time", ["2024-02-29T12:00:00Z", "2023-01-31t23:59:59.1z"],
         ["2023-02-29T12:00:00Z", "2023-01-31T23:59:60Z", "0000-01-01T00:00:00Z"]),
    ],
)  # fmt: skip
def test_formats_mean_real_dates_and_times(name: str, good: list[str], bad: list[str]) -> None:
    pattern = re.compile(FORMATS[name])
    assert all(pattern.match(text) for text in good)
    assert not any(pattern.match(text) for text in bad)


def test_formats_and_patterns_hold_together() -> None:
    assert guided({"format": "date"})["pattern"] == FORMATS["date"]
    both = guided({"format": "date", "pattern": "^2024", "allOf": [{"maxLength": 10}]})
    assert both["pattern"] == "^2024"
    assert both["allOf"] == [{"maxLength": 10}, {"pattern": FORMATS["date"]}]
    assert guided({"format": "uuid"}) == {"format": "uuid"}


@pytest.mark.parametrize(
    "pattern",
    [
        "^[a-z]{2,4}$",
        "(a|b)+",
        "^(?:x|y)$",
        r"^\d\w\.\/\-$",
        r"[\d\-\]]",
        "(?i)ab",
        "(?<year>[0-9])",
        r"\u00e9\x41",
        r"\p{Lu}",
    ],
)
def test_patterns_that_mean_the_same_everywhere_are_unchanged(pattern: str) -> None:
    assert rust_pattern(pattern) == pattern


@pytest.mark.parametrize(
    "pattern",
    [r"\Aa", r"a\z", r"\x{41}", r"(a)\1", r"\a", "[a[b]]", "[a&&b]", "[a--b]", "[a~~b]", "[]a]", "[^]a]", "(?x) a",
     "a\\", "(?-u:.)", r"\p{^L}x\Q"],
)  # fmt: skip
def test_patterns_with_two_meanings_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="no meaning"):
        rust_pattern(pattern)


def test_dots_and_white_space_are_those_of_javascript() -> None:
    assert rust_pattern("^.$") == r"^[^\n\r\u2028\u2029]$"
    assert rust_pattern("[.]") == "[.]"
    dot, space = re.compile(rust_pattern("^.$")), re.compile(rust_pattern(r"^\s$"))
    assert not any(map(dot.match, "\n\r\u2028\u2029"))
    assert all(map(space.match, " \t\n\r\u00a0\u2003"))
    assert not space.match("\x85")


@given(st.text(st.sampled_from("ab()[]{}^$.*+?|\\-&~:<>=!x1isdDwWsSAzbB,"), max_size=12))
def test_any_text_is_a_pattern_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert len(rust_pattern(text)) >= len(text)
