"""JSON schemas that a text must obey: what callers give, as the JSON text that a request has."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Final, NoReturn, TypeAlias

from trio_runner.errors import InvalidRequest

JsonSchema: TypeAlias = str | Mapping[str, Any] | type[Any]
"""A JSON text, an object, or a class: a pydantic model, or any other that msgspec can describe, such as a Struct."""

MAX_SCHEMA_BYTES: Final = 128 * 1024
"""Bytes that the JSON text of a schema may have."""
MAX_SCHEMA_DEPTH: Final = 64
"""Objects and lists of a schema that may lie within each other."""
MAX_PATTERN_BYTES: Final = 2048
"""Bytes of one regular expression in a schema. llguidance looks at its limits between two steps only, and one step took
gigabytes with 120 kB of optional characters."""
MAX_MULTIPLE: Final = 10_000
"""The least common multiple of all `multipleOf` in a schema, without their decimal points. llguidance makes about as
many states, and `multipleOf: 9999991` took minutes and gigabytes."""

EXTENSIONS: Final = "x-guidance"
"""The key at the top of a schema with settings of llguidance's own."""
EXTENSION_SETTINGS: Final = ("whitespace_flexible", "coerce_one_of", "lenient")
"""Those that a caller may set, each true or false. Others could turn JSON into something else."""


def schema_text(value: JsonSchema) -> str:
    """`value` as the field `json_schema` of a request. Raises `InvalidRequest` for what describes no schema."""
    if isinstance(value, str):
        return value
    if value is None:
        _refuse("must not be None")
    if isinstance(value, Mapping):
        try:
            return json.dumps(value, allow_nan=False, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            _refuse(f"is no JSON: {error}")
    describe = getattr(value, "model_json_schema", None)  # of pydantic, which nobody has to install for us
    if callable(describe):
        return json.dumps(describe())
    import msgspec  # here, because it takes long and few callers have a class

    try:
        return json.dumps(msgspec.json.schema(value))
    except (TypeError, RuntimeError):
        _refuse(f"must be a JSON text, an object or a class that has a schema, not {type(value).__name__}")


def _plain(value: object) -> dict[Any, Any]:
    """A mapping that is no dict, as one."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def check_schema(text: str) -> None:
    """Raises `InvalidRequest` unless `text` is a JSON object or true that llguidance can compile in bounded time."""
    parse_schema(text)


def parse_schema(text: str) -> dict[str, Any]:
    """The object that `text` is; {} for true. Raises what `check_schema` raises."""
    try:
        schema = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        _refuse(f"is no JSON: {reason}")
    if schema is True:
        return {}
    if schema is False:
        _refuse("is false, which no value obeys")
    if not isinstance(schema, dict):
        _refuse("must be an object, true or false")
    _check_costs(schema)
    _check_settings(schema.get(EXTENSIONS, {}))
    return schema


def objects_of(schema: object) -> Iterator[dict[str, Any]]:
    """Every object in `schema`, whether it is a schema or not: a reference may point anywhere. Raises `InvalidRequest`
    if they are nested too deeply."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        nodes = [node for node in level if isinstance(node, (dict, list))]
        if not nodes:
            return
        yield from (node for node in nodes if isinstance(node, dict))
        level = [child for node in nodes for child in (node.values() if isinstance(node, dict) else node)]
    if any(isinstance(node, (dict, list)) for node in level):
        _refuse(f"is nested more than {MAX_SCHEMA_DEPTH} levels deep")


def _check_costs(schema: object) -> None:
    """Refuse what llguidance would spend seconds and gigabytes on."""
    multiple = 1
    for node in objects_of(schema):
        patterns = [node.get("pattern")]
        if isinstance(node.get("patternProperties"), dict):
            patterns += node["patternProperties"]
        if any(
            isinstance(pattern, str) and len(pattern.encode(errors="replace")) > MAX_PATTERN_BYTES
            for pattern in patterns
        ):
            _refuse(f"has a pattern of more than {MAX_PATTERN_BYTES} bytes")
        multiple = math.lcm(multiple, _digits(node.get("multipleOf")))
        if multiple > MAX_MULTIPLE:
            _refuse(f"has multipleOf whose least common multiple is more than {MAX_MULTIPLE}")


def _digits(value: object) -> int:
    """A number without its decimal point, sign and last zeros behind the point: 25 for 0.250. 1 for 0 and for what is
    no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value:
        return 1
    if isinstance(value, int):
        return abs(value)
    _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    whole: int = int("".join(map(str, digits))) * 10 ** max(exponent, 0)
    return whole


def _check_settings(settings: object) -> None:
    if not isinstance(settings, dict):
        _refuse(f"has {EXTENSIONS}, which must be an object")
    for name, value in settings.items():
        if name not in EXTENSION_SETTINGS:
            _refuse(f"has {EXTENSIONS} with {name[:40]!r}: only {', '.join(EXTENSION_SETTINGS)} may be set")
        if not isinstance(value, bool):
            _refuse(f"has {EXTENSIONS} with {name}, which must be true or false")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is too large a number")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse(what: str) -> NoReturn:
    raise InvalidRequest(f"json_schema {what}", param="json_schema")
