"""What happens on one connection reaches no other."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import sys

import pytest
import trio
import trio.testing

from tests.server.client import Client, Server, post, request, serving
from tests.server.fake_engine import DONE, FakeEngine, FakeGeneration, endless
from trio_runner.config import EngineConfig
from trio_runner.server.http1 import Http1

HEALTH = request("GET", "/health")
KEY = base64.b64encode(b"0123456789abcdef")


def upgrade(*more: bytes, trailing: bytes = b"", path: bytes = b"/health") -> bytes:
    head = b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" % path
    return head + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n" % KEY + b"".join(more) + b"\r\n" + trailing


def http2(headers: bytes) -> bytes:
    """HTTP/2 without a handshake: preface, SETTINGS, and a HEADERS frame with `headers` as they are."""
    frame = len(headers).to_bytes(3, "big") + b"\x01\x05" + (1).to_bytes(4, "big") + headers
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0" + frame


GET, HTTP = b"\x82", b"\x86"

ATTACKS = {
    "websocket, protocol not ASCII": (upgrade(b"Sec-WebSocket-Protocol: \xff\r\n"), 200),
    "websocket, extensions not ASCII": (upgrade(b"Sec-WebSocket-Extensions: \xff\r\n"), 200),
    "websocket and one more byte": (upgrade(trailing=b"x"), 200),
    "websocket and rubbish": (upgrade(trailing=os.urandom(64)), 200),
    "HTTP/2, path not ASCII": (http2(GET + HTTP + b"\x04\x02\xff\xfe\x41\x01a"), 505),
    "HTTP/2, method not ASCII": (http2(b"\x02\x02\xff\xfe" + HTTP + b"\x84\x41\x01a"), 505),
    "HTTP/2, extended CONNECT": (
        http2(b"\x02\x07CONNECT" + HTTP + b"\x84\x41\x01a\x00\x09:protocol\x09websocket"),
        505,
    ),
    "Host not ASCII": (b"GET /health HTTP/1.1\r\nHost: \xff\r\n\r\n", 403),
    "h2c upgrade": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        200,
    ),
    "CONNECT": (b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "Content-Length and Transfer-Encoding": (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"
        b'Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n{"content":"a"}\r\n0\r\n\r\n',
        400,
    ),
    "two Content-Lengths": (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        400,
    ),
    "negative Content-Length": (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
    "bad chunk": (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        400,
    ),
    "no such coding": (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        501,
    ),
    "target is a query": (b"GET ?x HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "target is half a URL": (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "target is another host": (b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "target is a star": (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "target not ASCII": (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "target with bad escapes": (b"GET /%zz%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: a\r\n\r\n", 400),
    "a megabyte of header": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n", 431),
    "HTTP/3.7": (b"GET /health HTTP/3.7\r\nHost: localhost\r\n\r\n", 505),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "folded header": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n", 200),
    "space before colon": (b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
    "NUL in a header": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: \0\r\n\r\n", 400),
    "TLS": (bytes.fromhex("16030100c8010000c40303") + b"\r\n" * 9 + b"\r\n\r\n", 400),
    "rubbish": (os.urandom(256).replace(b"\n", b"x") + b"\r\n\r\n", 400),
    "HEAD refused": (b"HEAD ?x HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "HEAD in lower case, which has a body": (b"head /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    "HEAD and more than was announced": (
        b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\nx",
        400,
    ),
    "HEAD with a bad chunk": (
        b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        400,
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
async def test_no_request_disturbs_another_client(name: str) -> None:
    raw, status = ATTACKS[name]
    engine = FakeEngine()
    async with serving(engine) as server:
        bystander, generation = await streaming(server, engine)
        answer = await (await server.connect()).ask(raw)
        assert answer.status == status
        if 400 <= status < 500 and not raw.startswith(b"HEAD"):
            assert answer.body.endswith(b"\n")
        generation.say("still here", DONE)
        assert await contents(bystander) == ["first", "still here", ""]
        assert len(engine.calls) == 1


async def streaming(server: Server, engine: FakeEngine) -> tuple[Client, FakeGeneration]:
    """A client in the middle of its answer."""
    client = await server.connect()
    await client.stream.send_all(post("/completion", {"prompt": "x"}))
    generation = await engine.asked()
    generation.say("first")
    await client.head()
    return client, generation


async def contents(client: Client) -> list[str]:
    """The texts of the answer whose head was read."""
    body = await client.chunks()
    return [json.loads(line)["content"] for line in body.splitlines()]


async def test_an_exception_in_the_protocol_ends_one_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    receive = Http1.receive

    async def fail_on_bang(self: Http1, data: bytes) -> None:
        if b"bang" in data:
            raise RuntimeError("bang")
        await receive(self, data)

    monkeypatch.setattr(Http1, "receive", fail_on_bang)
    engine = FakeEngine()
    async with serving(engine) as server:
        bystander, generation = await streaming(server, engine)
        assert await (await ending(server, b"bang")).closed()
        generation.say(DONE)
        assert await contents(bystander) == ["first", ""]
    assert "a connection failed" in caplog.text


async def ending(server: Server, raw: bytes) -> Client:
    client = await server.connect()
    await client.stream.send_all(raw)
    return client


async def test_an_exception_in_a_handler_is_answered_with_500(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.refusal = KeyError("secret")
    async with serving(engine) as server:
        client = await server.connect()
        answer = await client.ask(post("/completion", {"prompt": "x"}))
        assert (answer.status, answer.body) == (500, b"internal error\n")
        engine.refusal = None
        assert (await client.ask(post("/tokenize", {"content": "a"}))).status == 200
    assert "secret" in caplog.text


async def test_what_is_no_request_is_not_repeated_to_the_client() -> None:
    async with serving(FakeEngine()) as server:
        answer = await server.ask(b"GET /secret\xff HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (answer.status, answer.body) == (400, b"illegal request line\n")


async def test_keep_alive_serves_many_requests_on_one_connection() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        for _ in range(50):
            assert (await client.ask(request("GET", "/health"))).status == 200
            await client.stream.send_all(post("/completion", {"prompt": "x"}))
            (await engine.asked()).say("a", DONE)
            assert (await client.answer()).lines[0]["content"] == "a"


@pytest.mark.parametrize(
    "raw",
    [
        request("GET", "/health", b"", "Connection: close"),
        b"GET /health HTTP/1.0\r\n\r\n",
        b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n",
        request("GET", "/nowhere", b"", "Connection: close"),
    ],
)
async def test_a_request_for_close_closes_the_connection(raw: bytes) -> None:
    async with serving(FakeEngine()) as server:
        client = await server.connect()
        with trio.fail_after(1):
            answer = await client.ask(raw)
            assert answer.body in (b'{"status":"ok","progress":1}\n', b"404 page not found\n")
            assert await client.closed()


async def test_a_stream_to_http_1_0_ends_with_the_connection() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        body = b'{"prompt":"x"}'
        client = await ending(server, b"POST /completion HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        (await engine.asked()).say("a", DONE)
        assert [line["content"] for line in (await client.answer()).lines] == ["a", ""]


async def test_pipelined_requests_are_answered_in_order() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        requests = [post("/tokenize", {"content": "abcdefgh"[: i + 1]}) for i in range(8)]
        client = await ending(server, b"".join(requests))
        for i in range(8):
            assert len((await client.answer()).json["tokens"]) == i + 1
        for byte in b"".join(requests):
            await client.stream.send_all(bytes([byte]))
        for i in range(8):
            assert len((await client.answer()).json["tokens"]) == i + 1


async def test_the_bytes_that_wait_behind_a_request_are_bounded() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client, generation = await streaming(server, engine)
        with contextlib.suppress(trio.BrokenResourceError):
            await client.stream.send_all(request("POST", "/tokenize", b"x" * (1 << 20)))
        await generation.closed.wait()


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET /health HTTP/1.1\r\nHost: a\r\nX"])
async def test_a_head_that_never_ends_is_cut_off(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_runner.server.connection.HEAD_SECONDS", 0.1)
    async with serving(FakeEngine()) as server:
        client = await server.connect()
        if sent:
            await client.stream.send_all(sent)
        assert await client.closed()


async def test_a_head_that_trickles_in_is_cut_off_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_runner.server.connection.HEAD_SECONDS", 0.3)
    async with serving(FakeEngine()) as server:
        client = await ending(server, b"GET /health HTTP/1.1\r\n")

        async def trickle() -> None:
            while True:
                await client.stream.send_all(b"x")
                await trio.sleep(0.02)

        with trio.fail_after(2), pytest.raises(trio.BrokenResourceError):
            await trickle()


async def test_a_body_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_runner.server.app.BODY_TIMEOUT", 0.1)
    async with serving(FakeEngine()) as server:
        client = await ending(server, b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert (await client.answer()).status == 408
        assert await client.closed()


async def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["trio_runner.server.serve"], "KEEP_ALIVE_SECONDS", 0.1)
    async with serving(FakeEngine()) as server:
        client = await server.connect()
        assert (await client.ask(request("GET", "/health"))).status == 200
        with trio.fail_after(1):
            assert await client.closed()


async def test_a_client_that_uploads_can_read_its_refusal() -> None:
    """The answer comes before the body has ended. Closing at once would reset the connection and lose the answer."""
    async with serving(FakeEngine()) as server:
        for _ in range(10):
            client = await server.connect()
            with contextlib.suppress(trio.BrokenResourceError):
                await client.stream.send_all(request("POST", "/nowhere", b"x" * 300_000))
            assert (await client.answer()).status == 404


async def test_one_connection_too_many_is_answered_with_503() -> None:
    engine = FakeEngine()
    async with serving(engine, max_connections=3) as server:
        clients = [(await streaming(server, engine))[0] for _ in range(3)]
        for _ in range(3):
            answer = await server.ask(request("GET", "/health"))
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        clients.pop().stream.socket.close()
        with trio.fail_after(2):
            while (await server.ask(request("GET", "/health"))).status != 200:
                pass


async def test_idle_connections_make_room() -> None:
    """The connection that has been idle longest is closed first. One that serves a request, or has begun one, stays."""
    engine = FakeEngine()
    async with serving(engine, max_connections=5) as server:
        busy, generation = await streaming(server, engine)
        half = await ending(server, HEALTH[:10])
        idle = [await server.connect() for _ in range(3)]
        for client in (*idle, idle[0]):
            assert (await client.ask(HEALTH)).status == 200
        await trio.testing.wait_all_tasks_blocked()
        newcomer = await server.connect()
        assert (await newcomer.ask(HEALTH)).status == 200
        assert await idle[1].closed()
        assert (await server.ask(HEALTH)).status == 200
        assert await idle[2].closed()
        for client in (idle[0], newcomer):
            assert (await client.ask(HEALTH)).status == 200
        assert (await half.ask(HEALTH[10:])).status == 200
        generation.say(DONE)
        assert await contents(busy) == ["first", ""]


async def test_an_idle_connection_that_has_just_asked_stays() -> None:
    async with serving(FakeEngine(), max_connections=2) as server:
        for _ in range(10):  # which of the two the event loop looks at first is random
            idle = [await server.connect() for _ in range(2)]
            for client in idle:
                assert (await client.ask(HEALTH)).status == 200
            await trio.testing.wait_all_tasks_blocked()
            os.write(idle[0].stream.socket.fileno(), HEALTH)
            with socket.create_connection((server.host, server.port)):
                assert (await idle[0].answer()).status == 200
                assert await idle[1].closed()
            idle[0].stream.socket.close()
            with trio.fail_after(2):
                while (await server.ask(HEALTH)).status != 200:
                    pass


async def test_a_client_that_does_not_read_is_disconnected() -> None:
    engine = FakeEngine()
    engine.config = EngineConfig(stall_timeout=0.2)
    async with serving(engine) as server:
        stalled = await server.connect()
        stalled.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await stalled.stream.send_all(post("/completion", {"prompt": "x"}))
        generation = await engine.asked()
        endless(generation)
        await generation.closed.wait()
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await stalled.answer()


async def test_a_slow_reader_gets_everything() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await ending(server, post("/completion", {"prompt": "x"}))
        generation = await engine.asked()
        generation.say(*["x" * 50_000] * 100, DONE)
        await client.head()
        assert sum(map(len, await contents(client))) == 50_000 * 100


async def test_a_slow_client_that_reads_on_is_not_disconnected() -> None:
    """Reading one chunk takes it three times as long as it may leave the socket full."""
    engine = FakeEngine()
    engine.config = EngineConfig(stall_timeout=0.3)
    async with serving(engine) as server:
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((server.host, server.port))
            slow.sendall(post("/completion", {"prompt": "x"}, "Connection: close"))
            generation = await engine.asked()
            generation.say("x" * 300_000, DONE)
            slow.setblocking(False)
            n_read, started = 0, trio.current_time()
            while n_read < 300_000:
                await trio.lowlevel.wait_readable(slow)
                n_read += len(slow.recv(1 << 14))
                await trio.sleep(0.02)
            assert trio.current_time() - started > 3 * 0.3
