"""What a dialect is: one language in which clients ask for text and embeddings, such as that of Ollama's Go runner.

A dialect has a package of its own. Its modules for requests and responses are pure: they know bytes, requests and
events. Only its routes know an engine, by its interface, and Quart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quart import Response
from quart_trio import QuartTrio

from trio_runner.interface import EngineInterface
from trio_runner.server.body_threads import BodyThreads
from trio_runner.server.names import ANY_NAME, ModelNames
from trio_runner.server.problems import Answer, Problem


@dataclass(frozen=True, slots=True)
class RouteContext:
    """What the routes of every dialect work with."""

    engine: EngineInterface
    threads: BodyThreads
    adapter_dir: Path | None = None
    """Directory of the adapters that clients may load."""
    names: ModelNames = ANY_NAME
    """What clients may call the model."""


class Dialect(Protocol):
    """One language of HTTP requests and answers."""

    def speaks_at(self, path: str) -> bool:
        """Whether `path` belongs to this dialect, so that problems there are put in its words."""

    def word(self, problem: Problem) -> Answer:
        """The answer that tells a client of this dialect about `problem`."""

    def add_routes(self, app: QuartTrio, context: RouteContext) -> None:
        """Serve the paths of this dialect."""


def json_response(body: bytes, status: int = 200) -> Response:
    """A whole answer of JSON."""
    return Response(body, status=status, content_type="application/json")


def response(answer: Answer) -> Response:
    """`answer` in Quart's terms."""
    return Response(answer.body, status=answer.status, headers=answer.headers)
