"""The outermost layer of the application: lets requests in, and closes what they leave behind."""

from __future__ import annotations

from typing import Any

from trio_runner.server.access import Access
from trio_runner.server.asgi import Application, Receive, Send, send_answer
from trio_runner.server.ownership import owning
from trio_runner.server.problems import Answer, Wording

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "DELETE, GET, POST",
    "Access-Control-Allow-Headers": "authorization, content-type",
    "Access-Control-Max-Age": "600",
}


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
        refusal = self._access.refusal(scope["method"], scope["path"], headers)
        if refusal is not None:
            await send_answer(send, self._word(scope["path"], refusal))
            return
        origin = headers.get(b"origin")
        if origin is not None:
            send = _with_cors(send, origin)
            if self._access.is_preflight(scope["method"], headers):
                await send_answer(send, Answer(204, _PREFLIGHT, b""))
                return
        with owning(scope):
            await self._app(scope, receive, send)


def _with_cors(send: Send, origin: bytes) -> Send:
    """`send` that also tells the browser that pages of `origin` may read the answer."""

    async def send_with_cors(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            added = [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return send_with_cors
