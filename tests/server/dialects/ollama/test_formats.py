"""Objects of a schema have the properties that it names, and no others."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from trio_runner.server.dialects.ollama.formats import closed

NAMED = {"type": "object", "properties": {"a": {"type": "integer"}}}
SHUT = {**NAMED, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (NAMED, SHUT),
        ({"type": "object"}, {"type": "object"}),
        ({}, {}),
        (True, True),
        ({**NAMED, "additionalProperties": True}, {**NAMED, "additionalProperties": True}),
        ({**NAMED, "patternProperties": {}}, {**NAMED, "patternProperties": {}}),
        ({"items": NAMED, "not": NAMED}, {"items": SHUT, "not": SHUT}),
        ({"anyOf": [NAMED, {"type": "null"}]}, {"anyOf": [SHUT, {"type": "null"}]}),
        (
            {"$defs": {"x": NAMED}, "allOf": [{"$ref": "#/$defs/x"}]},
            {"$defs": {"x": SHUT}, "allOf": [{"$ref": "#/$defs/x"}]},
        ),
        ({"allOf": [NAMED, NAMED]}, {"allOf": [NAMED, NAMED]}),
        ({**NAMED, "anyOf": [NAMED]}, {**NAMED, "anyOf": [NAMED]}),
        ({"enum": [NAMED], "default": NAMED}, {"enum": [NAMED], "default": NAMED}),
        ({"properties": 1, "items": [], "anyOf": {}}, {"properties": 1, "items": [], "anyOf": {}}),
    ],
)
def test_objects_are_closed(schema: Any, expected: Any) -> None:
    before = copy.deepcopy(schema)
    assert closed(schema) == expected
    assert schema == before


def test_a_property_may_be_called_properties() -> None:
    schema = {"type": "object", "properties": {"properties": NAMED, "items": {"type": "string"}}}
    assert closed(schema) == {
        "type": "object",
        "properties": {"properties": SHUT, "items": {"type": "string"}},
        "additionalProperties": False,
    }
