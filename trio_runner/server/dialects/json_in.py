"""JSON that clients send, for every dialect: bytes -> an object, and checks of single values. Pure. `fields.py` has the
fields of a whole body.

Rules of the wire, from Go's encoding/json, which accepts what stricter readers accept and more:
Rule 1: only the first JSON value of a body is read; what follows it is ignored.
Rule 2: names of fields match in any case, unknown ones are ignored, null leaves the default, the last duplicate wins.
Rule 3: an integer is written as one (1.0 and 1e3 are not), and true is not 1.

Rule 2 holds for the fields of requests and for objects that a check takes apart with `fold`. Other objects keep their
names and nulls: a JSON schema, for example, is data and not a request.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import numpy as np

from trio_runner.errors import InvalidImage, InvalidRequest
from trio_runner.image_source import MAX_IMAGE_BYTES
from trio_runner.parameters import integer_complaint, text_complaint
from trio_runner.request import MAX_TEXT_BYTES

MAX_VALUES = 1 << 16
"""Lists, objects and strings in one body. The parser is one call into C, in which no other thread may run: it makes
three million of each in a second. Numbers do not count: they are made one by one in Python, which lets others run."""

BASE64_PIECE = 1 << 20
"""Characters that are decoded in one call, a multiple of four, for the same reason."""

Check: TypeAlias = Callable[[str, Any], Any]
"""(name of the field, its JSON value) -> the value to use. Raises `InvalidRequest`, which names the field."""


class Object(dict[str, Any]):
    """A JSON object that remembers all its names and values in their order, duplicates included."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


# --- Bodies ----------------------------------------------------------------------------------------------------------


def decode(body: bytes) -> Any:
    """The JSON value that `body` starts with. Raises ValueError or RecursionError if there is none, and
    `InvalidRequest` if it has more than `MAX_VALUES` values."""
    if len(body) > MAX_VALUES and (n_values := _n_values(body)) > MAX_VALUES:
        raise InvalidRequest(
            f"the body has {n_values} lists, objects and strings, but at most {MAX_VALUES} are allowed"
        )
    text = body.decode("utf-8", errors="replace")
    space = _SPACE.match(text)
    value, _ = _DECODER.raw_decode(text, space.end() if space else 0)
    return value


def fold(value: Object) -> dict[str, Any]:
    """The names of an object in lower case and their values, without nulls; the last duplicate wins."""
    return {name.casefold(): value for name, value in value.pairs if value is not None}


def _n_values(body: bytes) -> int:
    """How many lists, objects and strings begin in `body`. Brackets in a string are text, however many."""
    data = np.frombuffer(body.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    quotes = data == ord('"')
    opening = (data == ord("[")) | (data == ord("{"))
    in_text = np.logical_xor.accumulate(quotes)
    return int(np.count_nonzero(opening & ~in_text) + np.count_nonzero(quotes & in_text))


def _parse_int(digits: str) -> int | float:
    """Longer ones are out of every range anyway, and Python's own limit on digits would hide which field it was."""
    return int(digits) if len(digits) <= 20 else float(digits)


def _parse_float(digits: str) -> float:
    """`float` itself would make a list of millions of numbers in one call; see `MAX_VALUES`."""
    return float(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(
    parse_int=_parse_int, parse_float=_parse_float, parse_constant=_refuse_constant, object_pairs_hook=Object
)
_SPACE = re.compile(r"[ \t\r\n]*")


# --- Checks ----------------------------------------------------------------------------------------------------------

_KINDS = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    list: "a list",
    Object: "an object",
    type(None): "null",
}


def wrong(name: str, wanted: str, value: object) -> NoReturn:
    """Raise `InvalidRequest`: the field should be `wanted` and is something else."""
    raise InvalidRequest(f"{name} must be {wanted}, not {kind_of(value)}", param=name)


def kind_of(value: object) -> str:
    """What kind of JSON value it is, in words."""
    return _KINDS[type(value)]


def check_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        wrong(name, "a string", value)
    complaint = text_complaint(name, value, MAX_TEXT_BYTES)
    if complaint is not None:
        raise InvalidRequest(complaint, param=name)
    return value


def check_integer(name: str, value: Any) -> int:
    if type(value) is not int:
        wrong(name, "an integer", value)
    if not -(2**63) <= value < 2**63:
        raise InvalidRequest(f"{name} must fit in 64 bits", param=name)
    return value


def check_number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        wrong(name, "a number", value)
    return float(value)


def check_boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        wrong(name, "true or false", value)
    return value


def check_object(name: str, value: Any) -> Object:
    if not isinstance(value, Object):
        wrong(name, "an object", value)
    return value


def integer_between(low: int, high: int) -> Check:
    """The check of an integer from `low` to `high`."""

    def check(name: str, value: Any) -> int:
        number = check_integer(name, value)
        complaint = integer_complaint(name, number, low, high)
        if complaint is not None:
            raise InvalidRequest(complaint, param=name)
        return number

    return check


def list_of(check: Check, what: str) -> Check:
    """The check of a list whose items pass `check`; `what` names them in the plural."""

    def check_list(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            wrong(name, f"a list of {what}", value)
        return tuple(check(name, item) for item in value)

    return check_list


def check_texts(name: str, value: Any, max_items: int) -> tuple[str, ...]:
    """A list of at most `max_items` texts. A complaint names the item."""
    if not isinstance(value, list):
        wrong(name, "a list of strings", value)
    if len(value) > max_items:
        raise InvalidRequest(f"{name} has {len(value)} texts, but at most {max_items} are allowed", param=name)
    return tuple(check_text(f"{name}[{index}]", item) for index, item in enumerate(value))


def check_tokens(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        wrong(name, "a list of integers", value)
    for token in value:  # of which there may be millions
        if type(token) is not int:
            wrong(name, "an integer", token)
        if not 0 <= token < 2**31:
            raise InvalidRequest(f"{name} must be between 0 and 2147483647", param=name)
    return tuple(value)


def base64_bytes(name: str, value: str) -> bytes:
    """The bytes that `value` encodes in base64, perhaps with line breaks."""
    value = value.replace("\r", "").replace("\n", "")
    try:
        pieces = [
            base64.b64decode(value[start : start + BASE64_PIECE], validate=True)
            for start in range(0, len(value), BASE64_PIECE)
        ]
    except ValueError:
        raise InvalidRequest(f"{name} must be base64", param=name) from None
    return b"".join(pieces)


def image_file(name: str, value: Any) -> bytes:
    """The bytes of an image file in base64. Raises `InvalidImage` if there are none, or too many."""
    if not isinstance(value, str):
        wrong(name, "a string", value)
    if not value:
        raise InvalidImage(f"{name} is empty", param=name)
    if len(value) > MAX_IMAGE_BYTES * 3 // 2:  # with line breaks
        raise InvalidImage(f"{name} has more than {MAX_IMAGE_BYTES} bytes", param=name)
    return base64_bytes(name, value)
