"""Serve an engine over HTTP until told to stop."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

import trio

from trio_runner.interface import EngineInterface
from trio_runner.server.access import Access, host_names, read_origin
from trio_runner.server.app import MAX_BODY_BYTES, create_app
from trio_runner.server.asgi import Application
from trio_runner.server.connection import MAKES_ROOM, Connection, Service
from trio_runner.server.dialects import DIALECTS, Dialect
from trio_runner.server.listener import accept, addresses, close_all, is_local, open_listeners
from trio_runner.server.names import ANY_NAME, ModelNames
from trio_runner.server.unix_socket import listening_at

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
"""Connections that may be open at once, so that the descriptors of a process, often 1024, suffice."""
KEEP_ALIVE_SECONDS = 75
"""Seconds a connection may stay idle after an answer."""
FLUSH_SECONDS = 1.0
"""Seconds in which complete answers may still reach their clients when the server stops."""

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 21\r\n"
    b"Retry-After: 1\r\nConnection: close\r\n\r\ntoo many connections\n"
)


async def serve(
    engine: EngineInterface,
    *,
    host: str = "127.0.0.1",
    port: int | None = 8080,
    socket_path: Path | None = None,
    listeners: Sequence[socket.socket] | None = None,
    api_key: str | None = None,
    allowed_hosts: Iterable[str] = (),
    allowed_origins: Iterable[str] = (),
    adapter_dir: Path | None = None,
    names: ModelNames = ANY_NAME,
    model_path: Path | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    dialects: Sequence[Dialect] = DIALECTS,
    shutdown: trio.Event | None = None,
    drain_timeout: float = 5.0,
    max_connections: int = MAX_CONNECTIONS,
    task_status: trio.TaskStatus[list[tuple[str, int]]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `engine`, which may still be loading, until `shutdown` is set. When it listens, `task_status` is given the
    (host, port) of each listener that has them.

    It listens on `host` and `port`, unless the port is None, or on `listeners` instead; and on a Unix socket at
    `socket_path`, if that is given, which only the user of this process can reach.

    On shutdown the engine is drained, while /health still answers. Then no more connections are accepted, and what
    cannot be written within a second is dropped. So this returns soon after `drain_timeout`, whatever clients do.
    Cancel it to stop at once. It closes `listeners` in any case.

    A client that takes nothing of its answer for the engine's `stall_timeout` is disconnected. When `max_connections`
    are open and another client connects, a connection that serves no request is closed for it, the one that has been
    idle longest first, or else one whose client has not read a complete answer for a second. If there is none, the new
    client is answered with 503.

    Raises ValueError for an address that other machines reach without an `api_key` and for an origin that is none, and
    OSError if it cannot listen.
    """
    shutdown = trio.Event() if shutdown is None else shutdown
    if listeners is None:
        listeners = [] if port is None else await open_listeners(host, port)
    with contextlib.ExitStack() as stack:
        stack.callback(close_all, listeners)
        local = all(map(is_local, listeners))
        if not local and not api_key:
            raise ValueError(f"{host} can be reached by other machines: set an API key, or listen on 127.0.0.1")
        if socket_path is not None:
            listeners = [*listeners, stack.enter_context(listening_at(socket_path))]
        if not listeners:
            raise ValueError("give a port or the path of a socket")
        access = Access(
            api_key=api_key or None,
            hosts=host_names(allowed_hosts) if local or allowed_hosts else None,
            origins=frozenset(map(read_origin, allowed_origins)),
        )
        app = create_app(
            engine,
            access=access,
            max_body_bytes=max_body_bytes,
            adapter_dir=adapter_dir,
            names=names,
            model_path=model_path,
            dialects=dialects,
        )
        server = _Server(app, engine.config.stall_timeout, max_connections)
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(accept, listener, lambda sock: server.admit(sock, connections))
                task_status.started(addresses(listeners))
                await shutdown.wait()
                await engine.drain(drain_timeout)
                accepting.cancel_scope.cancel()
            close_all(listeners)
            server.wind_down()
            connections.cancel_scope.deadline = trio.current_time() + FLUSH_SECONDS


class _Server:
    """The connections that are open, and what they share."""

    def __init__(self, app: Application, stall_timeout: float, max_connections: int) -> None:
        self._service = Service(app, stall_timeout, KEEP_ALIVE_SECONDS)
        self._max_connections = max_connections
        self._open: set[Connection] = set()
        self._turned_away = 0

    def admit(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        """Serve `sock`, or turn it away if there are too many connections and none may be closed for it."""
        if len(self._open) < self._max_connections or self._make_room():
            connection = Connection(sock, self._service)
            self._open.add(connection)
            nursery.start_soon(self._serve, connection)
        elif self._turned_away < self._max_connections:
            nursery.start_soon(self._turn_away, sock)
        else:
            sock.close()

    def wind_down(self) -> None:
        """Close connections that serve no request, and make the others close after their answer."""
        self._service.closing = True
        for connection in list(self._open):
            connection.close_unless_serving()

    def _make_room(self) -> bool:
        for state in MAKES_ROOM:
            candidates = (connection for connection in self._open if connection.state is state)
            for connection in sorted(candidates, key=lambda connection: connection.since):
                if connection.make_room():
                    self._open.discard(connection)  # its task ends a little later
                    return True
        return False

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.run()
        except* Exception:  # never seen; but it would end every other connection
            log.exception("a connection failed")
        finally:
            self._open.discard(connection)

    async def _turn_away(self, sock: socket.socket) -> None:
        """Answer 503, and wait a moment for the client to close, so that it reads the answer."""
        self._turned_away += 1
        try:
            with trio.move_on_after(FLUSH_SECONDS), contextlib.suppress(OSError):
                sock.send(_FULL)
                sock.shutdown(socket.SHUT_WR)
                while True:
                    await trio.lowlevel.wait_readable(sock)
                    if not sock.recv(1 << 16):
                        break
        finally:
            self._turned_away -= 1
            sock.close()
