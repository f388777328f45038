"""A server that an app starts ends with it, even if the app is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.cli.programs import DEADLINE, ROOT, SLOW, TOY, program
from trio_runner.cli import app_watch
from trio_runner.cli.app_watch import identity, waiter_for_process

APP = """
import os, subprocess, sys, time
arguments = [argument.replace("APP_PID", str(os.getpid())) for argument in sys.argv[1:]]
server = subprocess.Popen(arguments, stdin=subprocess.PIPE)
print(server.pid, flush=True)
time.sleep(3600)
"""
"""An app that starts a server with these arguments, says its process id, and holds the pipe to its stdin."""

BOTH_WAYS = [["--parent-pid", "APP_PID"], ["--exit-with-stdin"]]


def start_python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)


class App:
    """A running app and its server."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.log = ""

    async def logged(self, text: str) -> None:
        """Wait until the server has logged `text`."""
        while text not in self.log:
            assert self.process.stderr is not None
            data = await self.process.stderr.receive_some()
            assert data, f"ended without saying {text!r}:\n{self.log}"
            self.log += data.decode()

    async def server_ended(self) -> None:
        """Wait until nobody holds stderr any more: neither the app nor the server."""
        assert self.process.stderr is not None
        async for data in self.process.stderr:
            self.log += data.decode()


@asynccontextmanager
async def app(*arguments: str, environment: Mapping[str, str]) -> AsyncIterator[App]:
    """Run an app with a server that has these arguments. Kill both at the end of the block."""
    command = [sys.executable, "-c", APP, sys.executable, "-c", TOY, "serve", "--port", "0", *arguments]
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    server = 0
    try:
        with trio.fail_after(DEADLINE):
            server = int(await process.stdout.receive_some())
            yield App(process)
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            with suppress(ProcessLookupError):
                os.kill(server or process.pid, signal.SIGKILL)
            await process.wait()
            await process.stdout.aclose()
            await process.stderr.aclose()


@pytest.mark.parametrize("way", BOTH_WAYS, ids=["parent-pid", "stdin"])
@pytest.mark.parametrize("state", ["loading", "ready"])
async def test_the_server_ends_when_its_app_is_killed(model: str, way: list[str], state: str) -> None:
    environment = {"TOY_LOAD": "never"} if state == "loading" else SLOW
    async with app("-m", model, *way, environment=environment) as running:
        await running.logged("the toy is loading" if state == "loading" else "model loaded")
        running.process.kill()
        await running.server_ended()
        assert "stopping at once" in running.log
        assert "Traceback" not in running.log


@pytest.mark.parametrize("way", BOTH_WAYS, ids=["parent-pid", "stdin"])
async def test_the_server_ends_even_if_its_event_loop_hangs(model: str, way: list[str]) -> None:
    async with app("-m", model, *way, environment={"TOY_LOAD": "hang"}) as running:
        await running.logged("the event loop hangs")
        running.process.kill()
        await running.server_ended()


async def test_any_process_can_be_the_app(model: str) -> None:
    """Not only the one that started the server. Here it is killed, and nobody has asked for its exit code yet."""
    other = start_python("input()")
    try:
        arguments = ["serve", "--model", model, "--port", "0", "--parent-pid", str(other.pid)]
        async with program(*arguments) as runner:
            await runner.listening()
            other.kill()
            assert await runner.ended() == 0
            assert f"process {other.pid} is gone: stopping at once" in runner.log
            assert "Traceback" not in runner.log
    finally:
        other.communicate()


async def test_an_app_that_is_gone_already_ends_the_server_at_once(model: str) -> None:
    gone = start_python("")
    gone.communicate()
    async with program("serve", "--model", model, "--port", "0", "--parent-pid", str(gone.pid)) as runner:
        assert await runner.ended() == 0
        assert f"process {gone.pid} is gone: stopping at once" in runner.log
        assert "Traceback" not in runner.log


async def test_stdin_that_has_ended_ends_the_server_at_once(model: str) -> None:
    async with program("serve", "--model", model, "--port", "0", "--exit-with-stdin", stdin=b"ignored") as runner:
        assert await runner.ended() == 0
        assert "stdin has ended: stopping at once" in runner.log
        assert "Traceback" not in runner.log


# ---- waiting for a process -------------------------------------------------------------------------------------------


@pytest.fixture(params=["told", "polled"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the system tells when a process ends, or has to be asked."""
    if request.param == "polled":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
        monkeypatch.setattr(app_watch, "POLL_SECONDS", 0.01)
    return str(request.param)


async def returned(wait: Callable[[], object]) -> None:
    with trio.fail_after(DEADLINE):
        await trio.to_thread.run_sync(wait, abandon_on_cancel=True)


async def test_a_process_is_waited_for(how: str) -> None:
    process = start_python("input()")
    try:
        wait = waiter_for_process(process.pid)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(returned, wait)
            assert identity(process.pid) is not None
            process.kill()
        assert process.returncode is None, "it has not been asked for its exit code"
        await returned(waiter_for_process(process.pid))
    finally:
        process.communicate()
    await returned(wait)
    await returned(waiter_for_process(process.pid))


def test_a_process_is_not_taken_for_another_with_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.setattr(app_watch, "POLL_SECONDS", 0)
    identities = iter([b"1", b"1", b"1", b"2"])
    monkeypatch.setattr(app_watch, "identity", lambda pid: next(identities))
    waiter_for_process(os.getpid())()
    assert next(identities, None) is None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")
def test_a_process_is_known_by_when_it_began() -> None:
    mine = identity(os.getpid())
    assert mine
    assert identity(os.getpid()) == mine
    child = start_python("input()")
    try:
        assert identity(child.pid) not in (None, mine)
    finally:
        child.kill()
        child.communicate()
    assert identity(child.pid) is None
