"""JSON schemas as llguidance gets them.

llguidance promises that a text is a value of the schema. In a few places it cannot keep that, or does not survive the
attempt. Here such a schema is written in another way, never a wider one, or refused.
"""

from __future__ import annotations

import json
import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, Final, NoReturn, TypeAlias, TypeGuard

from trio_runner.core.meeting import Meeting
from trio_runner.core.pattern import rust_pattern
from trio_runner.errors import InvalidGrammar
from trio_runner.json_schema import EXTENSIONS, objects_of, parse_schema

Node: TypeAlias = dict[str, Any]

WHITESPACE: Final = r"\x20|\r?\n[\x20\t]{0,20}"
"""White space between the tokens of JSON: a space, or a new line that is indented. Without a bound, some models write
white space until something stops them."""
MAX_NUMBER: Final = 2**53
"""Integers up to here are exact as floats, which is how llguidance reads numbers. Beyond them, it may even recurse
without end."""
MAX_OPTIONAL: Final = 490
"""Optional properties of one object. With 500, llguidance itself finds that the grammar has too many branches: but only
when the object begins, after seconds if there are thousands."""
MAX_NAME_PATTERNS: Final = 80
"""Names in `patternProperties`. llguidance compares each with each: 300 took nine seconds."""
MAX_MEETING: Final = 16
"""Patterns that may hold for one text; see `core.meeting`."""
LEAST_STEP: Final = 1e-9
RELATIVE_STEP: Final = 1e-14
"""Stand for the distance from a number to the next one, from 0 and from any other."""
EXACT_DIGITS: Final = 15
"""Digits of a number that llguidance reads exactly."""

_MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value has schemas by name."""
_DATA: Final = frozenset({"const", "enum", "default", "examples", "example"})
"""Keywords whose value is no schema."""

_YEAR: Final = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR: Final = (
    "(?:(?:[0-9][1-9]|[1-9]0)(?:0[48]|[2468][048]|[13579][26])|00(?:0[48]|[2468][048]|[13579][26])"
    "|(?:0[48]|[2468][048]|[13579][26])00)"
)
_DATE: Final = f"(?:{_YEAR}-(?:0[13-9]|1[0-2]|02-(?:[01][0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
_TIME: Final = "[0-9]{2}:[0-9]{2}:[0-5]"
FORMATS: Final = {"date": f"^{_DATE}", "time": f"^{_TIME}", "date-time": f"^{_DATE}[0-9-]*[tT]{_TIME}"}
"""What a format means besides what llguidance checks: the 29th of February only in leap years, no year 0, and no
second 60, which most programs refuse to read."""


def guided_schema(text: str) -> str:
    """The schema that llguidance gets for the schema `text`.

    Raises `InvalidGrammar`, which names the keyword, for a schema that cannot be honoured, and `InvalidRequest` for a
    text that is no schema.
    """
    schema = parse_schema(text)
    settings = schema.get(EXTENSIONS, {})
    if "whitespace_flexible" not in settings:
        settings = {**settings, "whitespace_pattern": WHITESPACE}
    for node in objects_of(schema):
        _check_numbers(node)
        _check_properties(node)
    _check_factors(schema)
    _check_patterns(schema)
    return json.dumps({**_schema(schema), EXTENSIONS: settings}, allow_nan=False)


# ---- what is refused -------------------------------------------------------------------------------------------------


def _check_numbers(node: Node) -> None:
    for name in ("const", "enum"):
        pending = [node.get(name)]
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                pending += value.values()
            elif isinstance(value, list):
                pending += value
            elif _is_number(value) and abs(value) > MAX_NUMBER:
                _refuse(f"{name} has a number beyond 2^53")
            elif isinstance(value, float) and _n_digits(value) > EXACT_DIGITS:
                _refuse(f"{name} has a number with more than {EXACT_DIGITS} digits")


def _check_properties(node: Node) -> None:
    properties, required = node.get("properties"), node.get("required")
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    if isinstance(properties, dict) and len(properties.keys() - names) > MAX_OPTIONAL:
        _refuse(f"properties has more than {MAX_OPTIONAL} names that are not required")
    # Names besides those of `properties` and `required` may come twice, and would be counted twice.
    if _is_number(least := node.get("minProperties")) and least > len(names) + 1:
        _refuse("minProperties is more than the number of required properties and one other")


def _check_factors(schema: Node) -> None:
    """llguidance multiplies the factors of one number as 32-bit integers. Whether two of them meet is not known before
    references are resolved."""
    factors = {Decimal(repr(node["multipleOf"])) for node in objects_of(schema) if _is_number(node.get("multipleOf"))}
    if len(factors) < 2:
        return
    scale = max(max(-int(factor.normalize().as_tuple().exponent), 0) for factor in factors)
    scaled = [abs(int(factor.scaleb(scale))) for factor in factors]
    if math.lcm(*scaled) * max(scaled) >= 2**32:
        _refuse("multipleOf has values that have no small common multiple")


def _check_patterns(schema: Node) -> None:
    n_patterns = n_names = 0
    for node in objects_of(schema):
        n_patterns += ("pattern" in node) + ("format" in node)
        if isinstance(node.get("patternProperties"), dict):
            n_names += len(node["patternProperties"])
    if n_names > MAX_NAME_PATTERNS:
        _refuse(f"patternProperties has more than {MAX_NAME_PATTERNS} names in all")
    try:
        if Meeting(schema, n_patterns).most() > MAX_MEETING:
            _refuse(f"pattern has more than {MAX_MEETING} values that may have to hold for one text")
    except RecursionError:
        _refuse("$ref: references are nested too deeply")


# ---- what is written in another way ----------------------------------------------------------------------------------


def _schema(value: Any) -> Any:
    """The schema `value`, with everything in it that is a schema, as llguidance gets it."""
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    node = {}
    for name, child in value.items():
        if name in _DATA:
            node[name] = child
        elif name in _MAPS and isinstance(child, dict):
            node[name] = {_key(name, key): _schema(item) for key, item in child.items()}
        else:
            node[name] = _schema(child)
    _rewrite_bounds(node)
    if isinstance(node.get("pattern"), str):
        node["pattern"] = _pattern("pattern", node["pattern"])
    extra = FORMATS.get(node["format"]) if isinstance(node.get("format"), str) else None
    if extra is not None and "pattern" not in node:
        node["pattern"] = extra
    elif extra is not None:
        others = node.get("allOf", [])
        node["allOf"] = [*(others if isinstance(others, list) else []), {"pattern": extra}]
    return node


def _key(name: str, key: str) -> str:
    return _pattern(name, key) if name == "patternProperties" else key


def _pattern(name: str, pattern: str) -> str:
    try:
        return rust_pattern(pattern)
    except ValueError as error:
        _refuse(f"{name}: {error}")


def _rewrite_bounds(node: Node) -> None:
    """Bounds that llguidance does not read exactly become narrower, or are refused. Exclusive bounds that are integers
    become inclusive ones: llguidance allows 0 where `exclusiveMinimum` is 0 and `maximum` below 1."""
    for inclusive, exclusive, inward in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        if node.get(exclusive) is True and _is_number(node.get(inclusive)):  # as in draft 4
            node[exclusive] = node.pop(inclusive)
        for name in (inclusive, exclusive):
            if _is_number(node.get(name)):
                node[name] = _exact(name, node[name], inward)
        bound = node.get(exclusive)
        if _is_number(bound) and bound == int(bound):
            del node[exclusive]
            step = 1 if node.get("type") == "integer" else max(LEAST_STEP, abs(bound) * RELATIVE_STEP)
            bound = _exact(exclusive, bound + inward * step, inward)
            other = node.get(inclusive)
            tightest = max if inward > 0 else min
            node[inclusive] = tightest(bound, other) if _is_number(other) else bound


def _exact(name: str, bound: float, inward: int) -> float:
    """The bound, or the nearest narrower one that is an exact number for llguidance."""
    if bound * inward > MAX_NUMBER:
        _refuse(f"{name} is beyond 2^53")
    if bound * inward < -MAX_NUMBER:
        return -MAX_NUMBER * inward
    if isinstance(bound, int) or _n_digits(bound) <= EXACT_DIGITS:
        return bound
    digits = Decimal(repr(bound))
    rounding = ROUND_CEILING if inward > 0 else ROUND_FLOOR
    return float(digits.quantize(Decimal(1).scaleb(digits.adjusted() - EXACT_DIGITS + 1), rounding))


def _n_digits(value: float) -> int:
    return len(Decimal(repr(value)).normalize().as_tuple().digits)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refuse(what: str) -> NoReturn:
    raise InvalidGrammar(f"json_schema cannot be honoured: {what}", param="json_schema")
