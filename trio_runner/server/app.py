"""The ASGI application: its settings, the dialects it speaks, and what errors look like."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from trio_runner.errors import RunnerError
from trio_runner.interface import EngineInterface
from trio_runner.server.access import Access
from trio_runner.server.body_threads import BodyThreads
from trio_runner.server.dialects import DIALECTS, Dialect
from trio_runner.server.dialects.dialect import ANY_METHOD, Operation, RouteContext, response
from trio_runner.server.gate import Gate
from trio_runner.server.intake import Intake
from trio_runner.server.names import ANY_NAME, ModelNames
from trio_runner.server.problems import Answer, Problem, Wording, problem
from trio_runner.server.site import Site
from trio_runner.version import __version__

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 << 20
"""Bytes of the body of a request, unless `serve` is told otherwise."""
MAX_BODY_BYTES_WITH_IMAGES = 64 << 20
"""The same for a model that takes images."""
BODY_TIMEOUT = 30.0
"""Seconds a client may take to send a body."""


def create_app(
    engine: EngineInterface,
    *,
    access: Access | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    adapter_dir: Path | None = None,
    names: ModelNames = ANY_NAME,
    model_path: Path | None = None,
    dialects: Sequence[Dialect] = DIALECTS,
) -> QuartTrio:
    """An application that serves `engine`, which may still be loading. It needs no lifespan and starts no task.

    Clients may load the adapters in `adapter_dir`, and call the model by any of `names`. `model_path` is its
    file. The last of `dialects` gets the paths that belong to none.
    """
    app = QuartTrio("trio_runner.server", static_folder=None)
    app.config.update(
        RESPONSE_TIMEOUT=None,  # Quart's default cuts every stream after a minute, without a word
        BODY_TIMEOUT=BODY_TIMEOUT,
        MAX_CONTENT_LENGTH=max_body_bytes,
    )

    def word(path: str, refusal: Problem) -> Answer:
        speaker = next((dialect for dialect in dialects if dialect.speaks_at(path)), dialects[-1])
        return speaker.word(refusal)

    context = RouteContext(engine, BodyThreads(), adapter_dir, names, model_path)
    access = access or Access()
    site = Site(version=__version__, needs_key=access.api_key is not None)
    site.served = [(dialect, dialect.operations(context)) for dialect in (*dialects, site)]
    for dialect, operations in site.served:
        for operation in operations:
            _add_route(app, dialect.name, operation)
    _handle_errors(app, word, max_body_bytes)
    app.asgi_app = Gate(Intake(app.asgi_app, word), access, word)  # type: ignore[method-assign,assignment]
    return app


def _add_route(app: QuartTrio, dialect: str, operation: Operation) -> None:
    endpoint = f"{dialect}.{operation.method} {operation.path}".replace(".", ":")
    if operation.method == ANY_METHOD:  # which add_url_rule cannot say
        rule = app.url_rule_class(operation.path, endpoint=endpoint)
        rule.provide_automatic_options = False
        app.url_map.add(rule)
        app.view_functions[endpoint] = operation.handler
    else:
        app.add_url_rule(operation.path, endpoint, operation.handler, methods=[operation.method])


def _handle_errors(app: QuartTrio, word: Wording, max_body_bytes: int) -> None:
    def respond(problem: Problem) -> Response:
        return response(word(request.path, problem))

    async def on_runner_error(error: RunnerError) -> Response:
        return respond(problem(error))

    async def on_http_error(error: HTTPException) -> Response:
        text = {
            404: "404 page not found",  # as Go's mux says it
            405: "Method Not Allowed",
            408: f"the body did not arrive within {BODY_TIMEOUT:g} seconds",
            413: f"the body is larger than {max_body_bytes} bytes",
        }.get(error.code or 500, error.name)
        headers = {"Allow": _allowed(error)} if isinstance(error, MethodNotAllowed) else {}
        return respond(Problem(error.code or 500, text, headers))

    async def on_any_error(error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return respond(problem(error))

    app.register_error_handler(RunnerError, on_runner_error)
    app.register_error_handler(HTTPException, on_http_error)
    app.register_error_handler(Exception, on_any_error)


def _allowed(error: MethodNotAllowed) -> str:
    """What else the path takes, HEAD and OPTIONS included."""
    return ", ".join(sorted(error.valid_methods or ()))
