"""The messages of a conversation in OpenAI's dialect. Pure.

What is wrong with them is found here, by the path of the field in the body; `trio_runner.core.conversation` checks what
is left once more, for callers in Python. Images in data URLs become bytes here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from trio_runner.errors import InvalidRequest, Unsupported
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import OBJECT, STRING, Schema, array, either
from trio_runner.server.dialects.json_in import Object, check_object, fold, wrong
from trio_runner.server.dialects.openai.requests import check_items, check_word

ROLES: Final = ("developer", "system", "user", "assistant", "tool", "function")
DETAILS: Final = ("auto", "low", "high", "original")
_DATA_URL: Final = re.compile(r"data:image/[^,]*;base64", re.IGNORECASE)
_RENAMED: Final = {"developer": "system", "function": "tool"}
"""Roles that chat templates know by another name."""

SCHEMA: Final[Schema] = array(
    {
        "type": "object",
        "properties": {
            "role": {**STRING, "enum": list(ROLES)},
            "content": either(STRING, array({**OBJECT, "properties": {"type": {**STRING}}, "required": ["type"]})),
        },
        "required": ["role"],
    },
    minItems=1,
)


def check_messages(name: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Messages as `Chat` takes them: with the roles that templates know, and images as bytes."""
    messages = check_items(name, value, "messages", _message)
    if not messages:
        raise InvalidRequest(f"{name} is empty", param=name)
    return messages


def _message(place: str, value: Any) -> dict[str, Any]:
    given = fold(check_object(place, value))
    if "role" not in given:
        raise InvalidRequest(f"{place}.role is missing", param=f"{place}.role")
    role = check_word(f"{place}.role", given.pop("role"), *ROLES)
    for field, check in _OTHERS.items():
        if field in given:
            given[field] = check(f"{place}.{field}", given[field])
    content = _content(f"{place}.content", given.pop("content", None), given.pop("refusal", None))
    if content is None and not (role == "assistant" and (given.get("tool_calls") or given.get("function_call"))):
        raise InvalidRequest(f"{place}.content is missing", param=f"{place}.content")
    return {"role": _RENAMED.get(role, role), "content": content, **given}


def _content(place: str, value: Any, refusal: str | None) -> str | list[dict[str, Any]] | None:
    """A text, or a list of texts and images. A refusal is what the assistant said instead."""
    if value is None:
        return refusal
    if isinstance(value, str):
        return json_in.check_text(place, value)
    if not isinstance(value, list):
        wrong(place, "a string or a list of parts", value)
    return list(check_items(place, value, "parts", _part))


def _part(place: str, value: Any) -> dict[str, Any]:
    given = fold(check_object(place, value))
    if "type" not in given:
        raise InvalidRequest(f"{place}.type is missing", param=f"{place}.type")
    kind = json_in.check_text(f"{place}.type", given["type"])
    if kind not in ("text", "refusal", "image_url"):
        message = f'{place}.type must be "text" or "image_url": this server takes no parts of type {kind[:40]!r}'
        raise Unsupported("parts", message, param=f"{place}.type")
    if kind not in given:
        raise InvalidRequest(f"{place}.{kind} is missing", param=f"{place}.{kind}")
    if kind == "image_url":
        return {"type": "image", "image": _image(f"{place}.image_url", given["image_url"])}
    return {"type": "text", "text": json_in.check_text(f"{place}.{kind}", given[kind])}


def _image(place: str, value: Any) -> bytes:
    """The file in a data URL. Some clients leave out the object around the URL."""
    if isinstance(value, Object):
        given = fold(value)
        if "detail" in given:  # how many rows an image has is settled by the projector
            check_word(f"{place}.detail", given["detail"], *DETAILS)
        place, value = f"{place}.url", given.get("url")
        if value is None:
            raise InvalidRequest(f"{place} is missing", param=place)
    if not isinstance(value, str):
        wrong(place, "a string", value)
    kind, _, data = value.partition(",")
    if not _DATA_URL.fullmatch(kind):
        message = f"{place} must be a data URL, data:image/...;base64,...: this server fetches nothing"
        raise InvalidRequest(message, param=place)
    return json_in.image_file(place, data)


def _tool_calls(place: str, value: Any) -> list[Object]:
    return list(check_items(place, value, "tool calls", _tool_call))


def _tool_call(place: str, value: Any) -> Object:
    call = check_object(place, value)
    if "function" in call:
        _function(f"{place}.function", call["function"])
    return call


def _function(place: str, value: Any) -> Object:
    called = check_object(place, value)
    if "name" not in called:
        raise InvalidRequest(f"{place}.name is missing", param=f"{place}.name")
    json_in.check_text(f"{place}.name", called["name"])
    if not isinstance(called.get("arguments"), (str, Object, type(None))):
        wrong(f"{place}.arguments", "a string", called["arguments"])
    return called


def _no_audio(place: str, value: Any) -> Any:
    raise Unsupported("audio", f"{place}: this server knows no audio", param=place)


_OTHERS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "name": json_in.check_text,
    "tool_call_id": json_in.check_text,
    "refusal": json_in.check_text,
    "reasoning_content": json_in.check_text,
    "tool_calls": _tool_calls,
    "function_call": _function,
    "audio": _no_audio,
}
"""Fields of a message that are checked here. The chat template gets all others as they are."""
