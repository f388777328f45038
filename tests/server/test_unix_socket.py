"""Serving on a Unix socket: who can reach it, and what becomes of its file."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from tests.server.client import DEADLINE, WAYS, Client, Leave, post, request
from tests.server.fake_engine import DONE, FakeEngine
from trio_runner.interface import EngineInterface
from trio_runner.server import serve, unix_socket
from trio_runner.server.listener import open_listeners
from trio_runner.server.unix_socket import listening_at


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@asynccontextmanager
async def serving_at(path: Path, engine: FakeEngine, **options: Any) -> AsyncIterator[list[tuple[str, int]]]:
    """A server at `path`, and on a port if `options` say so; its addresses."""
    shutdown = trio.Event()
    options = {"port": None, "drain_timeout": 0, **options}
    run = partial(serve, cast(EngineInterface, engine), socket_path=path, shutdown=shutdown, **options)
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            yield await nursery.start(run)
            shutdown.set()


async def connect(path: Path) -> Client:
    return Client(await trio.open_unix_socket(path))


def is_there(path: Path) -> bool:
    return os.path.lexists(path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


async def test_requests_are_served_and_the_file_is_private(path: Path) -> None:
    engine = FakeEngine()
    async with serving_at(path, engine) as addresses:
        assert addresses == []
        assert mode(path) == 0o600
        client = await connect(path)
        async with client.stream:
            for _ in range(2):
                assert (await client.ask(request("GET", "/"))).body == b"Ollama is running"
            await client.stream.send_all(post("/completion", {"prompt": "x"}))
            generation = await engine.asked()
            generation.say("a" * 100_000, DONE)
            assert (await client.answer()).text == "a" * 100_000
    assert not is_there(path)


@pytest.mark.parametrize("leave", WAYS)
async def test_a_client_that_disconnects_is_noticed(path: Path, leave: Leave) -> None:
    engine = FakeEngine()
    async with serving_at(path, engine):
        client = await connect(path)
        async with client.stream:
            await client.stream.send_all(post("/completion", {"prompt": "x"}))
            generation = await engine.asked()
            await client.head()
            await leave(client)
            await generation.closed.wait()


async def test_the_guards_of_host_are_for_addresses(path: Path) -> None:
    """A browser cannot be led to a file. Whoever can is let in whatever name the client made up for it."""
    async with serving_at(path, FakeEngine(), port=0, api_key="k") as [(host, port)]:
        by_file, by_address = await connect(path), Client(await trio.open_tcp_stream(host, port))
        async with by_file.stream, by_address.stream:
            for name in ("localhost", "docker", "%2Frun%2Fs", "2f72756e:0"):
                asked = request("GET", "/health", host=name)
                assert (await by_file.ask(asked)).status == 200
                assert (await by_address.ask(asked)).status == (200 if name == "localhost" else 403)
            assert (await by_file.ask(request("GET", "/health", b"", "Origin: http://a"))).status == 403
            assert (await by_file.ask(post("/tokenize", {"content": "a"}))).status == 401
            assert (await by_file.ask(post("/tokenize", {"content": "a"}, "X-Api-Key: k"))).status == 200


async def test_a_server_listens_somewhere() -> None:
    with pytest.raises(ValueError, match="give a port or the path of a socket"):
        await serve(cast(EngineInterface, FakeEngine()), port=None)


def leave_file(path: Path) -> None:
    """What a server leaves that is killed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()


def test_the_file_of_a_dead_server_is_replaced(path: Path) -> None:
    leave_file(path)
    path.chmod(0o777)
    with listening_at(path) as listener, socket.socket(socket.AF_UNIX) as client:
        assert mode(path) == 0o600
        client.connect(str(path))
        listener.accept()[0].close()
    assert not path.exists()


def test_a_living_server_is_left_alone(path: Path) -> None:
    with listening_at(path) as listener:
        for _ in range(2):
            with pytest.raises(OSError, match=f"^.*cannot listen on {path}: another server listens there$"):
                listening_at(path).__enter__()
            listener.accept()[0].close()
        # As many clients as the kernel keeps wait there.
        listener.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        try:
            for sock in waiting:
                sock.setblocking(False)
                try:
                    sock.connect(str(path))
                except BlockingIOError:
                    break
            else:
                pytest.fail("the queue is not full")
            with pytest.raises(OSError, match="another server listens there"):
                listening_at(path).__enter__()
        finally:
            for sock in waiting:
                sock.close()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_never_removed(path: Path, kind: str) -> None:
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(path.with_name("nowhere"))
    with pytest.raises(OSError, match="there is a file that is no socket"):
        listening_at(path).__enter__()
    assert os.path.lexists(path)


def test_an_impossible_path_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no" / "s", "No such file"), (tmp_path / ("x" * 200), "path too long")):
        with pytest.raises(OSError, match=f"cannot listen on {path}: .*{reason}"):
            listening_at(path).__enter__()


def test_the_file_of_another_server_is_not_removed(path: Path) -> None:
    with listening_at(path):
        path.unlink()
        leave_file(path)
    assert path.exists()


def test_the_socket_is_never_open_to_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even between its creation and the next line of code."""
    modes: list[int] = []

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            modes.append(mode(path))

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        with listening_at(path):
            assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_of_servers_that_start_at_once_one_wins(path: Path) -> None:
    leave_file(path)
    start, outcomes, all_know = threading.Barrier(8), list[str](), threading.Event()

    def note(outcome: str) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 8:
            all_know.set()

    def run() -> None:
        start.wait()
        try:
            with listening_at(path):
                note("listens")
                all_know.wait(DEADLINE)
        except OSError as error:
            note(str(error.strerror))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [*[f"cannot listen on {path}: another server listens there"] * 7, "listens"]


def test_a_directory_that_is_kept_locked_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix_socket, "LOCK_SECONDS", 0)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=f"cannot listen on {path}: another program keeps {path.parent} locked"):
            listening_at(path).__enter__()
    finally:
        os.close(descriptor)


async def test_nothing_is_left_if_the_port_is_taken(path: Path) -> None:
    [taken] = await open_listeners("127.0.0.1", 0)
    with taken, pytest.raises(OSError, match="cannot listen on"):
        await serve(cast(EngineInterface, FakeEngine()), port=taken.getsockname()[1], socket_path=path)
    assert not is_there(path)
