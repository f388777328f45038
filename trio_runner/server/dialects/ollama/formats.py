"""The schema in the `format` of a request, as Ollama understands it. Pure.

JSON schema lets an object have any other properties beside those that it names. Ollama does not: it makes a grammar of
the schema that has the named properties only. Schemas that people write for Ollama rely on that, such as those that
pydantic makes of a class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

_ONE: Final = ("items", "additionalProperties", "contains", "not", "propertyNames")
"""Keywords whose value is a schema."""
_LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
"""Keywords whose value is a list of schemas."""
_MAPS: Final = ("properties", "$defs", "definitions")
"""Keywords whose value has schemas by name."""
_OPEN: Final = (
    *("additionalProperties", "patternProperties", "unevaluatedProperties"),
    *("if", "dependentSchemas", "dependencies"),
)
"""Keywords that say more about the properties of an object."""


def closed(schema: Any) -> Any:
    """A copy of `schema` in which objects have no other properties than those that it names, unless it says so.

    A schema that describes one object in several places stays as it is: closed, the places would exclude each other.
    """
    describes_twice = any(
        len(one.get("allOf", ())) > 1 or ("properties" in one and {"$ref", *_LISTS[:3]} & one.keys())
        for one in _schemas(schema)
    )
    return schema if describes_twice else _closed(schema)


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """`schema` and all schemas in it that are objects."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    for name, value in schema.items():
        if name in _ONE:
            yield from _schemas(value)
        elif name in _LISTS and isinstance(value, list):
            for one in value:
                yield from _schemas(one)
        elif name in _MAPS and isinstance(value, Mapping):
            for one in value.values():
                yield from _schemas(one)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    copy = dict(schema)
    for name, value in schema.items():
        if name in _ONE:
            copy[name] = _closed(value)
        elif name in _LISTS and isinstance(value, list):
            copy[name] = [_closed(one) for one in value]
        elif name in _MAPS and isinstance(value, Mapping):
            copy[name] = {key: _closed(one) for key, one in value.items()}
    if isinstance(schema.get("properties"), Mapping) and not schema.keys() & set(_OPEN):
        copy["additionalProperties"] = False
    return copy
