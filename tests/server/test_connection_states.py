"""What a connection is doing: a closed one stays closed, and one that serves is not closed for another."""

from __future__ import annotations

import contextlib
import math
import socket
from typing import Any

import pytest
import trio
import trio.testing

from tests.server.client import Client, post, request, serving
from tests.server.fake_engine import FakeEngine, endless
from trio_runner.server.asgi import Application, Receive, Send, send_answer
from trio_runner.server.connection import MAKES_ROOM, RECEIVE_BYTES, Connection, Service, State
from trio_runner.server.http1 import EVENTS_AT_ONCE, MAX_WAITING_BYTES, Http1
from trio_runner.server.problems import Answer

HEALTH = request("GET", "/health")
CHUNKED = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


def connection_of(app: Application) -> tuple[Connection, socket.socket]:
    """A connection that serves `app`, and the socket of its client."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return Connection(ours, Service(app, math.inf, math.inf)), theirs


async def answer_at_once(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    await send_answer(send, Answer(200, {}, b"x"))


# -- Closed connections stay closed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_events", range(EVENTS_AT_ONCE - 3, EVENTS_AT_ONCE + 4))
async def test_an_answer_nobody_takes_closes_for_good(n_events: int, caplog: pytest.LogCaptureFixture) -> None:
    """The answer fails while the task that reads gives others their turn, in the middle of the body or at its end."""
    connection, theirs = connection_of(answer_at_once)
    theirs.sendall(CHUNKED + b"1\r\nx\r\n" * (n_events - 2) + b"0\r\n\r\n")
    theirs.close()
    with trio.fail_after(2):
        await connection.run()
    assert connection.state is State.CLOSED
    assert not caplog.records


async def test_no_request_begins_on_a_closed_connection(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    async def answer_nobody(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        calls.append(scope["path"])
        theirs.close()
        await answer_at_once(scope, receive, send)

    connection, theirs = connection_of(answer_nobody)
    theirs.sendall(HEALTH + request("GET", "/again"))
    with trio.fail_after(2):
        await connection.run()
    assert calls == ["/health"]
    assert connection.state is State.CLOSED
    assert not caplog.records


async def test_resets_in_the_middle_of_a_refused_upload_harm_nobody() -> None:
    async with serving(FakeEngine()) as server:
        for n_chunks in range(EVENTS_AT_ONCE - 6, EVENTS_AT_ONCE + 2):
            for _ in range(3):
                client = await server.connect()
                await client.stream.send_all(
                    CHUNKED.replace(b"localhost", b"evil") + b"1\r\nx\r\n" * n_chunks + b"0\r\n\r\n"
                )
                client.reset()
            await trio.testing.wait_all_tasks_blocked(0.001)


async def test_a_connection_that_fails_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(FakeEngine()) as server:
        client = await server.connect()
        assert (await client.ask(HEALTH)).status == 200

        async def fail(self: Connection) -> None:
            self.close()
            raise RuntimeError("bang")

        with monkeypatch.context() as patch:
            patch.setattr(Connection, "run", fail)
            assert await (await server.connect()).closed()
        assert (await client.ask(HEALTH)).status == 200
    assert "bang" in caplog.text


# -- What waits is bounded --------------------------------------------------------------------------------------------


async def test_what_waits_behind_an_answer_is_taken_before_more_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body in chunks of one byte comes faster than it can be taken apart."""
    most = 0
    receive_data = Http1.receive

    async def measure(self: Http1, data: bytes) -> None:
        nonlocal most
        most = max(most, len(self._h11.trailing_data[0]) + len(data))
        await receive_data(self, data)

    async def answer_late(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["path"] == "/health":
            await trio.sleep(0.01)
            await answer_at_once(scope, receive, send)
        else:
            while (await receive())["type"] != "http.disconnect":
                pass

    async def send_without_end() -> None:
        await client.send_all(HEALTH + CHUNKED + b"1\r\nx\r\n" * 9000)
        await trio.sleep(0.02)
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await client.send_all(b"1\r\nx\r\n" * 10_000)

    monkeypatch.setattr(Http1, "receive", measure)
    connection, theirs = connection_of(answer_late)
    client = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    with trio.move_on_after(0.4):
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(send_without_end)
            await connection.run()
    assert 0 < most <= MAX_WAITING_BYTES + RECEIVE_BYTES


# -- Which connections make room --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behind", "state"),
    [(b"", State.IDLE), (HEALTH[:9], State.IN_HEAD), (HEALTH, State.IDLE), (HEALTH + HEALTH[:9], State.IN_HEAD)],
)
async def test_a_request_that_waits_behind_an_answer_counts_as_served(behind: bytes, state: State) -> None:
    """Just after the first answer what waits may be a whole request. `state` is what follows all answers."""
    states: list[State] = []
    may_end = trio.Event()

    async def look(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        is_first = not states
        await answer_at_once(scope, receive, send)
        if is_first:
            states.append(connection.state)
            await may_end.wait()

    connection, theirs = connection_of(look)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        theirs.sendall(HEALTH + behind)
        await trio.testing.wait_all_tasks_blocked(0.01)
        states.append(connection.state)
        may_end.set()
        theirs.close()
    assert states == [State.SERVING if behind else State.IDLE, state]
    assert State.SERVING not in MAKES_ROOM


async def test_half_a_head_behind_an_answer_has_the_deadline_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_runner.server.connection.HEAD_SECONDS", 0.1)
    async with serving(FakeEngine()) as server:
        client = await server.connect()
        assert (await client.ask(HEALTH + HEALTH[:9])).status == 200
        with trio.fail_after(1):
            assert await client.closed()


async def unread(client: Client, raw: bytes) -> None:
    """Ask without reading until the server can write no more."""
    client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with trio.move_on_after(0.1):
        while True:
            await client.stream.send_all(raw * 50)
            await trio.testing.wait_all_tasks_blocked()


async def test_connections_with_complete_answers_that_nobody_reads_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not at once, and not one whose answer still grows: its client may be a slow one."""
    monkeypatch.setattr("trio_runner.server.connection.UNREAD_SECONDS", 3600)
    engine = FakeEngine()
    async with serving(engine, max_connections=3, api_key="secret") as server:
        slow = await server.connect()
        slow.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await slow.stream.send_all(post("/completion", {"prompt": "x"}, "Authorization: Bearer secret"))
        generation = await engine.asked()
        endless(generation)
        stuck = [await server.connect() for _ in range(2)]
        async with trio.open_nursery() as nursery:
            for client in stuck:
                nursery.start_soon(unread, client, request("GET", "/props"))
        assert (await server.ask(HEALTH)).status == 503
        monkeypatch.setattr("trio_runner.server.connection.UNREAD_SECONDS", 0)
        with trio.fail_after(2):
            while (await server.ask(HEALTH)).status != 200:
                pass
        newcomers = [await server.connect() for _ in range(2)]
        for client in newcomers:
            assert (await client.ask(request("GET", "/props"))).status == 401
        assert not generation.closed.is_set()
