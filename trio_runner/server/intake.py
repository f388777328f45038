"""How many bytes all clients together may have sent: each body is bounded, but there are hundreds of connections."""

from __future__ import annotations

from typing import Any

from trio_runner.server.asgi import Application, Receive, Send, send_answer
from trio_runner.server.problems import Problem, Wording

MAX_BYTES = 256 << 20
"""Bytes of the bodies of all requests that are being read or answered. A prompt stays until its answer is complete."""


class Intake:
    """ASGI middleware that ends a request when there is no room for its body. The others do not notice."""

    def __init__(self, app: Application, word: Wording) -> None:
        self._app = app
        self._word = word
        self._n_bytes = 0

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        n_bytes = 0
        is_full = is_answered = False

        async def receive_if_there_is_room() -> dict[str, Any]:
            nonlocal n_bytes, is_full
            message = await receive()
            n_more = len(message.get("body", b""))
            is_full = self._n_bytes + n_more > MAX_BYTES
            if is_full:
                return {"type": "http.disconnect"}
            self._n_bytes += n_more
            n_bytes += n_more
            return message

        async def send_and_note(message: dict[str, Any]) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        try:
            await self._app(scope, receive_if_there_is_room, send_and_note)
        finally:
            self._n_bytes -= n_bytes
        if is_full and not is_answered:
            problem = Problem(503, "too many requests with large bodies", {"Retry-After": "1"})
            await send_answer(send, self._word(scope["path"], problem))
