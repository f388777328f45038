"""rpc-servers of llama.cpp on the loopback interface."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Final

START_SECONDS: Final = 30.0
"""Seconds that a server may take until it accepts connections, on a busy machine."""


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class RpcServer:
    """An rpc-server whose device is the CPU. It serves one client at a time, and the next after that one."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server, or start it again on the same port. Returns when it accepts connections."""
        deadline = time.monotonic() + START_SECONDS
        while not self._accepts(self.port or free_port()):  # another program may take the port meanwhile
            self.kill()
            assert time.monotonic() < deadline, "no rpc-server could be started"

    def _accepts(self, port: int) -> bool:
        deadline = time.monotonic() + START_SECONDS
        command = [str(self._program), "--host", "127.0.0.1", "--port", str(port), "--threads", "1", "--device", "CPU"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 1):
                self.port = port
                return self._process.poll() is None
            time.sleep(0.005)
        return False

    def kill(self) -> None:
        """Kill the server at once. May be called more than once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def hang(self) -> None:
        """Stop the process: it stays connected and does nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
