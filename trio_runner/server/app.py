"""The ASGI application: settings, guards, ownership, and what errors look like."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quart import Response
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from trio_runner.errors import RunnerError
from trio_runner.server.access import Access
from trio_runner.server.asgi import Application, Receive, Send, answer
from trio_runner.server.intake import Intake
from trio_runner.server.problems import Problem, problem
from trio_runner.server.routes import OWNED, add_routes, problem_response

if TYPE_CHECKING:
    from trio_runner.engine.engine import Engine
    from trio_runner.engine.generation import Generation

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 << 20
MAX_BODY_BYTES_WITH_IMAGES = 64 << 20
BODY_TIMEOUT = 30.0
"""Seconds a client may take to send a body."""


def create_app(
    engine: Engine,
    *,
    access: Access | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    adapter_dir: Path | None = None,
) -> QuartTrio:
    """An application that serves `engine`, which may still be loading. It needs no lifespan and starts no task.
    Clients may load the adapters in `adapter_dir`."""
    app = QuartTrio("trio_runner.server", static_folder=None)
    app.config.update(
        RESPONSE_TIMEOUT=None,  # Quart's default cuts every stream after a minute, without a word
        BODY_TIMEOUT=BODY_TIMEOUT,
        MAX_CONTENT_LENGTH=max_body_bytes,
    )
    add_routes(app, engine, adapter_dir)

    async def on_runner_error(error: RunnerError) -> Response:
        return problem_response(problem(error))

    async def on_http_error(error: HTTPException) -> Response:
        text = {
            404: "404 page not found",  # as Go's mux says it
            405: "Method Not Allowed",
            408: f"the body did not arrive within {BODY_TIMEOUT:g} seconds",
            413: f"the body is larger than {max_body_bytes} bytes",
        }.get(error.code or 500, error.name)
        headers = {"Allow": _allowed(error)} if isinstance(error, MethodNotAllowed) else {}
        return problem_response(Problem(error.code or 500, text, headers))

    async def on_any_error(error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return problem_response(problem(error))

    app.register_error_handler(RunnerError, on_runner_error)
    app.register_error_handler(HTTPException, on_http_error)
    app.register_error_handler(Exception, on_any_error)
    app.asgi_app = Gate(Intake(app.asgi_app), access or Access())  # type: ignore[method-assign,assignment]
    return app


def _allowed(error: MethodNotAllowed) -> str:
    return ", ".join(sorted(set(error.valid_methods or ()) & {"GET", "POST", "DELETE"}))


class Gate:
    """ASGI middleware around everything: lets in whom `access` allows, and closes what a request leaves behind.

    Closing here and not in the handler or the body: a body that was never iterated never runs its own clean-up, and a
    handler is over before its body starts.
    """

    def __init__(self, app: Application, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        refusal = self._access.refusal(scope["method"], scope["path"], headers)
        if refusal is not None:
            return await answer(send, refusal.status, refusal.all_headers, refusal.body)
        origin = headers.get(b"origin")
        if origin is not None:
            send = _with_cors(send, origin)
            if self._access.is_preflight(scope["method"], headers):
                return await answer(send, 204, _PREFLIGHT, b"")
        owned: list[Generation] = []
        scope[OWNED] = owned
        try:
            await self._app(scope, receive, send)
        finally:
            for generation in owned:
                generation.close()


_PREFLIGHT = {
    "Access-Control-Allow-Methods": "DELETE, GET, POST",
    "Access-Control-Allow-Headers": "authorization, content-type",
    "Access-Control-Max-Age": "600",
}


def _with_cors(send: Send, origin: bytes) -> Send:
    """`send` that also tells the browser that pages of `origin` may read the answer."""

    async def send_with_cors(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            added = [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return send_with_cors
