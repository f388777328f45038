"""The outermost layer of the application: lets requests in, and closes what they leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trio_runner.server.access import Access, allowed_headers
from trio_runner.server.asgi import Application, Receive, Send, send_answer
from trio_runner.server.ownership import owning
from trio_runner.server.problems import Answer, Wording

_EXPOSED = b"retry-after, x-request-id, x-should-retry"
"""What scripts may read of an answer's headers, besides those that browsers show them anyway."""


class Gate:
    """ASGI middleware around everything: lets in the requests that `access` allows, and closes the generations that a
    request leaves behind."""

    def __init__(self, app: Application, access: Access, word: Wording) -> None:
        self._app = app
        self._access = access
        self._word = word

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and self._access.origin_allowed(origin):
            send = _with_cors(send, origin)  # scripts also want to read why they were refused
        server = scope.get("server")
        by_unix_socket = server is not None and server[1] is None
        refusal = self._access.refusal(scope["method"], scope["path"], headers, by_unix_socket=by_unix_socket)
        if refusal is not None:
            await send_answer(send, self._word(scope["path"], refusal))
        elif self._access.is_preflight(scope["method"], headers):
            await send_answer(send, Answer(204, _preflight(headers), b""))
        else:
            with owning(scope):
                await self._app(scope, receive, send)


def _preflight(headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """What a preflight with these headers is answered with."""
    answered = {"Access-Control-Allow-Methods": "DELETE, GET, HEAD, POST", "Access-Control-Max-Age": "600"}
    names = allowed_headers(headers.get(b"access-control-request-headers", b""))
    return answered | ({"Access-Control-Allow-Headers": names} if names else {})


def _with_cors(send: Send, origin: bytes) -> Send:
    """`send` that also tells the browser that pages of `origin` may read the answer."""
    added = [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]

    async def send_with_cors(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *added, (b"vary", b"origin")]}
        await send(message)

    return send_with_cors
