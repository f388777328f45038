"""Whether a JSON value obeys a schema, by a validator that has nothing to do with how the text was made.

It is the package jsonschema, with regular expressions as JavaScript means them, and formats as their RFCs do.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final

import jsonschema

_CHECKER: Final = jsonschema.FormatChecker(formats=())
_DURATION: Final = re.compile(r"P(\d+W|(?=.)(\d+Y)?(\d+M)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?)", re.ASCII)
_HOSTNAME: Final = re.compile(r"(?!.*-(\.|$))[A-Za-z0-9][A-Za-z0-9-]{0,62}(\.[A-Za-z0-9][A-Za-z0-9-]{0,62})*")
_ECMA: Final = {
    r"\d": "[0-9]",
    r"\D": "[^0-9]",
    r"\w": "[A-Za-z0-9_]",
    r"\W": "[^A-Za-z0-9_]",
    ".": r"[^\n\r\u2028\u2029]",
}


def check(schema: Any, text: str) -> None:
    """Raises ValueError or `jsonschema.ValidationError` if `text` is no value of the schema."""
    known = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    ecma = jsonschema.validators.extend(known, {"pattern": _pattern, "patternProperties": _pattern_properties})
    ecma(schema, format_checker=_CHECKER).validate(json.loads(text, parse_constant=_no_constant))


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _searches(pattern: str, text: str) -> bool:
    """Whether a pattern of JavaScript is found in a text; `.` and classes by letters are read as there."""
    in_class = False
    parts = []
    for part in re.findall(r"\\.|.", pattern, re.DOTALL):
        in_class = (in_class or part == "[") and part != "]"
        ecma = part if in_class and part == "." else _ECMA.get(part, part)
        parts.append(ecma[1:-1] if in_class and ecma != part and not ecma.startswith("[^") else ecma)
    return re.search("".join(parts), text) is not None


def _pattern(validator: Any, pattern: str, value: object, schema: object) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, str) and not _searches(pattern, value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: dict[str, Any], value: Any, schema: object) -> Iterator[Any]:
    for pattern, child in patterns.items() if isinstance(value, dict) else ():
        for name, item in value.items():
            if _searches(pattern, name):
                yield from validator.descend(item, child, path=name, schema_path=pattern)


def _of_text(name: str, check_text: Callable[[str], object]) -> None:
    _CHECKER.checks(name, raises=ValueError)(lambda value: not isinstance(value, str) or bool(check_text(value)))


def _date(text: str) -> bool:
    datetime.date.fromisoformat(text)
    return re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII) is not None


def _time(text: str) -> bool:
    match = re.fullmatch(r"(\d\d):(\d\d):(\d\d)(\.\d+)?([zZ]|[+-](\d\d):(\d\d))", text, re.ASCII)
    if match is None:
        return False
    datetime.time(int(match[1]), int(match[2]), int(match[3]))
    datetime.time(int(match[6] or 0), int(match[7] or 0))
    return True


_of_text("date", _date)
_of_text("time", _time)
_of_text("date-time", lambda text: _date(text[:10]) and text[10] in "tT" and _time(text[11:]))
_of_text("duration", _DURATION.fullmatch)
_of_text("hostname", _HOSTNAME.fullmatch)
_of_text("email", lambda text: re.fullmatch(r"[^@\s]+@[^@\s]+", text))
_of_text("uri", lambda text: re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s]*", text))
_of_text("uuid", lambda text: str(uuid.UUID(text)) == text.lower())
_of_text("ipv4", lambda text: str(ipaddress.IPv4Address(text)))
_of_text("ipv6", lambda text: str(ipaddress.IPv6Address(text)))
