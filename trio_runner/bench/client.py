"""One request on one socket: what is sent, when each byte of the answer comes, and how and when the client disconnects.

Moments are values of `time.perf_counter()`, taken before anything is parsed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias

import h11
import trio

from trio_runner.bench.dialects import Choice, Dialect, Message, Request, Total

Ending: TypeAlias = Literal["fin", "reset"]

_RECEIVE_SIZE = 1 << 16


class Refused(Exception):
    """The server answered with another status than 200. `retry_after` is the value of that header, if any."""

    def __init__(self, status: int, text: str, retry_after: str | None) -> None:
        super().__init__(f"{status}: {' '.join(text.split())[:200]}")
        self.status = status
        self.retry_after = retry_after


class CutShort(Exception):
    """The answer ended with an error, or too early."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens. As text: host:port, with brackets around an IPv6 address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Head:
    """The head of an answer. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]


class Connection:
    """A connection to a server, for one request after another. Use it as a context manager, or call `close`."""

    def __init__(self, sock: trio.socket.SocketType, address: Address) -> None:
        self._sock = sock
        self._host = str(address)
        self._http = h11.Connection(h11.CLIENT)

    @classmethod
    async def open(cls, address: Address, *, receive_buffer: int | None = None) -> Connection:
        """Connect. With a small `receive_buffer`, in bytes, a server soon notices a client that does not read.

        Raises OSError.
        """
        found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, target = found[0]
        sock = trio.socket.socket(family, kind, protocol)
        try:
            if receive_buffer is not None:  # before connecting, so that the window is small from the start
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await sock.connect(target)
        except BaseException:
            sock.close()
            raise
        return cls(sock, address)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encode(self, method: str, path: str, fields: Mapping[str, Any] | None = None) -> bytes:
        """The bytes of the next request. `fields` become its JSON body. Send them with `send`, whole or in part."""
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        body = b"" if fields is None else json.dumps(fields).encode()
        headers = [("Host", self._host), ("Accept", "*/*")]
        if fields is not None:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        events = h11.Request(method=method, target=path, headers=headers), h11.Data(data=body), h11.EndOfMessage()
        return b"".join(self._http.send(event) or b"" for event in events)

    async def send(self, data: bytes) -> None:
        """Send all of `data`."""
        view = memoryview(data)
        while view:
            view = view[await self._sock.send(view) :]

    async def head(self) -> Head:
        """Read the head of the answer. Raises `CutShort` if the connection ends before."""
        while True:
            event = self._next_event()
            if isinstance(event, h11.Response):
                headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in event.headers}
                return Head(event.status_code, headers)
            if event is h11.NEED_DATA:
                await self._receive()

    async def body(self) -> tuple[float, bytes] | None:
        """Read the next part of the body: the moment it came, and its bytes. None at the end of the answer.

        Raises `CutShort` if the connection ends before the answer does.
        """
        moment, parts = time.perf_counter(), list[bytes]()
        while self._http.their_state is h11.SEND_BODY:
            event = self._next_event()
            if isinstance(event, h11.Data):
                parts.append(bytes(event.data))
            elif event is h11.NEED_DATA:
                if parts:
                    break
                moment = await self._receive()
        return (moment, b"".join(parts)) if parts else None

    async def read(self) -> bytes:
        """Read the rest of the body. Raises `CutShort`."""
        parts = []
        while (part := await self.body()) is not None:
            parts.append(part[1])
        return b"".join(parts)

    def disconnect(self, how: Ending = "fin") -> float:
        """Disconnect as a client does, with a FIN or a RST packet. Returns the moment."""
        if how == "reset":
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self._drain()  # unread data makes the kernel send a RST instead of a FIN
        moment = time.perf_counter()
        self._sock.close()
        return moment

    def fileno(self) -> int:
        """The descriptor of the socket, for `trio.lowlevel.wait_readable`."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection. May be called more than once."""
        self._sock.close()

    def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:  # for example, the answer ends too early
            raise CutShort(str(error)) from error
        if isinstance(event, h11.ConnectionClosed):
            raise CutShort("the server closed the connection")
        return event

    async def _receive(self) -> float:
        try:
            data = await self._sock.recv(_RECEIVE_SIZE)
        except ConnectionError as error:
            raise CutShort(str(error)) from error
        moment = time.perf_counter()
        self._http.receive_data(data)
        return moment

    def _drain(self) -> None:
        # A socket of trio cannot be read without waiting, but a second socket object for the same connection can.
        with socket.socket(fileno=os.dup(self.fileno())) as same, contextlib.suppress(OSError):
            while same.recv(_RECEIVE_SIZE, socket.MSG_DONTWAIT):
                pass


async def fetch(connection: Connection, method: str, path: str, fields: Mapping[str, Any] | None = None) -> Any:
    """Send one request and return the JSON of its answer.

    Raises `Refused` for a status other than 200, `CutShort` if the answer ends too early, and ValueError if it is not
    JSON.
    """
    await connection.send(connection.encode(method, path, fields))
    head = await connection.head()
    body = await connection.read()
    if head.status != 200:
        raise Refused(head.status, body.decode(errors="replace"), head.headers.get("retry-after"))
    return json.loads(body)


class Stream:
    """A completion that is being read: what has arrived so far, and when."""

    def __init__(self, connection: Connection, dialect: Dialect, request: Request) -> None:
        self.sent = 0.0
        """The moment just before the request was sent."""
        self.ended: float | None = None
        """The moment at which the answer ended."""
        self.moments: list[float] = []
        """The moment of each piece of text."""
        self.pieces: list[str] = []
        self.choices: list[Choice] = []
        self.total: Total | None = None
        self._connection = connection
        self._dialect = dialect
        self._request = request
        self._decoder = dialect.decoder()
        self._answered = False

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)

    @property
    def first(self) -> float:
        """The moment of the first piece, or of the end if only a part of a character was generated.

        Raises `CutShort` if neither has come.
        """
        if self.moments:
            return self.moments[0]
        if self.ended is None:
            raise CutShort("no text came")
        return self.ended

    @property
    def ttft(self) -> float:
        """Seconds from the request to the first piece. Raises `CutShort` if there is none."""
        return self.first - self.sent

    @property
    def tokens_per_piece(self) -> float:
        """Tokens in a piece, on average: 1, or more if the server joins tokens. 1 if it does not tell their number."""
        if self.total is None or not self.total.completion_tokens or not self.pieces:
            return 1.0
        return self.total.completion_tokens / len(self.pieces)

    async def send(self) -> None:
        """Send the request."""
        request = self._connection.encode("POST", self._dialect.path, self._dialect.body(self._request))
        self.sent = time.perf_counter()
        await self._connection.send(request)

    async def step(self) -> bool:
        """Read the next part. Returns False at the end. Raises `Refused` and `CutShort`."""
        if not self._answered:
            head = await self._connection.head()
            self._answered = True
            if head.status != 200:
                text = (await self._connection.read()).decode(errors="replace")
                raise Refused(head.status, text, head.headers.get("retry-after"))
        part = await self._connection.body()
        if part is None:
            self.ended = time.perf_counter()
            self._take(self.ended, self._decoder.flush())
            return False
        moment, data = part
        self._take(moment, self._decoder.push(data))
        return True

    async def read(self, n_pieces: int) -> None:
        """Read until there are `n_pieces` pieces. Raises `CutShort` if the answer ends before."""
        while len(self.pieces) < n_pieces:
            if not await self.step() and len(self.pieces) < n_pieces:
                raise CutShort(f"the stream ended after {len(self.pieces)} of {n_pieces} pieces")

    async def finish(self) -> Stream:
        """Read to the end, and return this stream. Raises `CutShort` if there is no last message and no text."""
        while await self.step():
            pass
        if self.total is None and not self.pieces:
            raise CutShort("the answer is empty")
        return self

    def disconnect(self, how: Ending = "fin") -> float:
        """Disconnect with a FIN or a RST packet. Returns the moment."""
        return self._connection.disconnect(how)

    def _take(self, moment: float, messages: list[Message]) -> None:
        for message in messages:
            if message.error is not None:
                raise CutShort(message.error)
            if message.text:
                self.pieces.append(message.text)
                self.moments.append(moment)
            self.choices += message.choices
            if message.total is not None:
                self.total = message.total


@contextlib.asynccontextmanager
async def requesting(
    address: Address, dialect: Dialect, request: Request, *, receive_buffer: int | None = None
) -> AsyncIterator[Stream]:
    """A completion on a connection of its own: requested when the block begins, abandoned when the block ends."""
    with await Connection.open(address, receive_buffer=receive_buffer) as connection:
        stream = Stream(connection, dialect, request)
        await stream.send()
        yield stream
