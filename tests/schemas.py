"""Two hundred JSON schemas of the kinds that people send.

`SUPPORTED` must be honoured, `REFUSED` must be refused by name, and `EITHER` may be one or the other. None may give a
text that is no value of it. The kinds are those of JSONSchemaBench (https://arxiv.org/abs/2501.10868): function
signatures, configurations, resources of web services, and the keywords of JSON Schema one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

Schema: TypeAlias = dict[str, Any]

STRING: Final[Schema] = {"type": "string", "maxLength": 6}
INTEGER: Final[Schema] = {"type": "integer", "minimum": -50, "maximum": 50}
WORD: Final[Schema] = {"enum": ["red", "green", "blue"]}


def _closed(properties: Schema, *required: str, **more: Any) -> Schema:
    """An object with no other properties than these."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required or properties),
        "additionalProperties": False,
        **more,
    }


def _list(items: Any, low: int = 0, high: int = 3, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high, **more}


# ---- what must be honoured -------------------------------------------------------------------------------------------


def _objects() -> Iterator[Schema]:
    names = ["a", "b", "c"]
    for size in range(4):
        for required in itertools.combinations(names, size):
            yield {
                "type": "object",
                "properties": {name: STRING if name == "b" else INTEGER for name in names},
                "required": list(required),
                "additionalProperties": False,
            }
    yield {"type": "object", "additionalProperties": False}
    yield {"type": "object", "additionalProperties": INTEGER, "maxProperties": 3}
    yield {
        "properties": {"a": INTEGER},
        "required": ["a"],
        "additionalProperties": STRING,
        "maxProperties": 2,
        "type": "object",
    }
    yield {"type": "object", "properties": {"a": INTEGER}, "required": ["z"], "additionalProperties": WORD}
    yield {"type": "object", "patternProperties": {"^x_[a-c]{1,2}$": INTEGER}, "additionalProperties": False}
    yield {
        "type": "object",
        "patternProperties": {"^n[0-9]$": INTEGER, "^s[0-9]$": STRING},
        "additionalProperties": False,
    }
    yield {"type": "object", "minProperties": 1, "additionalProperties": WORD}
    yield {"type": "object", "maxProperties": 0}
    yield _closed({"kéy": INTEGER, 'quo"te': INTEGER, "back\\slash": INTEGER, "": INTEGER, "new\nline": INTEGER})
    yield _closed({"a": True, "b": {"maxItems": 2, "type": "array", "items": WORD}}, "b")
    yield {"type": "object", "properties": {"a": False, "b": INTEGER}, "required": ["b"], "additionalProperties": False}


def _values() -> Iterator[Schema]:
    for value in (
        None,
        True,
        False,
        0,
        -1,
        1.5,
        1e10,
        "",
        "text",
        '\u00e9\n"\\',
        [],
        [1, "a", None],
        {},
        {"a": {"b": [1]}},
    ):
        yield {"const": value}
    yield {"enum": [1, "one", None, [1], {"one": 1}]}
    yield {"enum": ["a", "ab", "abc", "b"]}
    yield {"enum": [1, 10, 100, -1]}
    yield {"type": "string", "enum": ["a", 1, None, "b"]}
    yield {"type": ["integer", "null", "boolean"]}
    yield {"type": ["string", "array"], "maxLength": 4, "items": WORD, "maxItems": 2}
    for kind in ("null", "boolean"):
        yield {"type": kind}


def _numbers() -> Iterator[Schema]:
    for low, high in ((0, 9), (-5, 5), (7, 7), (99, 101), (-1000, -998), (0, 10**9), (123, 4567)):
        yield {"type": "integer", "minimum": low, "maximum": high}
    yield {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5}
    yield {"type": "integer", "exclusiveMinimum": -1, "maximum": 0}
    for least, most in ((0.0, 1.0), (0.5, 0.75), (-1.5, 2.25), (99.5, 100.0), (0.001, 0.002)):
        yield {"type": "number", "minimum": least, "maximum": most}
    yield {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    yield {"type": "number", "exclusiveMinimum": 0, "maximum": 10}
    for factor in (2, 5, 7, 10, 25, 100):
        yield {"type": "integer", "multipleOf": factor, "minimum": 0, "maximum": 5000}
    yield {"type": "number", "multipleOf": 0.25, "minimum": -2, "maximum": 2}
    yield {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 100}
    yield {"type": "integer", "minimum": 0.5, "maximum": 2.5}


def _strings() -> Iterator[Schema]:
    for low, high in ((0, 0), (0, 1), (1, 1), (3, 3), (2, 5), (0, 20)):
        yield {"type": "string", "minLength": low, "maxLength": high}
    for pattern in (
        "^[a-z]{2,4}$",
        "^[A-Z][a-z]*$",
        "^(yes|no|maybe)$",
        "^\\d{3}-\\d{4}$",
        '^[^"\\\\]{0,5}$',
        "^\\w{1,3} \\w{1,3}$",
        "^a.c$",
        "^\\s?x\\s?$",
        "^[0-9a-f]{8}$",
        "^(\\([0-9]{3}\\))?[0-9]{3}-[0-9]{4}$",
        "^$",
        "^.{2}$",
    ):
        yield {"type": "string", "pattern": pattern}
    yield {"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 4}
    yield {"type": "string", "pattern": "b", "maxLength": 4}
    yield {"type": "string", "pattern": "^ab", "maxLength": 5}
    yield {"type": "string", "pattern": "yz$", "maxLength": 5}
    for kind in ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"):
        yield {"type": "string", "format": kind, "maxLength": 40}


def _arrays() -> Iterator[Schema]:
    for low, high in ((0, 0), (0, 2), (1, 1), (2, 4), (5, 5)):
        yield _list(WORD, low, high)
    yield _list(_list(INTEGER, 1, 2), 1, 2)
    yield _list(_closed({"a": INTEGER}), 1, 3)
    yield {"type": "array", "prefixItems": [INTEGER, WORD], "items": False, "minItems": 2}
    yield {"type": "array", "prefixItems": [INTEGER, WORD], "items": {"type": "null"}, "minItems": 1, "maxItems": 4}
    yield {"type": "array", "prefixItems": [INTEGER, WORD], "items": False}
    yield {"type": "array", "items": False}
    yield {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [INTEGER, WORD],
        "minItems": 2,
        "additionalItems": False,
    }


def _combinations() -> Iterator[Schema]:
    yield {"anyOf": [INTEGER, WORD, {"type": "null"}]}
    yield {"anyOf": [_closed({"kind": {"const": "x"}, "x": INTEGER}), _closed({"kind": {"const": "y"}, "y": WORD})]}
    yield {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "boolean"}]}
    yield {"oneOf": [_closed({"kind": {"const": "x"}, "x": INTEGER}), _closed({"kind": {"const": "y"}, "y": WORD})]}
    yield {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]}
    yield {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 3}, {"pattern": "^[ab]*$"}]}
    yield {"allOf": [_closed({"a": INTEGER, "b": WORD}), {"properties": {"a": {"minimum": 10}}}]}
    yield {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": WORD}}
    yield {
        "type": "object",
        "properties": {"a": {"anyOf": [INTEGER, {"type": "null"}]}},
        "required": ["a"],
        "additionalProperties": False,
        "title": "With an optional value",
        "description": "as pydantic writes it",
    }
    yield {"anyOf": [{"type": "integer"}, {"type": "integer", "minimum": 5}], "minimum": 1, "maximum": 9}
    yield {"enum": [1, 2, 3, "x"], "type": "integer", "minimum": 2}
    yield {"const": 5, "type": "integer"}


def _references() -> Iterator[Schema]:
    yield {"$defs": {"n": INTEGER}, **_closed({"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#/$defs/n"}})}
    yield {"definitions": {"n": WORD}, **_list({"$ref": "#/definitions/n"}, 1, 3)}
    tree = _closed({"value": INTEGER, "children": _list({"$ref": "#/$defs/tree"}, 0, 2)})
    yield {"$ref": "#/$defs/tree", "$defs": {"tree": tree}}
    linked = _closed({"value": WORD, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}})
    yield linked
    yield {
        "$ref": "#/$defs/a",
        "$defs": {"a": _list({"$ref": "#/$defs/b"}, 0, 2), "b": {"anyOf": [INTEGER, {"$ref": "#/$defs/a"}]}},
    }
    yield {"$defs": {"weird name/~": WORD}, "$ref": "#/$defs/weird%20name~1~0"}
    yield {
        "properties": {"a": WORD, "b": {"$ref": "#/properties/a"}},
        "required": ["b"],
        "type": "object",
        "additionalProperties": False,
    }


def _records() -> Iterator[Schema]:
    """Whole schemas as people write them."""
    date = {"type": "string", "format": "date"}
    person = _closed({"name": STRING, "age": {"type": "integer", "minimum": 0, "maximum": 130}}, "name")
    yield person
    yield _closed({"people": _list(person, 1, 3), "total": INTEGER})
    yield _closed(
        {"name": {"const": "get_weather"}, "arguments": _closed({"city": STRING, "unit": {"enum": ["C", "F"]}}, "city")}
    )
    yield _closed(
        {"id": {"type": "string", "format": "uuid"}, "created": date, "tags": _list(STRING, 0, 3), "owner": person},
        "id",
    )
    yield _closed({"steps": _list(_closed({"explanation": STRING, "output": STRING}), 1, 2), "final_answer": STRING})
    yield _closed(
        {
            "sentiment": {"enum": ["positive", "neutral", "negative"]},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
        }
    )
    yield _closed({"rows": _list(_list({"type": "number", "minimum": -9, "maximum": 9}, 2, 2), 2, 2)})
    yield _closed(
        {
            "version": {"const": 2},
            "jobs": {"type": "object", "additionalProperties": _closed({"run": STRING}), "maxProperties": 2},
        }
    )
    yield {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.com/person", **person}
    yield {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "object",
        "properties": {"a": INTEGER},
        "additionalProperties": False,
    }
    geo = {"type": {"const": "Point"}, "coordinates": _list({"type": "number", "minimum": -180, "maximum": 180}, 2, 2)}
    yield _closed(geo)
    yield _closed({f"field_{index}": WORD for index in range(40)})
    yield {
        "type": "object",
        "properties": {f"field_{index}": {"type": "boolean"} for index in range(40)},
        "additionalProperties": False,
    }


SUPPORTED: Final = tuple(
    itertools.chain(
        _objects(), _values(), _numbers(), _strings(), _arrays(), _combinations(), _references(), _records()
    )
)

# ---- what must be refused --------------------------------------------------------------------------------------------

REFUSED: Final[tuple[tuple[str, Schema | bool], ...]] = (
    ("not", {"not": {"type": "string"}}),
    ("not", _closed({"a": {"type": "integer", "not": {"const": 0}}})),
    ("uniqueItems", _list(INTEGER, 2, 3, uniqueItems=True)),
    ("contains", {"type": "array", "contains": {"const": 1}}),
    ("minContains", {"type": "array", "items": INTEGER, "contains": INTEGER, "minContains": 2}),
    ("if", {"if": {"type": "integer"}, "then": {"minimum": 5}}),
    ("else", {"type": "integer", "if": {"minimum": 5}, "else": {"maximum": 0}}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}),
    ("dependentSchemas", {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}),
    ("propertyNames", {"type": "object", "propertyNames": {"maxLength": 2}}),
    ("unevaluatedProperties", {"type": "object", "unevaluatedProperties": False}),
    ("unevaluatedItems", {"type": "array", "unevaluatedItems": False}),
    ("palindrome", {"type": "string", "format": "palindrome"}),
    ("iri", {"type": "string", "format": "iri"}),
    ("look-around", {"type": "string", "pattern": "^(?!x)a$"}),
    ("no meaning", {"type": "string", "pattern": "^(a)\\1$"}),
    ("unclosed group", {"type": "string", "pattern": "(a"}),
    ("colour", {"type": "colour"}),
    ("minimum", {"type": "integer", "minimum": 5, "maximum": 4}),
    ("minLength", {"type": "string", "minLength": 5, "maxLength": 4}),
    ("minLength", {"type": "string", "minLength": -1}),
    ("minItems", {"type": "array", "minItems": "two"}),
    ("required", {"type": "object", "required": "a"}),
    ("required", _closed({"a": INTEGER}, "b")),
    ("properties", {"type": "object", "properties": []}),
    ("enum", {"enum": "abc"}),
    ("empty", {"enum": []}),
    ("nothing", {"$ref": "#/$defs/nothing"}),
    ("example.com", {"$ref": "https://example.com/other.json"}),
    ("circular", {"allOf": [{"$ref": "#"}, {"type": "object"}]}),
    ("oneOf", {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 10}]}),
    ("no value obeys", False),
)
"""What the message must name, and the schema."""

# ---- what may be either ----------------------------------------------------------------------------------------------

EITHER: Final[tuple[Schema, ...]] = (
    {"type": "object", "properties": {"a": WORD}, "additionalProperties": STRING, "maxProperties": 2},
    {
        "type": "object",
        "properties": {"a": WORD, "b": WORD, "c": WORD},
        "minProperties": 2,
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"a": WORD, "b": WORD}, "maxProperties": 1, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^a": WORD, "b$": INTEGER}, "maxProperties": 3},
    {"type": "object", "properties": {"ab": WORD}, "patternProperties": {"^a": {"const": "red"}}, "required": ["ab"]},
    {"type": "number", "multipleOf": 0.1, "minimum": 0, "maximum": 1},
    {"type": "integer", "multipleOf": 1.5, "minimum": 0, "maximum": 30},
    {"allOf": [{"type": "integer", "multipleOf": 4, "minimum": 0, "maximum": 200}, {"multipleOf": 6}]},
    {"allOf": [{"anyOf": [WORD, INTEGER]}, {"anyOf": [{"type": "integer"}, {"const": "red"}]}]},
    {"allOf": [{"pattern": "^a"}, {"pattern": "b$"}], "type": "string", "maxLength": 5},
    {"type": "string", "format": "date", "pattern": "^2024"},
    {"type": "string", "pattern": "^[A-Z&&[^B]]$"},
    {"type": "string", "pattern": "^.\\s$"},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
    {"type": "number", "exclusiveMaximum": 0, "minimum": -0.5},
    {"allOf": [{"type": "number", "exclusiveMinimum": 2}, {"maximum": 2.25}]},
    {"type": "number", "minimum": 0.30000000000000004, "maximum": 0.30000000000000005},
    {"allOf": [{"type": "integer", "multipleOf": 65537, "minimum": 0}, {"multipleOf": 65539, "maximum": 9999999}]},
    {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
    {"const": 2**53 + 1},
    {"const": -(2**63)},
    {"type": "integer", "minimum": -(2**63), "maximum": -(2**63)},
    {"type": "string", "format": "date", "pattern": "-02-29$"},
    {"type": "string", "format": "date-time", "pattern": "^2023-02.*:60"},
    {"type": "object", "patternProperties": {"^[ab]$": WORD}, "additionalProperties": False, "minProperties": 2},
    {"type": "string", "pattern": "^[\\u00e0-\\u00ff]{2}$"},
    {"type": "string", "pattern": "^\\D\\S\\W$"},
    {"type": "string", "pattern": "^(?i:ab)$"},
    {"type": "string", "pattern": "\\bab\\b", "maxLength": 5},
    {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "integer",
        "minimum": 3,
        "exclusiveMinimum": True,
        "maximum": 6,
    },
    {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$ref": "#/definitions/a",
        "maximum": 5,
        "definitions": {"a": INTEGER},
    },
    {
        "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
        "type": "object",
        "properties": {"a": WORD, "b": WORD},
        "additionalProperties": False,
    },
    {"oneOf": [{"const": "red"}, WORD]},
    {"$anchor": "here", "anyOf": [{"type": "null"}, _list({"$ref": "#here"}, 0, 2)]},
    {
        "type": "object",
        "properties": {"a": WORD},
        "nullable": True,
        "x-order": 3,
        "discriminator": {"propertyName": "a"},
        "required": ["a"],
        "additionalProperties": False,
    },
    {"properties": {"a": INTEGER}, "maxProperties": 1, "maxLength": 4, "maxItems": 1, "maximum": 3, "minimum": 0},
    {"type": "string", "contentEncoding": "base64", "maxLength": 8},
    {"type": "array", "prefixItems": [INTEGER], "minItems": 3, "maxItems": 4, "items": {"$ref": "#/prefixItems/0"}},
    {"type": "string", "minLength": 2.0, "maxLength": 3.0},
    {"type": "integer", "minimum": -(10**25), "maximum": 10**25},
    {"enum": [1.0, 2.50, -0.0, 1e2]},
    {"type": "integer", "enum": [1.0, 2.5, 3]},
    {"$dynamicRef": "#x", "type": "null"},
    {"$id": "https://example.com/a", "$ref": "https://example.com/a#/$defs/b", "$defs": {"b": WORD}},
)
