"""A server of our own, as a child process that ends with us."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from trio_runner.bench.dialects import DialectName
from trio_runner.bench.server import Server, Unavailable, meet

KILL_SECONDS: Final = 5.0
"""Seconds after which a child that ignores SIGTERM is killed."""

_LISTENING: Final = re.compile(rb"listening on (http://\S+)\s")
_LOADED: Final = re.compile(rb"model loaded")


@asynccontextmanager
async def own_server(arguments: Sequence[str]) -> AsyncIterator[tuple[str, int]]:
    """Run `trio-runner serve` with these arguments on a free port. Yields its URL and the id of its process.

    The server runs in a session of its own, so that Ctrl-C reaches only us. If we are killed, it ends by itself within
    two seconds. Raises `Unavailable` if the server ends before it has loaded the model.
    """
    options = ["--port", "0", "--drain-timeout", "0", "--parent-pid", str(os.getpid())]
    command = [sys.executable, "-m", "trio_runner", "serve", *options, *arguments]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stderr is not None
        log = _Log(process.stderr)
        url = (await log.said(_LISTENING))[1].decode()
        await log.said(_LOADED)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log.swallow)
            yield url, process.pid
            nursery.cancel_scope.cancel()
    finally:
        await _end(process)


@asynccontextmanager
async def another_server(arguments: Sequence[str], dialect: DialectName, slots: int | None) -> AsyncIterator[Server]:
    """The same, as a server that can be sent requests. Nobody has asked it for anything yet."""
    async with own_server(arguments) as (url, pid):
        yield await meet(url, dialect, slots=slots, pid=pid)


class _Log:
    """The log of a child. It must be read, or the child blocks when the pipe is full."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._text = b""

    async def said(self, pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        """Wait for text that matches `pattern`. Raises `Unavailable`, with the last line, if the child ends before."""
        while not (found := pattern.search(self._text)):
            data = await self._stream.receive_some()
            if not data:
                lines = self._text.decode(errors="replace").splitlines()
                raise Unavailable("the server did not start: " + (lines[-1] if lines else "it logged nothing"))
            self._text += data
        return found

    async def swallow(self) -> None:
        """Read the rest and drop it."""
        async for _ in self._stream:
            pass


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        process.terminate()
        with trio.move_on_after(KILL_SECONDS):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        if process.stderr is not None:
            await process.stderr.aclose()
