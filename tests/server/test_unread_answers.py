"""A client that does not read its answers is noticed when it leaves, and holds nothing after that."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import trio
import trio.testing

from tests.server.client import Client, Leave, fin, half_close, request
from tests.server.fake_engine import FakeEngine
from trio_runner.interface import EngineInterface
from trio_runner.server import create_app
from trio_runner.server.access import Access
from trio_runner.server.asgi import Application, Receive, Send, send_answer
from trio_runner.server.connection import Connection, Service
from trio_runner.server.http1 import Http1
from trio_runner.server.inbox import Inbox
from trio_runner.server.problems import Answer

CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 200
UPLOAD = b"POST /completion HTTP/1.1\r\nHost: localhost\r\n" + CHUNKS
REFUSED = {
    "no API key": request("GET", "/props"),
    "another Host": request("GET", "/health", host="evil.example"),
}


@contextlib.asynccontextmanager
async def connected(app: Application) -> AsyncIterator[Client]:
    """A client of one connection that waits for ever for its reader; the connection must end with the client. The
    sockets are a pair, which holds the same number of bytes on every run."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    with theirs:
        client = Client(trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Connection(ours, Service(app, math.inf, math.inf)).run)
            yield client
            with trio.fail_after(2):
                while nursery.child_tasks:  # noqa: ASYNC110
                    await trio.sleep(0.001)


def guarded() -> Application:
    app = create_app(cast(EngineInterface, FakeEngine()), access=Access(api_key="secret"))
    return cast(Application, app)


def n_waiting_writes() -> int:
    """How many tasks wait until the other side takes what they write."""
    return int(getattr(trio.lowlevel.current_statistics().io_statistics, "tasks_waiting_write", 0))


async def n_answers_that_fit(raw: bytes) -> int:
    """How many answers to `raw` a connection holds when nobody reads them."""
    n_asked = 0
    async with connected(guarded()) as client:
        while not n_waiting_writes():
            await client.stream.send_all(raw)
            n_asked += 1
            await trio.testing.wait_all_tasks_blocked(0.001)
        await client.stream.aclose()
    return n_asked - 1


@pytest.mark.parametrize("leave", [fin, half_close])
@pytest.mark.parametrize("why", REFUSED)
async def test_a_refused_upload_ends_with_its_connection(why: str, leave: Leave) -> None:
    """The buffers are so full that the refusal of the upload waits, while the body of the upload keeps coming."""
    n_fit = await n_answers_that_fit(REFUSED[why])
    for n_answers in range(n_fit - 2, n_fit + 2):
        async with connected(guarded()) as client:
            for _ in range(n_answers):
                await client.stream.send_all(REFUSED[why])
                await trio.testing.wait_all_tasks_blocked()
            await client.stream.send_all(UPLOAD)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await leave(client)


@pytest.mark.parametrize("leave", [fin, half_close])
@pytest.mark.parametrize("n_bytes", [10, 1_000_000])
async def test_an_application_that_never_reads_does_not_hide_a_disconnect(n_bytes: int, leave: Leave) -> None:
    """It may wait for the client to take its answer, or have ended."""
    calls = []

    async def never_read(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        calls.append(scope)
        await send_answer(send, Answer(200, {}, b"x" * n_bytes))

    async with connected(never_read) as client:
        await client.stream.send_all(UPLOAD)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await client.stream.send_all(b"1\r\nx\r\n" * 200)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await leave(client)
    assert len(calls) == 1


async def test_an_application_that_waits_reads_all_that_has_come() -> None:
    may_read = trio.Event()
    messages: list[dict[str, Any]] = []

    async def read_later(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await may_read.wait()
        while True:
            messages.append(await receive())
            if not messages[-1].get("more_body", False):
                break
        await send_answer(send, Answer(200, {}, b"read"))
        messages.append(await receive())

    async with connected(read_later) as client:
        await client.stream.send_all(UPLOAD)
        await trio.testing.wait_all_tasks_blocked(0.01)
        may_read.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        await client.stream.send_all(b"0\r\n\r\n")
        assert (await client.answer()).body == b"read"
        await client.stream.aclose()
    assert [message["type"] for message in messages] == ["http.request"] * 2 + ["http.disconnect"]
    assert [message.get("body") for message in messages] == [b"x" * 200, b"", None]


async def test_a_body_that_no_application_reads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_runner.server.http1.MAX_UNREAD_BYTES", 10_000)
    monkeypatch.setattr("trio_runner.server.connection.LINGER_SECONDS", 0.01)
    gone = trio.Event()
    disconnect = Http1.disconnect

    async def note(self: Http1) -> None:
        gone.set()
        await disconnect(self)

    async def never_read(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await gone.wait()

    monkeypatch.setattr(Http1, "disconnect", note)
    async with connected(never_read) as client:
        await client.stream.send_all(UPLOAD)
        with trio.fail_after(2), contextlib.suppress(trio.BrokenResourceError):
            while not gone.is_set():
                await client.stream.send_all(b"400\r\n" + b"x" * 1024 + b"\r\n")
                await trio.testing.wait_all_tasks_blocked(0.001)


async def test_what_comes_of_a_body_after_its_answer_has_begun_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    n_kept = 0
    put = Inbox.put

    async def count(self: Inbox, message: dict[str, Any]) -> None:
        nonlocal n_kept
        n_kept += len(message.get("body", b""))
        await put(self, message)

    async def never_read(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await send_answer(send, Answer(200, {}, b"x" * 1_000_000))

    monkeypatch.setattr(Inbox, "put", count)
    async with connected(never_read) as client:
        await client.stream.send_all(UPLOAD)
        await trio.testing.wait_all_tasks_blocked(0.01)
        n_before = n_kept
        for _ in range(100):
            await client.stream.send_all(b"400\r\n" + b"x" * 1024 + b"\r\n")
        await trio.testing.wait_all_tasks_blocked(0.01)
        await client.stream.aclose()
    assert n_kept == n_before <= 200
