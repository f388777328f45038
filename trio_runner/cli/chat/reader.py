"""Reads what the user types: with line editing from a terminal, or line by line from a pipe or a file."""

from __future__ import annotations

import codecs
import os
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol

import trio

_CHUNK: Final = 65536


class Interrupted(Exception):
    """The user pressed Ctrl-C. `had_text` tells whether there was something on the line."""

    def __init__(self, *, had_text: bool) -> None:
        super().__init__()
        self.had_text = had_text


class Reader(Protocol):
    """Reads lines. An interactive one reads from a user, who sees a prompt."""

    @property
    def is_interactive(self) -> bool: ...

    async def read(self, *, more: bool = False) -> str:
        """The next line, without its end. `more`: it continues an entry.

        Raises EOFError at the end of the input, and `Interrupted`.
        """

    async def confirm(self, question: str) -> bool:
        """Ask the user. No answer is a no."""

    def hold_back_keys(self) -> AbstractContextManager[None]:
        """Between two reads, let keys wait, for the length of the block."""


class LineReader:
    """Reads lines from a descriptor without blocking the event loop, if the system can tell what would block."""

    is_interactive = False

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._lines: deque[str] = deque()
        self._partial: list[str] = []
        self._ended = False

    async def read(self, *, more: bool = False) -> str:
        """The next line. Raises EOFError at the end of the input, and OSError."""
        while not self._lines:
            if self._ended:
                raise EOFError
            await self._wait_readable()
            self._take(os.read(self._descriptor, _CHUNK))
        return self._lines.popleft()

    async def confirm(self, question: str) -> bool:
        """Nobody answers."""
        return False

    def hold_back_keys(self) -> AbstractContextManager[None]:
        """Nobody types."""
        return nullcontext()

    async def _wait_readable(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._descriptor)
        except OSError:  # a file on disk, which is always readable
            await trio.lowlevel.checkpoint()

    def _take(self, data: bytes) -> None:
        self._ended = not data
        first, *others = self._decoder.decode(data, final=self._ended).split("\n")
        self._partial.append(first)
        for piece in others:
            self._lines.append("".join(self._partial).removesuffix("\r"))
            self._partial = [piece]
        if self._ended and any(self._partial):
            self._lines.append("".join(self._partial))
