"""A server between us and a real rpc-server, which changes single answers."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeAlias

COMMANDS: Final = (
    "alloc_buffer",
    "get_alignment",
    "get_max_size",
    "buffer_get_base",
    "free_buffer",
    "buffer_clear",
    "set_tensor",
    "set_tensor_hash",
    "get_tensor",
    "copy_tensor",
    "graph_compute",
    "get_device_memory",
    "init_tensor",
    "get_alloc_size",
    "hello",
    "device_count",
    "graph_recompute",
    "memset_tensor",
)
"""The commands of upstream's protocol; the position of each is its number."""
SILENT: Final = {
    "free_buffer",
    "buffer_clear",
    "set_tensor",
    "graph_compute",
    "init_tensor",
    "graph_recompute",
    "memset_tensor",
}
"""Commands without an answer."""

Meddle: TypeAlias = Callable[[bytes, int], bytes | None]
"""Gets an answer and its number, counted from 0. Returns what to send instead, or None to close the connection."""


def framed(*numbers: int) -> bytes:
    """An answer that consists of 64-bit numbers."""
    return struct.pack(f"<Q{len(numbers)}Q", 8 * len(numbers), *numbers)


class Meddler:
    """Passes bytes between a client and the rpc-server at `port`. `meddle` changes the answers to `command`."""

    def __init__(self, port: int, command: str, meddle: Meddle) -> None:
        self._target = port
        self._command = command
        self._meddle = meddle
        self._n_answers = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        for connection in (self._listener, *self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        with suppress(OSError), self._listener:  # until the listener is closed or the server is gone
            while True:
                client, _ = self._listener.accept()
                with client, socket.create_connection(("127.0.0.1", self._target)) as server:
                    self._open = [client, server]
                    for end in self._open:
                        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    with suppress(OSError, EOFError):
                        while self._pass_on(client, server):
                            pass

    def _pass_on(self, client: socket.socket, server: socket.socket) -> bool:
        head = _read(client, 9)
        number, size = struct.unpack("<BQ", head)
        command = COMMANDS[number]
        body = _read(client, size)
        server.sendall(head + body)
        answer = b""
        if command not in SILENT:
            answer = _read(server, 8)
            answer += _read(server, struct.unpack("<Q", answer)[0])
        if command == self._command:
            meddled = self._meddle(answer, self._n_answers)
            self._n_answers += 1
            if meddled is None:
                return False
            answer = meddled
        client.sendall(answer)
        return True


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        received = connection.recv(min(size - len(data), 1 << 20))
        if not received:
            raise EOFError
        data += received
    return bytes(data)
