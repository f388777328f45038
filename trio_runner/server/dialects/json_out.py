"""JSON that the server sends, for every dialect. Pure.

Bytes matter: clients of the runner's dialect were written against Go's encoding/json, which escapes <, >, &, U+2028 and
U+2029 and writes a float32 in as few digits as name it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from trio_runner.errors import RunnerError
from trio_runner.events import Embedded

PIECE = 1 << 16
"""Characters or tokens of a long answer that are written in one call; between two of them other threads may run."""


def line(fields: object) -> bytes:
    """`fields` as one compact line."""
    return unbroken(msgspec.json.encode(fields)) + b"\n"


def unbroken(encoded: bytes) -> bytes:
    """JSON with the characters escaped that some readers of streams take for the end of a line: U+0085, U+2028 and
    U+2029. httpx is one of these readers. They occur in strings only."""
    if encoded.isascii():
        return encoded
    encoded = encoded.replace(b"\xe2\x80\xa8", rb"\u2028").replace(b"\xe2\x80\xa9", rb"\u2029")
    return encoded.replace(b"\xc2\x85", rb"\u0085")


def go_line(fields: object) -> bytes:
    """`fields` as one compact line, with the characters escaped that Go escapes."""
    return go_escaped(line(fields))


def go_escaped(encoded: bytes) -> bytes:
    """JSON with the characters escaped that Go escapes. They occur in strings only."""
    # Five passes, but each at the speed of memchr, while a regular expression calls back for every match.
    encoded = encoded.replace(b"<", rb"\u003c").replace(b">", rb"\u003e").replace(b"&", rb"\u0026")
    return encoded.replace(b"\xe2\x80\xa8", rb"\u2028").replace(b"\xe2\x80\xa9", rb"\u2029")


def go_string(text: str) -> bytes:
    """`text` as a JSON string, as Go writes it."""
    try:
        return go_escaped(msgspec.json.encode(text))
    except UnicodeEncodeError:
        return go_escaped(msgspec.json.encode(whole_characters(text)))


def whole_characters(text: str) -> str:
    """`text` with a question mark for each half of a surrogate pair, which is no character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def float32_text(value: Any) -> str:
    """A number with the digits of a float32, and without a fraction if it has none."""
    return str(np.float32(value)).removesuffix(".0")


def float32(value: Any) -> msgspec.Raw:
    """The same, as a part of a value to encode."""
    return msgspec.Raw(float32_text(value).encode())


def finite_vector(embedded: Embedded) -> NDArray[np.float32]:
    """The embedding as an array. Raises `RunnerError` if a value is not finite."""
    vector = np.asarray(embedded.vector, dtype=np.float32)
    if not np.isfinite(vector).all():
        raise RunnerError("the embedding contains a value that is not finite")
    return vector


def float32_list(values: NDArray[np.float32]) -> msgspec.Raw:
    """A list of numbers, all of them finite, each in as few digits as name it among the float32."""
    return msgspec.Raw(f"[{','.join(map(str, values))}]".encode())  # str of a float32 is its shortest form


def long_list(values: Sequence[int]) -> msgspec.Raw:
    """A list of integers, however many, in several calls."""
    pieces = (msgspec.json.encode(values[i : i + PIECE])[1:-1] for i in range(0, len(values), PIECE))
    return msgspec.Raw(b"[%b]" % b",".join(pieces))


def long_go_string(text: str) -> msgspec.Raw:
    """A string as Go writes it, however long, in several calls."""
    pieces = (go_string(text[i : i + PIECE])[1:-1] for i in range(0, len(text), PIECE))
    return msgspec.Raw(b'"%b"' % b"".join(pieces))
