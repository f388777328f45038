"""OpenAI's chat completions as a client speaks them: bodies of requests, and what the events of a stream mean.

The fields are those of the API reference, `POST /chat/completions` and `GET /models`, and `reasoning_content`, which
servers of open models add.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from trio_runner.cli.chat.conversation import Message
from trio_runner.cli.chat.model import AnswerEvent, ChatError, ConversationTooLong, Ended, Said, Thought

_MAX_SHOWN: Final = 500
"""Characters of a server's message that are shown."""
_NOTICES: Final[Mapping[str, str]] = {
    "length": "The answer was cut: it reached --max-tokens, or the context is full.",
    "content_filter": "The server withheld the rest of the answer (content_filter).",
    "tool_calls": "The model called a tool, which this program does not have.",
}


def base_url(url: str) -> str:
    """The URL that paths such as `/chat/completions` follow, with `/v1` if `url` names no version.

    Raises ValueError, whose message is for the user.
    """
    if "://" not in url:
        url = f"http://{url}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no URL of a server")
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r} must end with a path")
    _ = parts.port  # raises ValueError for a port out of range
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    if not re.search(r"/v\d+[a-z0-9]*(/|$)", path):
        path += "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def chat_body(model: str, messages: Sequence[Message], options: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a request for a stream. `options` are further fields."""
    return {"model": model, "messages": list(messages), "stream": True, **options}


def first_model(body: bytes) -> str:
    """The id of the first model that a server lists. Raises `ChatError`."""
    value = _json(body)
    models = value.get("data") if isinstance(value, dict) else None
    if not isinstance(models, list):
        raise ChatError("the server does not list its models: name one with --model")
    for model in models:
        if isinstance(model, dict) and isinstance(model.get("id"), str):
            return whole_characters(model["id"])
    raise ChatError("the server has no model")


def refusal(status: int, body: bytes, *, has_key: bool) -> ChatError:
    """The error that a status other than 200 means. `body` is what came with it."""
    message = _message(_json(body)) or " ".join(body.decode(errors="replace").split())
    if message.startswith("<"):  # a page of some proxy
        message = ""
    detail = f": {message[:_MAX_SHOWN]}" if message else ""
    if status == 401 and not has_key:
        return ChatError(f"the server wants an API key (401){detail}. Give --api-key-file, or set OPENAI_API_KEY")
    if status == 401:
        return ChatError(f"the server refuses the API key (401){detail}")
    if _is_too_long(_json(body)):
        return ConversationTooLong(f"the server answered {status}{detail}")
    return ChatError(f"the server answered {status}{detail}")


class AnswerReader:
    """Makes events of the data of a stream's events."""

    def __init__(self) -> None:
        self._end: Ended | None = None

    def push(self, data: str) -> list[AnswerEvent]:
        """The events in one chunk. Raises `ChatError` for an error that the server reports, and for no chunk."""
        if data.strip() == "[DONE]":
            self._end = self._end or Ended()
            return []
        return self._chunk(_json(data.encode()), data, "delta")

    def push_whole(self, body: bytes) -> list[AnswerEvent]:
        """The events of an answer that did not come as a stream. Raises `ChatError`."""
        return self._chunk(_json(body), body.decode(errors="replace"), "message")

    def flush(self) -> list[AnswerEvent]:
        """The last event. Raises `ChatError` if the stream ended before the answer did."""
        if self._end is None:
            raise ChatError("the connection ended before the answer did")
        return [self._end]

    def _chunk(self, value: Any, data: str, field: str) -> list[AnswerEvent]:
        if message := _message(value):
            raise ChatError(f"the server reports an error: {message[:_MAX_SHOWN]}")
        choices = value.get("choices") if isinstance(value, dict) else None
        if not isinstance(choices, list):
            raise ChatError(f"the server sent what is no part of an answer: {data[:80]}")
        events: list[AnswerEvent] = []
        for choice in choices[:1]:  # only one was asked for
            choice = choice if isinstance(choice, dict) else {}
            part = choice.get(field)
            part = part if isinstance(part, dict) else {}
            for name in ("reasoning_content", "reasoning"):
                if text := _text(part.get(name)):
                    events.append(Thought(text))
                    break
            if text := _text(part.get("content")) or _text(part.get("refusal")):
                events.append(Said(text))
            reason = choice.get("finish_reason")
            if isinstance(reason, str):
                self._end = Ended(_NOTICES.get(reason, ""))
        return events


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _text(value: object) -> str:
    return whole_characters(value) if isinstance(value, str) else ""


def whole_characters(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON may have and UTF-8 may not."""
    return text.encode(errors="replace").decode()


def _is_too_long(value: object) -> bool:
    """Whether an error says that the messages do not fit into the context."""
    error = value.get("error") if isinstance(value, dict) else None
    # The second is llama-server's.
    words = ("context_length_exceeded", "exceed_context_size_error")
    return isinstance(error, dict) and (error.get("code") in words or error.get("type") in words)


def _message(value: object) -> str:
    """The message of an error in one of the shapes that servers use; "" if there is no error."""
    error = value.get("error") if isinstance(value, dict) else None
    if not error:
        detail = value.get("detail") if isinstance(value, dict) else None  # FastAPI's
        return whole_characters(detail) if isinstance(detail, str) else ""
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        error = error["message"]
    return " ".join(_text(error if isinstance(error, str) else json.dumps(error)).split())
