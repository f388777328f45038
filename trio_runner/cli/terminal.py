"""Text for a terminal, and for stdout from a task that must stay cancellable."""

from __future__ import annotations

import os

import trio

_CHUNK = 4096
"""Bytes that a pipe takes without blocking if poll(2) reports it as writable: PIPE_BUF on Linux."""


class TextOutput:
    """Writes text to a file descriptor without blocking the event loop, if the system can tell what would block.

    The descriptor stays in blocking mode, because it is shared with other programs that expect this mode.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._can_wait = True

    async def write(self, text: str) -> None:
        """Write all of `text` now, without a buffer. Raises OSError, such as BrokenPipeError."""
        data = text.encode()
        while data:
            await self._wait_writable()
            data = data[os.write(self._descriptor, data[:_CHUNK]) :]

    async def _wait_writable(self) -> None:
        if self._can_wait:
            try:
                await trio.lowlevel.wait_writable(self._descriptor)
            except OSError:  # a file on disk, or a system that can wait for sockets only
                self._can_wait = False
        if not self._can_wait:
            await trio.lowlevel.checkpoint()


_CONTROLS = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n\r"},
    ord("\r"): None,
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
}


def printable(text: str) -> str:
    """`text` for a terminal, with a visible character for each control character, which could take the terminal over.
    Tabs and line breaks stay."""
    return text.translate(_CONTROLS)
