"""One request on one socket: streams, refusals, and ways to disconnect."""

from __future__ import annotations

import time

import pytest
import trio

from tests.bench.fake_server import fake_server, listening
from trio_runner.bench.client import Connection, CutShort, Ending, Refused, Stream, fetch, requesting
from trio_runner.bench.dialects import DialectName, Request, Runner

REQUEST = Request(prompt="one two three", max_tokens=5)
TEXT = " 3:0 3:1 3:2 3:3 3:4"


@pytest.mark.parametrize("dialect", ["runner", "llama", "openai"])
async def test_a_stream_is_read_with_its_moments(dialect: DialectName) -> None:
    async with fake_server(dialect) as (_, server):
        stream = await server.complete(REQUEST)
    assert stream.text == TEXT
    assert len(stream.moments) == 5
    assert stream.sent < stream.moments[0] <= stream.moments[-1] < time.perf_counter()
    assert stream.moments == sorted(stream.moments)
    assert stream.total is not None
    assert (stream.total.prompt_tokens, stream.total.decoded_tokens, stream.total.completion_tokens) == (3, 3, 5)


@pytest.mark.parametrize("dialect", ["llama", "openai"])
async def test_an_answer_in_one_piece_is_read(dialect: DialectName) -> None:
    async with fake_server(dialect) as (_, server):
        stream = await server.complete(Request(prompt="one two three", max_tokens=5, stream=False))
    assert stream.pieces == [TEXT]
    assert stream.tokens_per_piece == 5


@pytest.mark.parametrize("dialect", ["runner", "llama", "openai"])
async def test_alternatives_are_read(dialect: DialectName) -> None:
    async with fake_server(dialect) as (_, server):
        stream = await server.complete(Request(prompt="one", max_tokens=2, n_top=2))
    assert [(choice.piece, choice.top) for choice in stream.choices] == [
        (b" 1:0", (-0.1, -1.0)),
        (b" 1:1", (-0.1, -1.0)),
    ]


async def test_one_connection_serves_many_requests() -> None:
    async with fake_server("runner") as (_, server):
        with await Connection.open(server.address) as connection:
            assert (await fetch(connection, "GET", "/health"))["status"] == "ok"
            with pytest.raises(Refused) as caught:
                await fetch(connection, "GET", "/nothing")
            assert caught.value.status == 404
            stream = Stream(connection, Runner(), REQUEST)
            await stream.send()
            assert (await stream.finish()).text == TEXT
            assert (await fetch(connection, "GET", "/health"))["status"] == "ok"


async def test_a_full_server_refuses() -> None:
    async with fake_server("runner", slots=1, max_queue=0) as (_, server):
        with pytest.raises(Refused) as caught:
            await server.complete(REQUEST)
    assert caught.value.status == 503
    assert caught.value.retry_after == "1"


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("n_read", [0, 1, 8])
async def test_a_server_sees_a_fin_or_a_reset(how: Ending, n_read: int) -> None:
    seen = trio.Event()
    ends: list[object] = []

    async def handle(stream: trio.SocketStream) -> None:
        try:
            await stream.receive_some()
            lines = b"".join(b'{"content":"%d"}\n' % i for i in range(8))
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + lines)
            ends.append(await stream.receive_some())
        except trio.BrokenResourceError as error:
            ends.append(type(error.__cause__))
        seen.set()

    async with listening(handle) as address:
        with await Connection.open(address) as connection:
            stream = Stream(connection, Runner(), REQUEST)
            await stream.send()
            await stream.read(n_read)
            if not n_read:
                await trio.lowlevel.wait_readable(connection)  # unread data must not turn a FIN into a RST
            stream.disconnect(how)
            await seen.wait()
    assert ends == [b"" if how == "fin" else ConnectionResetError]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "ConnectionClosed"),
        (b"nonsense\r\n\r\n", "."),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"content":"a"}\n', "."),
        (b'HTTP/1.1 200 OK\r\n\r\n{"error":"broken"}\n', "broken"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "the answer is empty"),
    ],
)
async def test_malformed_answers_are_refused(answer: bytes, message: str) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(answer)

    async with listening(handle) as address, requesting(address, Runner(), REQUEST) as stream:
        with pytest.raises(CutShort, match=message):
            await stream.finish()


async def test_a_server_notices_a_client_that_does_not_read() -> None:
    sent: list[int] = []
    stuck = trio.Event()

    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        stream.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 4096)
        with trio.move_on_after(0.2):
            while True:
                await stream.send_all(b"x" * 1024)
                sent.append(1024)
        stuck.set()

    async with listening(handle) as address, requesting(address, Runner(), REQUEST, receive_buffer=4096):
        await stuck.wait()
    assert sum(sent) < 1 << 17
