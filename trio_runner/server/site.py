"""What the server says of itself, whatever the dialect: /, /openapi.json, /docs and /metrics."""

from __future__ import annotations

from functools import cached_property

import msgspec
from quart import Response, request

from trio_runner.server.dialects.dialect import Operation, RouteContext, json_response
from trio_runner.server.docs_page import docs_page
from trio_runner.server.front_page import front_page
from trio_runner.server.metrics import Metrics
from trio_runner.server.openapi import Document, Served, describe
from trio_runner.server.problems import Answer, Problem, plain_text


class Site:
    """The paths of the server itself. It is served like a dialect, but no problem of another path is its own."""

    name = "server"
    about = "What the server says of itself."
    error_type = None

    def __init__(self, *, version: str, needs_key: bool) -> None:
        self._version = version
        self._needs_key = needs_key
        self.served: Served = ()
        """What /openapi.json describes: the operations of all dialects and of the site itself."""

    def speaks_at(self, path: str) -> bool:
        return path in ("/", "/openapi.json", "/docs", "/metrics")

    def word(self, problem: Problem) -> Answer:
        return plain_text(problem)

    def operations(self, context: RouteContext) -> tuple[Operation, ...]:
        return (
            Operation(
                method="GET",
                path="/openapi.json",
                handler=self.openapi,
                summary="Describe every path of this server, for programs.",
            ),
            Operation(
                method="GET",
                path="/",
                handler=front_page,
                summary="Say that the server runs: in Ollama's words to programs, and with a page to browsers.",
                answer_type="text/plain",
            ),
            Operation(
                method="GET",
                path="/docs",
                handler=self.docs,
                summary="Describe every path of this server, for people.",
                answer_type="text/html",
            ),
            Metrics(context).operation("/metrics"),
        )

    @cached_property
    def document(self) -> Document:
        """What /openapi.json says."""
        return describe(self.served, version=self._version, needs_key=self._needs_key)

    async def openapi(self) -> Response:
        return json_response(msgspec.json.encode(self.document))

    async def docs(self) -> Response:
        html = docs_page(self.document, url=request.host_url.rstrip("/"))
        # The page has no script, and no other page may show it in a frame.
        guards = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
        return Response(html, content_type="text/html; charset=utf-8", headers=guards)
