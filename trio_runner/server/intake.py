"""What all clients together may have sent us: each body is bounded, and there are some hundred connections."""

from __future__ import annotations

from typing import Any

from trio_runner.server.asgi import Application, Receive, Send, answer

MAX_BYTES = 256 << 20
"""Of the bodies of all requests that are being sent or answered, for a prompt is kept until its answer is complete."""


class Intake:
    """ASGI middleware that ends the request whose body there is no room for; the others do not notice."""

    def __init__(self, app: Application) -> None:
        self._app = app
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
            headers = {"Content-Type": "text/plain; charset=utf-8", "Retry-After": "1"}
            await answer(send, 503, headers, b"too many requests with large bodies\n")
