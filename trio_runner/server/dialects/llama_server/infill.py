"""POST /infill of llama-server's dialect: bytes of a body -> request values. Pure.

Editors send it while people type, and close the connection when they type on.
"""

from __future__ import annotations

import re
from typing import Any, Final

from trio_runner.errors import InvalidRequest
from trio_runner.request import MAX_EXTRA_FILES, Infill
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import STRING, Body, Fields, array, field
from trio_runner.server.dialects.json_in import Object, fold, wrong
from trio_runner.server.dialects.llama_server.completion_fields import COMPLETION_FIELDS
from trio_runner.server.dialects.llama_server.requests import Completion, completion_of

NAMELESS: Final = "tmp"
"""The name of a file that has none, as in llama-server."""


def _file(name: str, value: Any) -> tuple[str, str]:
    if not isinstance(value, Object):
        wrong(name, "an object", value)
    given = fold(value)
    if "text" not in given:
        raise InvalidRequest(f"{name}.text is missing", param=f"{name}.text")
    return (
        json_in.check_text(f"{name}.filename", given.get("filename", NAMELESS)),
        json_in.check_text(f"{name}.text", given["text"]),
    )


def _files(name: str, value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        wrong(name, "a list of objects", value)
    if len(value) > MAX_EXTRA_FILES:
        raise InvalidRequest(f"{name} has {len(value)} files, but at most {MAX_EXTRA_FILES} are allowed", param=name)
    return tuple(_file(f"{name}[{index}]", item) for index, item in enumerate(value))


def _wire_names(text: str) -> str:
    """`text` with the names of `Infill`'s fields as they are in the body."""
    return re.sub(r"\b(prefix|suffix|extra)\b", r"input_\1", text)


GAP_FIELDS: Final[Fields] = {
    "input_prefix": field(STRING, "The text before the gap.", required=True),
    "input_suffix": field(STRING, "The text behind the gap.", required=True),
    "input_extra": field(
        array(
            {"type": "object", "properties": {"text": STRING, "filename": STRING}, "required": ["text"]},
            maxItems=MAX_EXTRA_FILES,
        ),
        'Other files of the project, as `{"filename": "...", "text": "..."}`.',
        check=_files,
        default_text="none",
    ),
    "prompt": field(STRING, "What the filling begins with, such as the line up to the cursor.", default_text="nothing"),
}
INFILL: Final = Body(
    {**GAP_FIELDS, **COMPLETION_FIELDS},
    {"input_prefix": "def add(a, b):\n    return ", "input_suffix": "\n", "n_predict": 8},
)


def infill(body: bytes) -> Completion:
    """The request in the body of POST /infill. A prompt that is too long is shortened, as in llama-server: what is far
    from the gap goes first. Raises `RequestError`, which names the field at fault."""
    given = INFILL.read(body)
    try:
        gap = Infill(
            prefix=given["input_prefix"],
            suffix=given["input_suffix"],
            prompt=given.get("prompt", ""),
            extra=given.get("input_extra", ()),
        )
    except InvalidRequest as error:
        raise InvalidRequest(_wire_names(str(error)), param=_wire_names(error.param or "")) from None
    return completion_of(given, (gap,), truncate=True)
