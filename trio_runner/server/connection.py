"""One client: its socket, its deadlines, and the wall around its failures.

Rule 1: nothing that happens on one connection reaches another, or the accept loop.
Rule 2: every wait for the client has a deadline, except the wait for it to go away while it is being served.
Rule 3: the end of what a client sends means that the client has gone. A half-closed socket looks exactly like a closed
one until something is written to it, and during a long prefill nothing is. So a client that shuts down its sending side
early gives up its answer, and one that leaves is noticed at once, in every phase.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.task_group import TaskGroup
from hypercorn.typing import ConnectionState

from trio_runner.server.http1 import Http1

if TYPE_CHECKING:
    from hypercorn.config import Config
    from hypercorn.trio.worker_context import WorkerContext
    from hypercorn.typing import AppWrapper

log = logging.getLogger(__name__)

RECEIVE_BYTES = 1 << 16
HEAD_SECONDS = 20.0
"""For the head of a request, from its first byte on, and for the first request of a connection."""
LINGER_SECONDS = 2.0
"""For the client to take the last answer and close. Closing first, with bytes of its unread, would reset the
connection and could cost it the answer."""


class Connection:
    """Serves one client on `sock`, which it owns: a connected, non-blocking stream socket."""

    def __init__(
        self, sock: socket.socket, app: AppWrapper, config: Config, context: WorkerContext, *, stall_timeout: float
    ) -> None:
        self._sock = sock
        self._app = app
        self._config = config
        self._context = context
        self._stall_timeout = stall_timeout
        self._patience = trio.CancelScope()
        self._writing = trio.Lock()
        self._lingering = False
        self._closed = False
        self._http: Http1
        self.idle_since = math.inf
        """When it answered its last request, unless the client has begun another one since."""

    async def run(self) -> None:
        """Serve until either side closes. Raises nothing but Cancelled."""
        try:
            async with TaskGroup() as tasks:
                self._http = self._open_protocol(tasks)
                with self._patience:
                    await self._read()
                await self._http.handle(Closed())
        except* Exception:
            log.exception("a connection failed")
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket and wake whoever waits for it. Idempotent."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def close_if_idle(self) -> None:
        if self._http.idle and not self._lingering:
            self.close()

    def make_room(self) -> bool:
        """Close if idle, but not if a request has arrived that nobody has looked at yet. Whether it did."""
        if self.idle_since == math.inf or self._closed:
            return False
        try:
            if self._sock.recv(1, socket.MSG_PEEK):
                return False
        except OSError:
            pass  # there is nothing, or nobody
        self.close()
        return True

    def _open_protocol(self, tasks: TaskGroup) -> Http1:
        client, server = _address(self._sock.getpeername), _address(self._sock.getsockname)
        state = ConnectionState({})
        self._wait_at_most(HEAD_SECONDS)
        return Http1(self._app, self._config, self._context, tasks, state, False, client, server, self._on_event)

    def _wait_at_most(self, seconds: float) -> None:
        self._patience.deadline = trio.current_time() + seconds

    async def _read(self) -> None:
        while True:
            try:
                await trio.lowlevel.wait_readable(self._sock)
                data = self._sock.recv(RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError):
                return
            if not data:
                return
            if self._lingering:
                continue
            if self.idle_since < math.inf:
                self.idle_since = math.inf
                self._wait_at_most(HEAD_SECONDS)
            await self._http.handle(RawData(data))

    async def _on_event(self, event: Event) -> None:
        # Called by requests that quart-trio has already cancelled, because their answer is complete. So nothing but
        # a write that the socket does not take at once may be a checkpoint here.
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Updated):
            self.idle_since = trio.current_time() if event.idle else math.inf
            self._wait_at_most(self._config.keep_alive_timeout if event.idle else math.inf)
        elif isinstance(event, Closed):
            self._linger()
            await self._http.handle(Closed())

    def _linger(self) -> None:
        """Say that nothing more will come, and discard what the client still sends."""
        if not self._lingering and not self._closed:
            self._lingering = True
            self._wait_at_most(LINGER_SECONDS)
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

    async def _write(self, data: bytes) -> None:
        """Write all of it, or close: after half a frame nothing else may follow.

        The deadline is for the socket to take more. It does when the client's kernel makes room, which over loopback
        happens once for every 64 to 128 KiB that the client has read; until then nothing tells a slow reader from one
        that does not read, the number of unsent bytes (SIOCOUTQ) neither. So within half a minute, less than some five
        kilobytes per second may count as nothing.
        """
        if self._closed:
            return
        rest = memoryview(data)
        try:
            if not self._writing.locked():  # nearly always the socket takes all of it at once
                rest = rest[self._write_some(rest) :]
            if rest:
                async with self._writing:
                    while rest:
                        with trio.fail_after(self._stall_timeout):
                            await trio.lowlevel.wait_writable(self._sock)
                        rest = rest[self._write_some(rest) :]
        except (OSError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # closing wakes the reader, which reports that the client has gone
        finally:
            if rest:
                self._abort()

    def _abort(self) -> None:
        """Close, and drop what the client has not taken instead of leaving it to the kernel."""
        if not self._closed:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close()

    def _write_some(self, data: memoryview) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0


def _address(get_name: Callable[[], object]) -> tuple[str, int] | None:
    """The (host, port) of a socket; None for one without ports, or whose client has already gone."""
    try:
        name = get_name()
    except OSError:
        return None
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None
