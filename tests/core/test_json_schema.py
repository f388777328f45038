"""Schemas as callers give them, and what is refused before anything is compiled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec
import pytest

from trio_runner.errors import InvalidRequest
from trio_runner.json_schema import MAX_PATTERN_BYTES, MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, schema_text
from trio_runner.request import make_request
from trio_runner.sampling import SamplingParams


class Struct(msgspec.Struct):
    name: str
    age: int = 0


@dataclass
class Data:
    name: str


class LikePydantic:
    """A class with the method that pydantic's models have."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {"type": "object", "properties": {"name": {"type": "string"}}}


def test_a_request_takes_a_text_an_object_or_a_class() -> None:
    def schema_of(value: object) -> Any:
        return json.loads(make_request("hello", {"json_schema": value}).sampling.json_schema)

    assert schema_of('{"type": "null"}') == {"type": "null"}
    assert schema_of({"type": "null"}) == {"type": "null"}
    assert schema_of(MappingProxyType({"items": MappingProxyType({})})) == {"items": {}}
    assert schema_of(LikePydantic) == LikePydantic.model_json_schema()
    assert schema_of(Struct) == msgspec.json.schema(Struct)
    assert schema_of(Data)["$defs"]["Data"]["required"] == ["name"]
    assert schema_of(list[int]) == {"type": "array", "items": {"type": "integer"}}
    assert make_request("hello", {"json_schema": ""}).sampling.json_schema == ""


@pytest.mark.parametrize("value", [{"a": object()}, {"a": float("nan")}, {"a": b""}, complex, 5, [], b"{}", None])
def test_what_describes_no_schema_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="json_schema") as refused:
        make_request("hello", {"json_schema": value})
    assert refused.value.param == "json_schema"


def test_an_object_that_contains_itself_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["properties"] = endless
    with pytest.raises(InvalidRequest, match="json_schema"):
        schema_text(endless)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is no JSON"),
        ('{"a": NaN}', "is no JSON"),
        ('{"maximum": 1e999}', "too large"),
        ('{"maximum": -1' + "0" * 400 + ".5}", "too large"),
        ("5", "must be an object, true or false"),
        ("[]", "must be an object, true or false"),
        ("false", "no value obeys"),
        ("null", "must be an object, true or false"),
        ('"object"', "must be an object, true or false"),
        ('{"items":' * MAX_SCHEMA_DEPTH + "{}" + "}" * MAX_SCHEMA_DEPTH, "levels deep"),
        ('{"items":' * 10_000 + "{}" + "}" * 10_000, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"title": "' + "x" * MAX_SCHEMA_BYTES + '"}', "bytes"),
        (json.dumps({"items": [{"pattern": "a?" * 1025}]}), "pattern of more than 2048 bytes"),
        (json.dumps({"patternProperties": {"\N{EURO SIGN}" * 683: {}}}), "pattern of more than 2048 bytes"),
        ('{"multipleOf": 10001}', "more than 10000"),
        ('{"multipleOf": 1e5}', "more than 10000"),
        ('{"multipleOf": -0.12345}', "more than 10000"),
        ('{"allOf": [{"multipleOf": 101}, {"items": {"multipleOf": 103}}]}', "more than 10000"),
        ('{"multipleOf": 1' + "0" * 4000 + "}", "more than 10000"),
        ('{"x-guidance": 5}', "x-guidance"),
        ('{"x-guidance": {"item_separator": ";"}}', "item_separator"),
        ('{"x-guidance": {"whitespace_pattern": "x"}}', "whitespace_pattern"),
        ('{"x-guidance": {"lenient": 1}}', "lenient"),
    ],
)
def test_bad_schemas_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as refused:
        SamplingParams(json_schema=text)
    assert refused.value.param == "json_schema"
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "a" * MAX_PATTERN_BYTES},
        {"properties": {"pattern": {"const": "a" * 5000}, "multipleOf": {"type": "integer"}}},
        {"multipleOf": 10_000},
        {"anyOf": [{"multipleOf": 0.01}, {"multipleOf": 0.25}, {"multipleOf": 1000}, {"multipleOf": 60}]},
        {"multipleOf": "many", "pattern": 5, "patternProperties": []},
        {"multipleOf": 0},
        {"multipleOf": True},
        {"multipleOf": 1e-300},
    ],
)
def test_what_costs_little_is_not_refused(schema: object) -> None:
    SamplingParams(json_schema=json.dumps(schema))


def test_a_schema_beside_a_grammar_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="cannot be combined") as refused:
        SamplingParams(json_schema="{}", grammar='root ::= "x"')
    assert refused.value.param == "json_schema"
