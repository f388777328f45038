"""rpc-servers of llama.cpp on loopback."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Final

START_SECONDS: Final = 30.0
"""That a server may take until it accepts, on a machine that is busy with other things."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class RpcServer:
    """A process with the CPU for its device. It serves one client at a time, and the next when that one is gone."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it accepts. Started again, it has the port that it had."""
        deadline = time.monotonic() + START_SECONDS
        while not self._accepts(self.port or free_port()):  # somebody else may take it meanwhile
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
        """At once, whatever it does. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def hang(self) -> None:
        """It stays connected and does nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
