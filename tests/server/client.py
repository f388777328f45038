"""A client that sends exactly the bytes it is given, and a server for it."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, cast

import trio

from trio_runner.interface import EngineInterface
from trio_runner.server import serve

DEADLINE = 10.0
"""Seconds any one test may take before it has failed."""


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that nothing announces. The deadline of `serving` bounds it."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.001)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def text(self) -> str:
        """The text of a completion that came to its end."""
        assert self.status == 200, self.body
        assert [line["stop"] for line in self.lines] == [False] * (len(self.lines) - 1) + [True]
        assert "error" not in self.lines[-1]
        return "".join(line["content"] for line in self.lines)


def request(method: str, path: str, body: bytes = b"", *headers: str, host: str | None = "localhost") -> bytes:
    """A request; with a Content-Length if it has a body."""
    lines = [f"{method} {path} HTTP/1.1", *headers]
    if host is not None:
        lines.append(f"Host: {host}")
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def post(path: str, fields: object, *headers: str) -> bytes:
    return request("POST", path, json.dumps(fields).encode(), *headers)


def image(data: bytes, number: int = 0) -> dict[str, object]:
    """An element of image_data."""
    return {"id": number, "data": base64.b64encode(data).decode()}


class Client:
    """One connection. Reads answers in order; an answer that is cut short raises EOFError."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def ask(self, raw: bytes) -> Answer:
        await self.stream.send_all(raw)
        return await self.answer(head_only=raw.startswith(b"HEAD "))

    async def answer(self, *, head_only: bool = False) -> Answer:
        status, headers = await self.head()
        if head_only or status == 204:
            return Answer(status, headers, b"")
        if "transfer-encoding" in headers:
            body = await self.chunks()
        elif "content-length" in headers:
            body = await self._take(int(headers["content-length"]))
        else:
            body = await self.rest()
        return Answer(status, headers, body)

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self._take_until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        return int(lines[0].split()[1]), headers

    async def chunk(self) -> bytes:
        """The next chunk of a streamed answer; empty at its end."""
        chunk = await self._take(int(await self._take_until(b"\r\n"), 16))
        await self._take_until(b"\r\n")
        return chunk

    async def chunks(self) -> bytes:
        """All that is left of a streamed answer."""
        body = b""
        while chunk := await self.chunk():
            body += chunk
        return body

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        with contextlib.suppress(EOFError):
            while True:
                await self._more()
        return bytes(self._buffer)

    async def closed(self) -> bool:
        """Wait until the server has closed; whether it said nothing more before."""
        try:
            return not await self.rest()
        except trio.BrokenResourceError:
            return True

    def reset(self) -> None:
        """Leave with a RST instead of a FIN."""
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()

    async def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._more()
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    async def _take_until(self, mark: bytes) -> bytes:
        while (end := self._buffer.find(mark)) < 0:
            await self._more()
        return (await self._take(end + len(mark)))[: -len(mark)]

    async def _more(self) -> None:
        data = await self.stream.receive_some()
        if not data:
            raise EOFError(bytes(self._buffer))
        self._buffer += data


async def fin(client: Client) -> None:
    await client.stream.aclose()


async def reset(client: Client) -> None:
    client.reset()


async def half_close(client: Client) -> None:
    """The client still reads, but to the server it looks the same; see rule 3 of connection.py."""
    await client.stream.send_eof()


Leave: TypeAlias = Callable[[Client], Awaitable[None]]
WAYS: list[Leave] = [fin, reset, half_close]


@dataclass
class Server:
    host: str
    port: int
    shutdown: trio.Event
    stopped: trio.Event
    clients: list[Client] = field(default_factory=list)

    async def connect(self) -> Client:
        client = Client(await trio.open_tcp_stream(self.host, self.port))
        self.clients.append(client)
        return client

    async def ask(self, raw: bytes) -> Answer:
        """One request on a connection of its own."""
        client = await self.connect()
        try:
            return await client.ask(raw)
        finally:
            await client.stream.aclose()


@contextlib.asynccontextmanager
async def serving(engine: object, *, deadline: float = DEADLINE, **options: Any) -> AsyncIterator[Server]:
    """A server on a port of its own, for at most `deadline` seconds; it must still be there at the end, unless it was
    told to stop."""
    shutdown, stopped = trio.Event(), trio.Event()

    async def run(*, task_status: trio.TaskStatus[list[tuple[str, int]]]) -> None:
        await serve(cast(EngineInterface, engine), port=0, shutdown=shutdown, task_status=task_status, **options)
        stopped.set()

    with trio.fail_after(deadline):
        async with trio.open_nursery() as nursery:
            [(host, port)] = await nursery.start(partial(run))
            server = Server(host, port, shutdown, stopped)
            try:
                yield server
                if not shutdown.is_set():
                    answer = await server.ask(request("GET", "/health"))
                    assert answer.status in (200, 503)
            finally:
                for client in server.clients:
                    client.stream.socket.close()
                nursery.cancel_scope.cancel()
