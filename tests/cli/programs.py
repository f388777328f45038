"""The program in a process of its own, over a toy model or a real file, with a deadline on everything."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType

import trio

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60
"""Seconds that a program may take. Generous, because the machines that run tests are busy."""

SLOW = {"TOY_ENDLESS": "1", "TOY_STEP": "0.01"}
"""Environment of a toy that never ends a text, and takes its time."""

TOY = """
import os, sys, time
from dataclasses import replace
import trio_runner.front_door
from trio_runner import testing
from trio_runner.errors import LoadError, NativeError

def on_load(progress, cancelled):
    progress(0.25)
    if "TOY_LOAD" in os.environ:
        print("the toy is loading", file=sys.stderr, flush=True)
    while os.environ.get("TOY_LOAD") == "never" and not cancelled():
        time.sleep(0.01)
    if os.environ.get("TOY_LOAD") == "hang":
        import trio
        trio.from_thread.run_sync(hang)
    if os.environ.get("TOY_LOAD") == "bad":
        raise LoadError("this is no model\\nat all", path="toy.gguf")

def hang():
    print("the event loop hangs", file=sys.stderr, flush=True)
    time.sleep(3600)

def on_decode(batch):
    time.sleep(float(os.environ.get("TOY_STEP", "0")))
    if os.environ.get("TOY_DIES") and batch.kind.embedding:
        raise NativeError("trio_step", -3, "the toy broke\\nin two")

if os.environ.get("TOY_ENDLESS"):
    testing.context.toy_next = lambda items, cache_key, **options: ord("a") + len(items) % 26

def loader(model):
    projector = testing.ToyProjector() if model.projector is not None else None
    toy = testing.ToyLoader({"ranks": "TOY_RANKS" in os.environ}, on_load, on_decode, projector, model.adapters)

    def load(config, **options):
        loaded = toy(config, **options)
        loaded.model.info = replace(loaded.model.info, chat_template=os.environ.get("TOY_TEMPLATE"))
        return loaded

    return load

trio_runner.front_door._loader = loader

sys.executable = os.environ.get("TOY_PYTHON", sys.executable)

from trio_runner.cli.main import main
sys.exit(main())
"""


class Program:
    """A running trio-runner."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.log = ""
        self.output = b""

    async def logged(self, text: str) -> str:
        """Wait for a line on stderr with `text` in it. Returns the rest of the line."""
        assert self.process.stderr is not None
        while True:
            _, found, rest = self.log.partition(text)
            if found and "\n" in rest:
                return rest.partition("\n")[0]
            data = await self.process.stderr.receive_some()
            assert data, f"ended without saying {text!r}:\n{self.log}"
            self.log += data.decode()

    async def listening(self) -> int:
        """The port it serves on."""
        return int((await self.logged("listening on http://127.0.0.1:")).strip('"'))

    async def printed(self, n_bytes: int) -> None:
        """Wait until that many bytes of stdout have arrived."""
        assert self.process.stdout is not None
        while len(self.output) < n_bytes:
            data = await self.process.stdout.receive_some()
            assert data, f"ended after {self.output!r}:\n{self.log}"
            self.output += data

    async def ended(self) -> int:
        """Read both outputs to their ends. Returns the exit code."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        async with trio.open_nursery() as nursery:

            async def read_output() -> None:
                async for data in self.process.stdout or ():  # type: ignore[union-attr]
                    self.output += data

            nursery.start_soon(read_output)
            errors = b"".join([data async for data in self.process.stderr])
        self.log += errors.decode()
        return await self.process.wait()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@asynccontextmanager
async def program(
    *arguments: str, toy: bool = True, stdin: bytes = b"", environment: Mapping[str, str] = MappingProxyType({})
) -> AsyncIterator[Program]:
    """Start trio-runner. Kill it at the end of the block if it still runs."""
    command = [sys.executable, *(["-c", TOY] if toy else ["-m", "trio_runner"]), *arguments]
    own = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default", **environment}
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **own}
    )
    try:
        with trio.fail_after(DEADLINE):
            assert process.stdin is not None
            await process.stdin.send_all(stdin)
            await process.stdin.aclose()
            yield Program(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    await stream.aclose()


async def request(port: int, path: str, body: object = None) -> trio.SocketStream:
    """Send a request. Returns the connection, which the server closes after the response."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    await stream.send_all(
        f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    )
    return stream


async def read_all(stream: trio.SocketStream) -> str:
    """The rest of the response, head and chunk framing included."""
    async with stream:
        return b"".join([data async for data in stream]).decode()


async def exchange(port: int, path: str, body: object = None) -> str:
    return await read_all(await request(port, path, body))


def texts(response: str) -> str:
    """The text of all lines of a /completion response."""
    return "".join(json.loads(line)["content"] for line in re.findall(r"^\{.*\}$", response, re.MULTILINE))
