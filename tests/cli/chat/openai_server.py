"""A small HTTP server that speaks OpenAI's streams, and misbehaves on demand."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import h11
import trio

Send: TypeAlias = Callable[[bytes], Awaitable[None]]
"""Sends a part of the body."""
Script: TypeAlias = Callable[[dict[str, Any], Send], Awaitable[None]]
"""Writes the body of one answer to a request."""


@dataclass
class OpenAIServer:
    """Answers each request for a completion with the next of `scripts`. A number instead is the status of a refusal."""

    port: int = 0
    api_key: str | None = None
    models: tuple[str, ...] = ("first", "second")
    scripts: list[Script | int] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """The requests so far."""
    closed: trio.Event = field(default_factory=trio.Event)
    """A client has left in the middle of an answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, stream: trio.SocketStream) -> None:
        async with stream:
            connection = h11.Connection(h11.SERVER)
            while True:
                request, body = await _read(connection, stream)
                if request is None:
                    return
                await self._answer(connection, stream, request, body)
                connection.start_next_cycle()

    async def _answer(
        self, connection: h11.Connection, stream: trio.SocketStream, request: h11.Request, body: bytes
    ) -> None:
        headers = dict(request.headers.raw_items())
        headers = {name.lower(): value for name, value in headers.items()}
        path = request.target.decode()
        if self.api_key is not None and headers.get(b"authorization") != f"Bearer {self.api_key}".encode():
            await _send_json(connection, stream, 401, {"error": {"message": "wrong key"}})
        elif path == "/v1/models":
            models = [{"id": name, "object": "model"} for name in self.models]
            await _send_json(connection, stream, 200, {"object": "list", "data": models})
        elif path == "/v1/chat/completions":
            value = json.loads(body)
            self.bodies.append(value)
            script = self.scripts.pop(0)
            if isinstance(script, int):
                await _send_json(connection, stream, script, {"error": {"message": f"no model {value['model']}"}})
            else:
                await self._stream(connection, stream, partial(script, value))
        else:
            await _send_json(connection, stream, 404, {"error": {"message": f"no path {path}"}})

    async def _stream(
        self, connection: h11.Connection, stream: trio.SocketStream, write: Callable[[Send], Awaitable[None]]
    ) -> None:
        async def send(data: bytes) -> None:
            await _send(connection, stream, h11.Data(data=data))

        head = h11.Response(status_code=200, headers=[("Content-Type", "text/event-stream")])
        await _send(connection, stream, head)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    if not await stream.receive_some():
                        self.closed.set()
                        scope.cancel()

                nursery.start_soon(watch)
                await write(send)
                await _send(connection, stream, h11.EndOfMessage())
                nursery.cancel_scope.cancel()
        if scope.cancelled_caught:
            raise BreakOff


async def _read(connection: h11.Connection, stream: trio.SocketStream) -> tuple[h11.Request | None, bytes]:
    request, body = None, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            try:
                connection.receive_data(await stream.receive_some())
            except trio.BrokenResourceError:
                return None, b""
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return request, body
        else:
            return None, b""


async def _send(connection: h11.Connection, stream: trio.SocketStream, *events: Any) -> None:
    for event in events:
        if data := connection.send(event):
            await stream.send_all(data)


async def _send_json(connection: h11.Connection, stream: trio.SocketStream, status: int, value: object) -> None:
    data = json.dumps(value).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
    await _send(
        connection,
        stream,
        h11.Response(status_code=status, headers=headers),
        h11.Data(data=data),
        h11.EndOfMessage(),
    )


def chunk(reason: str | None = None, **delta: object) -> bytes:
    """An event of a stream."""
    value = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    return f"data: {json.dumps(value)}\n\n".encode()


def says(*texts: str, reason: str = "stop") -> Script:
    """An answer that is whole."""

    async def script(body: dict[str, Any], send: Send) -> None:
        await send(b": a comment\n\n")
        await send(chunk(role="assistant"))
        for text in texts:
            await send(chunk(content=text))
        await send(chunk(reason) + b"data: [DONE]\n\n")

    return script


def never_ends(*texts: str) -> Script:
    """An answer that stops coming."""

    async def script(body: dict[str, Any], send: Send) -> None:
        for text in texts:
            await send(chunk(content=text))
        await trio.sleep_forever()

    return script


def breaks_off(*texts: str) -> Script:
    """An answer whose connection breaks."""

    async def script(body: dict[str, Any], send: Send) -> None:
        for text in texts:
            await send(chunk(content=text))
        raise BreakOff

    return script


class BreakOff(Exception):
    """Close the connection now."""


def sends(data: bytes) -> Script:
    """A body as it is."""

    async def script(body: dict[str, Any], send: Send) -> None:
        await send(data)

    return script


@asynccontextmanager
async def openai_server(*scripts: Script | int, **options: Any) -> AsyncIterator[OpenAIServer]:
    """A server for the length of the block."""
    server = OpenAIServer(scripts=[*scripts], **options)

    async def handle(stream: trio.SocketStream) -> None:
        try:
            await server.handle(stream)
        except* (BreakOff, trio.BrokenResourceError):  # the second when the client has left
            pass

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        server.port = listener.socket.getsockname()[1]
        yield server
        nursery.cancel_scope.cancel()
