"""The few words of ASGI that middleware needs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from trio_runner.server.problems import Answer

Receive: TypeAlias = Callable[[], Awaitable[dict[str, Any]]]
Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
Application: TypeAlias = Callable[..., Awaitable[None]]


async def send_answer(send: Send, answer: Answer) -> None:
    """Send the whole of `answer`, with its length."""
    raw = [(name.lower().encode(), value.encode()) for name, value in answer.headers.items()]
    if answer.status != 204:
        raw.append((b"content-length", b"%d" % len(answer.body)))
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})
    await send({"type": "http.response.body", "body": answer.body, "more_body": False})
