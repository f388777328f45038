"""Clients that open many connections and are rude on each: they lock nobody out, and leave nothing behind.

TRIO_RUNNER_RUDE_ROUNDS sets how many connections the long test makes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import trio
import trio.testing

from tests.server.client import Server, post, request, serving, until
from tests.server.fake_engine import DONE, FakeEngine, FakeGeneration, endless
from trio_runner.request import GenerateRequest
from trio_runner.server.connection import Connection
from trio_runner.server.exchange import Exchange
from trio_runner.server.http1 import Http1
from trio_runner.server.inbox import Inbox
from trio_runner.server.serve import MAX_CONNECTIONS

N_ROUNDS = int(os.environ.get("TRIO_RUNNER_RUDE_ROUNDS", "1000"))

HEALTH = request("GET", "/health")
COMPLETION = post("/completion", {"prompt": "x"})
HEAD = b"POST /completion HTTP/1.1\r\nHost: localhost\r\n"
BODY = b"Content-Length: 100\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"1\r\nx\r\n" * 200

# -- many connections at once -----------------------------------------------------------------------------------------

IDLE = {
    "nothing": b"",
    "a line break": b"\r\n",
    "half a head": HEAD,
    "a refused upload": request("POST", "/nowhere", b"") + CHUNKS,
    "a TLS handshake": bytes.fromhex("16030100c8010000c40303") + bytes(50),
}
"""What a client may send on a connection without asking for anything."""


@contextlib.asynccontextmanager
async def many_connections(server: Server, sent: bytes, n: int) -> AsyncIterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(n):
            sock = stack.enter_context(socket.create_connection((server.host, server.port)))
            with contextlib.suppress(OSError):  # the server may have closed it already, to make room
                sock.sendall(sent)
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.01)
        yield


@pytest.mark.parametrize("what", IDLE)
async def test_connections_that_ask_for_nothing_lock_nobody_out(what: str) -> None:
    engine = FakeEngine()
    async with serving(engine) as server, many_connections(server, IDLE[what], MAX_CONNECTIONS + 88):
        for _ in range(3):
            with trio.fail_after(1):
                assert (await server.ask(HEALTH)).status == 200
                client = await server.connect()
                await client.stream.send_all(COMPLETION)
                (await engine.asked()).say("x", DONE)
                assert (await client.answer()).text == "x"


async def test_connections_that_ask_for_nothing_do_not_cut_answers_off() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(COMPLETION)
        generation = await engine.asked()
        async with many_connections(server, b"", MAX_CONNECTIONS + 88):
            generation.say("x", DONE)
            assert (await client.answer()).text == "x"


# -- many connections one after the other -----------------------------------------------------------------------------

Rude: TypeAlias = Callable[[socket.socket, random.Random], None]


def send(*parts: bytes) -> Rude:
    return lambda sock, chance: sock.sendall(b"".join(parts))


def send_a_part_of_a_request(sock: socket.socket, chance: random.Random) -> None:
    raw = chance.choice([COMPLETION, HEAD + CHUNKED + CHUNKS, post("/tokenize", {"content": "x"})])
    sock.sendall(raw[: chance.randrange(len(raw))])


def send_rubbish(sock: socket.socket, chance: random.Random) -> None:
    sock.sendall(HEALTH * chance.randrange(2) + chance.randbytes(chance.randrange(1000)))


def upgrade(sock: socket.socket, chance: random.Random) -> None:
    sock.sendall(
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n" + chance.randbytes(20)
    )


RUDE: dict[str, Rude] = {
    "nothing": send(),
    "half a head": send(HEAD),
    "a head that is too long": send(HEAD, b"X: ", b"x" * 70_000),
    "a head without its body": send(HEAD, BODY),
    "half a body": send(HEAD, BODY, b"{"),
    "half a chunked body": send(HEAD, CHUNKED, CHUNKS),
    "a part of a request": send_a_part_of_a_request,
    "a bad chunk": send(HEAD, CHUNKED, b"xyz\r\n"),
    "an upload that waits for 100": send(HEAD, b"Expect: 100-continue\r\n", BODY),
    "an upload to nowhere": send(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n", CHUNKED, CHUNKS),
    "an upload to another host": send(b"POST / HTTP/1.1\r\nHost: evil.example\r\n", CHUNKED, CHUNKS),
    "refusals and an upload": send(request("GET", "/", host="evil.example") * 20, HEAD, CHUNKED, CHUNKS),
    "a request": send(COMPLETION),
    "requests in a row": send(HEALTH * 5),
    "a request and rubbish": send(COMPLETION, b"\x00\xff"),
    "more than may wait": send(COMPLETION, b"x" * 100_000),
    "rubbish": send_rubbish,
    "an upgrade": upgrade,
    "a TLS handshake": send(bytes.fromhex("16030100c8010000c40303") + bytes(50)),
    "HTTP/2": send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
}


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


WAYS: list[Callable[[socket.socket], None]] = [socket.socket.close, reset, half_close]


class TalkativeEngine(FakeEngine):
    """Has more to say than any socket holds, and remembers nothing."""

    def generate(self, request: GenerateRequest) -> FakeGeneration:
        generation = super().generate(request)
        endless(generation)
        self.calls.clear()
        self.generations.clear()
        return generation


def left_behind() -> Counter[str]:
    """What the server keeps for each connection, and has not thrown away."""
    gc.collect()
    kinds = (Connection, Http1, Exchange, Inbox, FakeGeneration)
    return Counter(type(found).__name__ for found in gc.get_objects() if isinstance(found, kinds))


def n_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def resident_bytes() -> int:
    """Memory of this process, where the system tells."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


async def be_rude(server: Server, n_rounds: int, chance: random.Random) -> None:
    """Make so many connections, some of them at once, and leave each in one of the ways, at once or a little later."""
    while n_rounds > 0:
        with contextlib.ExitStack() as stack:
            socks = []
            for _ in range(min(n_rounds, chance.randrange(1, 60))):
                socks.append(stack.enter_context(socket.create_connection((server.host, server.port), timeout=5)))
                with contextlib.suppress(OSError):
                    RUDE[chance.choice([*RUDE])](socks[-1], chance)
            n_rounds -= len(socks)
            for _ in range(chance.randrange(1, 5)):
                await trio.lowlevel.checkpoint()
            chance.shuffle(socks)
            for sock in socks:
                with contextlib.suppress(OSError):
                    chance.choice(WAYS)(sock)
                if chance.random() < 0.1:
                    await trio.lowlevel.checkpoint()


async def test_rude_connections_leave_nothing_behind() -> None:
    async with serving(TalkativeEngine(), deadline=30 + N_ROUNDS / 50) as server:
        n_tasks = trio.lowlevel.current_statistics().tasks_living

        async def everything_has_ended() -> None:
            await until(lambda: trio.lowlevel.current_statistics().tasks_living <= n_tasks)

        await be_rude(server, 300, random.Random(0))
        await everything_has_ended()
        before, n_open, n_bytes = left_behind(), n_descriptors(), resident_bytes()
        await be_rude(server, N_ROUNDS, random.Random(1))
        await everything_has_ended()
        assert left_behind() == before
        assert n_descriptors() == n_open
        assert resident_bytes() - n_bytes < 20 << 20
        assert (await server.ask(HEALTH)).status == 200
