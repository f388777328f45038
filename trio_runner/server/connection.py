"""One client: its socket and its deadlines. Its failures stay here.

Rule 1: nothing that happens on one connection reaches another, or the accept loop.
Rule 2: every wait for the client has a deadline, except the wait for it to disconnect while it is being served.
Rule 3: the end of what a client sends means that the client has gone. A half-closed socket looks exactly like a closed
one until something is written to it, and during a long prefill nothing is. So a client that shuts down its sending side
early gives up its answer, and one that leaves is noticed at once, in every phase.
Rule 4: a connection that serves no request may be closed for a client that has just connected. So may one whose client
does not take an answer that is complete. There is no other defence against a client that opens many connections.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

import trio

from trio_runner.server.asgi import Application
from trio_runner.server.exchange import Address, Exchange, Peers
from trio_runner.server.http1 import Http1

log = logging.getLogger(__name__)

RECEIVE_BYTES = 1 << 16
HEAD_SECONDS = 20.0
"""Seconds a client may take to begin its first request, and to send the head of each request."""
LINGER_SECONDS = 2.0
"""Seconds a client may take to read the last answer and close. If the server closed first, with bytes of the client
unread, the kernel would reset the connection, and the client could lose the answer."""
UNREAD_SECONDS = 1.0
"""Seconds a complete answer must have waited for its client before the connection may be closed for another client."""


@dataclass
class Service:
    """What all connections of a server share."""

    app: Application
    stall_timeout: float
    """Seconds a client may leave its socket full before it is disconnected."""
    keep_alive: float
    """Seconds a connection may stay idle after an answer."""
    closing: bool = False
    """The answer that a connection is sending is its last."""


class State(enum.Enum):
    """What a connection is doing."""

    IDLE = enum.auto()
    """Nothing of a request has come since the connection was made, or since the last answer."""
    IN_HEAD = enum.auto()
    """A part of the head of a request has come."""
    SERVING = enum.auto()
    UNREAD = enum.auto()
    """The answer is complete, and the socket is full of what the client has not read."""
    LINGERING = enum.auto()
    """The last answer is written, and the client has yet to close."""
    CLOSED = enum.auto()
    """The socket is closed. No other state follows."""


MAKES_ROOM = (State.IDLE, State.LINGERING, State.IN_HEAD, State.UNREAD)
"""The states in which a connection may be closed for a new client, in this order."""


class Connection:
    """Serves one client on `sock`, which it owns: a connected, non-blocking stream socket."""

    def __init__(self, sock: socket.socket, service: Service) -> None:
        self._sock = sock
        self._service = service
        self._patience = trio.CancelScope()
        self._waiting_to_read = trio.CancelScope()
        self._reading = True
        self.state = State.IDLE
        self.since = trio.current_time()
        """When it entered its state."""
        self._wait_at_most(HEAD_SECONDS)

    async def run(self) -> None:
        """Serve until either side closes. Raises nothing but Cancelled."""
        try:
            try:
                await self._serve()
            finally:
                self.close()
        except* Exception:
            log.exception("a connection failed")

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            http = self._open_protocol(nursery)
            with self._patience:
                await self._read(http)
            self._reading = False
            if not self.is_closed:
                trio.lowlevel.notify_closing(self._sock)  # a write that waits for the client waits in vain
            await http.disconnect()

    def close(self) -> None:
        """Close the socket and wake the tasks that wait for it. Idempotent."""
        if not self.is_closed:
            self._enter(State.CLOSED)
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def close_unless_serving(self) -> None:
        """Close if no complete head of a request has come since the last answer."""
        if self.state in (State.IDLE, State.IN_HEAD):
            self.close()

    def make_room(self) -> bool:
        """Close for another client, if there is nothing left to do for this one. Returns whether it did.

        Bytes that have arrived and have not been looked at may be a request. An answer may be about to be read.
        """
        match self.state:
            case State.IDLE | State.IN_HEAD if self._has_unseen_bytes():
                return False
            case State.UNREAD if trio.current_time() < self.since + UNREAD_SECONDS:
                return False
            case State.UNREAD:
                self._abort()
            case _:
                self.close()
        return True

    # What Http1 calls.

    @property
    def is_closed(self) -> bool:
        return self.state is State.CLOSED

    def await_request(self, *, begun: bool) -> None:
        state = State.IN_HEAD if begun else State.IDLE
        if self.state is not state:  # a head that trickles in has one deadline
            self._enter(state)
            self._wait_at_most(HEAD_SECONDS if begun else self._service.keep_alive)

    def begin_request(self) -> None:
        self._enter(State.SERVING)
        self._wait_at_most(math.inf)

    def wake_reader(self) -> None:
        self._waiting_to_read.cancel()

    def finish(self) -> None:
        """Say that nothing more will come, and discard what the client still sends."""
        if self.state not in (State.LINGERING, State.CLOSED):
            self._enter(State.LINGERING)
            self._wait_at_most(LINGER_SECONDS)
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

    async def write(self, data: bytes, *, complete: bool) -> None:
        """Write all of it, or close: after half a frame nothing else may follow.

        The deadline is for the socket to take more. It does when the client's kernel makes room, which over loopback
        happens once for every 64 to 128 KiB that the client has read. Until then nothing tells a slow reader from one
        that does not read; the number of unsent bytes (SIOCOUTQ) does not either. So within half a minute, less than
        some five kilobytes per second may count as nothing.

        Quart-Trio writes from a task that it has already cancelled, because the answer is complete. So nothing here is
        a checkpoint unless the socket is full.
        """
        if self.is_closed:
            return
        rest = memoryview(data)
        try:
            rest = rest[self._write_some(rest) :]  # nearly always the socket takes all of it at once
            while rest and self._reading:
                if complete and self.state in (State.SERVING, State.UNREAD):
                    self._enter(State.UNREAD)
                with trio.fail_after(self._service.stall_timeout):
                    await trio.lowlevel.wait_writable(self._sock)
                rest = rest[self._write_some(rest) :]
        except (OSError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # closing wakes the reader, which reports that the client has gone
        finally:
            if rest:
                self._abort()
            elif self.state is State.UNREAD:
                self._enter(State.SERVING)

    def write_now(self, data: bytes) -> None:
        """Write all of it without waiting, or close. If the socket does not take some hundred bytes, the client has
        left tens of kilobytes of earlier answers unread."""
        if self.is_closed:
            return
        try:
            n_written = self._write_some(memoryview(data))
        except OSError:
            n_written = 0
        if n_written < len(data):
            self._abort()

    def _open_protocol(self, nursery: trio.Nursery) -> Http1:
        peers = Peers(_address(self._sock.getpeername), _address(self._sock.getsockname))
        service = self._service
        return Http1(
            lambda send, finished: Exchange(service.app, nursery, peers, send, finished),
            self,
            lambda: service.closing,
        )

    def _enter(self, state: State) -> None:
        if not self.is_closed:
            self.state = state
            self.since = trio.current_time()

    def _wait_at_most(self, seconds: float) -> None:
        self._patience.deadline = trio.current_time() + seconds

    async def _read(self, http: Http1) -> None:
        """Pass on what the client sends, until it has gone. This task alone takes what has been sent."""
        while not self.is_closed:
            try:
                with trio.CancelScope() as self._waiting_to_read:
                    await trio.lowlevel.wait_readable(self._sock)
                was_woken = self._waiting_to_read.cancelled_caught
                data = b"" if was_woken else self._sock.recv(RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError):
                return
            if was_woken:
                await http.resume()
            elif not data:
                return
            elif self.state is not State.LINGERING:
                await http.receive(data)

    def _has_unseen_bytes(self) -> bool:
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False  # nothing has arrived, or the client has gone

    def _abort(self) -> None:
        """Close, and drop what the client has not taken instead of leaving it to the kernel."""
        if not self.is_closed:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close()

    def _write_some(self, data: memoryview) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0


def _address(get_name: Callable[[], object]) -> Address | None:
    """The (host, port) of a socket, or (path, None) of a Unix socket, as ASGI wants them; None for one without a name,
    or whose client has already gone."""
    try:
        name = get_name()
    except OSError:
        return None
    if isinstance(name, str) and name:
        return name, None
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None
