"""Listening sockets and the loop that accepts connections.

The sockets are plain non-blocking ones and not trio's, because a connection writes to its socket without a checkpoint
whenever the socket has room.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import NoReturn

import trio

log = logging.getLogger(__name__)

UNIX = getattr(socket, "AF_UNIX", None)

BACKLOG = 512
"""Connections that the kernel may keep until they are accepted."""
ACCEPTED_AT_ONCE = 64
"""Connections accepted in one turn of the event loop. With one for each turn, five hundred clients that connect at once
make the next one wait for five hundred turns."""
SEND_BUFFER_BYTES = 1 << 15
"""Bytes that the kernel may buffer for one connection. By default Linux takes four megabytes of an answer that nobody
reads: thirty thousand tokens, all of them computed for nothing."""
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


async def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Listen on every address of `host`; port 0 chooses one port for all. Raises OSError, which names the address."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            chosen = listeners[0].getsockname()[1] if listeners else port
            listeners.append(_listen(family, (address[0], chosen, *address[2:])))
    except BaseException:
        close_all(listeners)
        raise
    return listeners


def _listen(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # on Windows it lets another process take over the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {host_and_port(address)}: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def addresses(listeners: Sequence[socket.socket]) -> list[tuple[str, int]]:
    """The (host, port) of each listener that has them. A Unix socket has none."""
    return [listener.getsockname()[:2] for listener in listeners if listener.family != UNIX]


def host_and_port(address: Sequence[object]) -> str:
    """The two as they are written in a URL."""
    host, port = str(address[0]), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_local(listener: socket.socket) -> bool:
    """Whether no other machine can reach it."""
    if listener.family == UNIX:
        return True
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def close_all(listeners: Sequence[socket.socket]) -> None:
    for listener in listeners:
        listener.close()


async def accept(listener: socket.socket, handle: Callable[[socket.socket], None]) -> NoReturn:
    """Pass each new connection, non-blocking, to `handle`, for ever. Survives running out of descriptors."""
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            for _ in range(ACCEPTED_AT_ONCE):
                _accept_one(listener, handle)
        except OSError as error:
            if error.errno in _EXHAUSTED:
                log.error("cannot accept connections: %s", error.strerror)
                await trio.sleep(0.1)
            # Otherwise no more clients wait, or one has left before it was accepted.


def _accept_one(listener: socket.socket, handle: Callable[[socket.socket], None]) -> None:
    sock, _ = listener.accept()
    try:
        _tune(sock)
    except OSError:
        sock.close()
    else:
        handle(sock)


def _tune(sock: socket.socket) -> None:
    """Send small chunks at once, buffer a few hundred tokens for a client that does not read, and notice within half a
    minute that the machine of a client has vanished."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    if sock.family == UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
