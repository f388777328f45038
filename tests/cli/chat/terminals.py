"""The program on a terminal: a pseudo-terminal whose other end the test holds."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType

import trio

from tests.cli.chat.screen import Screen
from tests.cli.programs import DEADLINE, ROOT, TOY

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }};{% endfor %}assistant: "

_TAKES_TERMINAL = "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """A terminal on which the program runs."""

    def __init__(self, stream: trio.lowlevel.FdStream, process: trio.Process) -> None:
        self._stream = stream
        self.process = process
        self.screen = Screen()
        self.written = ""
        """Everything that the program wrote, escape sequences included."""

    def modes(self) -> list[object]:
        """The modes of the terminal, such as whether it shows the keys."""
        return termios.tcgetattr(self._stream.fileno())

    async def type(self, keys: str) -> None:
        await self._stream.send_all(keys.encode())

    async def shows(self, text: str, times: int = 1) -> None:
        """Wait until the text is on the screen that many times."""
        while self.screen.text.count(text) < times:
            await self._read()

    async def prompts(self, times: int) -> None:
        """Wait until that many lines with a prompt are on the screen, the last of them empty."""
        while [row.startswith(">>>") for row in self.screen.rows].count(True) < times or self.screen.rows[-1] != ">>>":
            await self._read()

    async def ended(self) -> int:
        """Read to the end. Returns the exit code."""
        try:
            while True:
                await self._read()
        except EOFError:
            return await self.process.wait()

    async def _read(self) -> None:
        try:
            data = await self._stream.receive_some()
        except trio.BrokenResourceError:  # EIO: on Linux, the program has closed its end
            data = b""
        if not data:
            raise EOFError(self.screen.text)
        text = data.decode(errors="replace")
        self.written += text
        self.screen.feed(text)


@asynccontextmanager
async def terminal(
    *arguments: str, state: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> AsyncIterator[Terminal]:
    """Start the program over a toy, on a terminal. `state` is where it keeps its history."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    own = {
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "default",
        "TERM": "xterm-256color",
        "COLORTERM": "",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # this terminal does not answer where its cursor is
        "XDG_STATE_HOME": str(state),
        "TOY_TEMPLATE": CHAT_TEMPLATE,
    }
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", _TAKES_TERMINAL + TOY, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, **own, **environment},
    )
    os.close(theirs)
    try:
        async with trio.lowlevel.FdStream(ours) as stream:
            with trio.fail_after(DEADLINE):
                yield Terminal(stream, process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
