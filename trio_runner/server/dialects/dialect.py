"""What a dialect is: one language in which clients ask for text and embeddings, such as that of Ollama's Go runner.

A dialect has a package of its own. Its modules for requests and responses are pure: they know bytes, requests and
events. Only its routes know an engine, by its interface, and Quart.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from quart import Response

from trio_runner.interface import EngineInterface
from trio_runner.server.body_threads import BodyThreads
from trio_runner.server.dialects.fields import Body
from trio_runner.server.names import ANY_NAME, ModelNames
from trio_runner.server.problems import Answer, Problem

Handler: TypeAlias = Callable[..., Awaitable[Response]]
"""Serves one path. It is given the variable parts of the path by name. Errors that it does not catch are worded by the
application, in the words of the dialect."""

ANY_METHOD: Final = "ANY"


@dataclass(frozen=True, slots=True)
class RouteContext:
    """What the routes of every dialect work with."""

    engine: EngineInterface
    threads: BodyThreads
    adapter_dir: Path | None = None
    """Directory of the adapters that clients may load."""
    names: ModelNames = ANY_NAME
    """What clients may call the model."""
    model_path: Path | None = None
    """File of the model, if it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One path and method: who serves it, and what /openapi.json says of it."""

    method: str
    """Such as "POST", or `ANY_METHOD`."""
    path: str
    """With variable parts as Quart writes them: "/adapters/<name>"."""
    handler: Handler
    summary: str
    """What it does, in one sentence."""
    body: Body | None = None
    """None for a request without a body."""
    answer: Any = None
    """The msgspec type of the whole answer with status 200. None if no type describes it."""
    answer_type: str = "application/json"
    """The content type of the whole answer."""
    stream: Any = None
    """The msgspec type of each part of an answer that is a stream; None if it never is one."""
    stream_type: str = "text/event-stream"
    """The content type of the stream."""
    refusals: tuple[int, ...] = ()
    """Further statuses, besides those that every operation may answer with; see openapi.py."""


class Dialect(Protocol):
    """One language of HTTP requests and answers."""

    name: str
    """In one word."""
    about: str
    """What it is, in one sentence."""
    error_type: Any
    """The msgspec type of the JSON that `word` writes; None if that is plain text."""

    def speaks_at(self, path: str) -> bool:
        """Whether `path` belongs to this dialect, so that problems there are put in its words."""

    def word(self, problem: Problem) -> Answer:
        """The answer that tells a client of this dialect about `problem`."""

    def operations(self, context: RouteContext) -> Sequence[Operation]:
        """What it serves."""


def json_response(body: bytes, status: int = 200) -> Response:
    """A whole answer of JSON."""
    return Response(body, status=status, content_type="application/json")


def response(answer: Answer) -> Response:
    """`answer` in Quart's terms."""
    return Response(answer.body, status=answer.status, headers=answer.headers)
