"""Text to stdout from a task that must stay cancellable."""

from __future__ import annotations

import os

import trio

_CHUNK = 4096
"""A pipe that poll(2) calls writable takes this much (PIPE_BUF) without blocking."""


class TextOutput:
    """Writes text to a file descriptor without blocking the event loop, wherever the system can say what would block.

    The descriptor stays in blocking mode: it is shared with other programs, which would not expect anything else.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._can_wait = True

    async def write(self, text: str) -> None:
        """Write all of `text`, at once and unbuffered. Raises `OSError`, such as BrokenPipeError."""
        data = text.encode()
        while data:
            await self._wait_writable()
            data = data[os.write(self._descriptor, data[:_CHUNK]) :]

    async def _wait_writable(self) -> None:
        if self._can_wait:
            try:
                await trio.lowlevel.wait_writable(self._descriptor)
            except OSError:  # a file on disk, or a system that waits for sockets only
                self._can_wait = False
        if not self._can_wait:
            await trio.lowlevel.checkpoint()
