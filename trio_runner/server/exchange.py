"""One request and its answer, between HTTP/1.1 and an ASGI application. The only file that uses Hypercorn.

Hypercorn's HTTPStream makes the ASGI scope and messages of a request, and checks the messages that the application
answers with: which may follow which, what a header may contain, that HEAD has no body, that no answer at all is a 500.

The rest of Hypercorn is not used. Its task that reads from the client also waits for the application, in three places,
and while it waits it does not notice that the client disconnects. Its HTTP/2 and its websockets can be crashed.

Hypercorn documents none of the names that are used here. tests/server/test_hypercorn.py lists them all.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import h11
import trio
from hypercorn.config import Config
from hypercorn.protocol.events import Body, EndBody, Event, Request, Response, StreamClosed
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from trio_runner.server.asgi import Application
from trio_runner.server.inbox import Inbox

log = logging.getLogger(__name__)

Address: TypeAlias = tuple[str, int | None]
"""The (host, port) of one end of a connection, or (path, None) of a Unix socket."""
SendEvent: TypeAlias = Callable[[h11.Event], Awaitable[None]]

_STREAM_ID = 1
"""The stream number in Hypercorn's events. HTTP/1.1 has no streams, so the number never changes."""


def _make_config() -> Config:
    config = Config()
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = log
    return config


_CONFIG = _make_config()
_CONTEXT = WorkerContext(None)


@dataclass(frozen=True, slots=True)
class Peers:
    """The two ends of a connection; None for one that has no name."""

    client: Address | None
    server: Address | None


class Exchange:
    """Runs `app` in `nursery` for one request. `send` is given the answer, and `finished` is called once: when the
    answer is complete, or when the application has ended without completing it. It is not called after `disconnect`.

    None of `begin`, `body`, `end_body` and `disconnect` waits, for the application or for the client.
    """

    def __init__(
        self,
        app: Application,
        nursery: trio.Nursery,
        peers: Peers,
        send: SendEvent,
        finished: Callable[[], Awaitable[None]],
    ) -> None:
        self._nursery = nursery
        self._send = send
        self._finished = finished
        self._inbox = Inbox()
        self._stream = HTTPStream(
            cast(Any, app),
            _CONFIG,
            _CONTEXT,
            cast(Any, self),
            False,
            cast(Any, peers.client),
            cast(Any, peers.server),
            self._answer,
            _STREAM_ID,
        )

    @property
    def n_unread(self) -> int:
        """How many bytes of the body the application has not read yet."""
        return self._inbox.n_bytes

    async def begin(self, request: h11.Request) -> None:
        """Start the application."""
        await self._stream.handle(
            Request(
                stream_id=_STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode("ascii"),
                method=request.method.decode("ascii"),
                raw_path=request.target,
                state=ConnectionState({}),
            )
        )

    async def body(self, data: bytes) -> None:
        await self._stream.handle(Body(stream_id=_STREAM_ID, data=data))

    async def end_body(self) -> None:
        await self._stream.handle(EndBody(stream_id=_STREAM_ID))

    async def disconnect(self) -> None:
        """Tell the application that the client has gone, or has had its answer."""
        await self._stream.handle(StreamClosed(stream_id=_STREAM_ID))

    async def spawn_app(
        self, app: Any, config: Config, scope: Any, send: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Any], Awaitable[None]]:
        """Called by HTTPStream, which takes this object for a task group of Hypercorn's."""
        self._nursery.start_soon(self._run, app, scope, send)
        return self._inbox.put

    async def _run(self, app: Application, scope: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        try:
            await app(scope, self._inbox.receive, send)
        except* Exception:
            log.exception("an application failed")
        await send(None)  # HTTPStream ends the answer, if the application has not

    async def _answer(self, event: Event) -> None:
        match event:
            case Response(headers=headers, status_code=status_code):
                headers = [*headers, *_CONFIG.response_headers("h11")]
                await self._send(h11.Response(headers=headers, status_code=status_code))
            case Body(data=data):
                await self._send(h11.Data(data=data))
            case EndBody():
                await self._send(h11.EndOfMessage())
            case StreamClosed():
                await self.disconnect()
                await self._finished()
