"""Starting and stopping the server."""

from __future__ import annotations

import errno
import math
import socket
from functools import partial
from typing import Any, cast

import pytest
import trio

from tests.server.client import DEADLINE, post, request, serving, until
from tests.server.fake_engine import DONE, FakeEngine, endless
from trio_runner.config import EngineConfig
from trio_runner.interface import EngineInterface
from trio_runner.server import serve
from trio_runner.server.listener import addresses, close_all, is_local, open_listeners


async def refuse(**options: Any) -> None:
    with trio.fail_after(DEADLINE):
        await serve(cast(EngineInterface, FakeEngine()), port=0, **options)


async def test_an_address_that_other_machines_reach_needs_a_key() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ValueError, match="set an API key"):
            await refuse(host=host)
        with pytest.raises(ValueError, match="set an API key"):
            await refuse(host=host, api_key="")


async def test_other_machines_are_served_if_they_have_the_key() -> None:
    async with serving(FakeEngine(), host="0.0.0.0", api_key="k") as server:
        for host in ("any.name", "", "192.0.2.1"):
            tokenize = request("POST", "/tokenize", b'{"content":"a"}', "Authorization: Bearer k", host=host)
            assert (await server.ask(tokenize)).status == 200
            assert (await server.ask(request("POST", "/tokenize", b"{}", host=host))).status == 401
        assert (await server.ask(b"GET /health HTTP/1.1\r\nHost: \xff\r\n\r\n")).status in (200, 400)


async def test_a_port_in_use_is_named() -> None:
    async with serving(FakeEngine()) as server:
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            await serve(cast(EngineInterface, FakeEngine()), port=server.port)


async def test_a_name_is_listened_on_at_all_its_addresses() -> None:
    listeners = await open_listeners("localhost", 0)
    try:
        assert all(map(is_local, listeners))
        assert len({port for _, port in addresses(listeners)}) == 1
    finally:
        close_all(listeners)


async def test_listeners_of_the_caller_are_used_and_closed() -> None:
    [listener] = await open_listeners("127.0.0.1", 0)
    async with serving(FakeEngine(), listeners=[listener]) as server:
        assert server.port == listener.getsockname()[1]
        server.shutdown.set()
        await server.stopped.wait()
        assert listener.fileno() == -1


async def test_accepting_goes_on_after_running_out_of_descriptors() -> None:
    class Exhausted(socket.socket):
        n_failures = 3

        def accept(self) -> Any:
            if self.n_failures:
                self.n_failures -= 1
                raise OSError(errno.EMFILE, "too many open files")
            return super().accept()

    [listener] = await open_listeners("127.0.0.1", 0)
    exhausted = Exhausted(fileno=listener.detach())
    async with serving(FakeEngine(), listeners=[exhausted]) as server:
        assert (await server.ask(request("GET", "/health"))).status == 200
        assert exhausted.n_failures == 0


async def test_running_answers_finish_while_health_answers() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        idle, running = await server.connect(), await server.connect()
        await idle.ask(request("GET", "/health"))
        await running.stream.send_all(post("/completion", {"prompt": "x"}))
        generation = await engine.asked()
        engine.generations.append(generation)  # for drain to wait for
        generation.say("a")
        await running.head()
        server.shutdown.set()
        await until(lambda: engine.drained)
        answer = await server.ask(request("GET", "/health"))
        assert (answer.status, answer.body) == (503, b'{"status":"server error","progress":1}\n')
        generation.say("b", DONE)
        body = await running.chunks()
        assert [line.split(b'"')[3] for line in body.splitlines()] == [b"a", b"b", b""]
        with trio.fail_after(1):
            await server.stopped.wait()
            assert await idle.closed()
            assert await running.closed()
        with pytest.raises(OSError, match="all attempts to connect"):
            await server.connect()


async def test_an_answer_that_does_not_finish_says_why() -> None:
    engine = FakeEngine()
    async with serving(engine, drain_timeout=0.1) as server:
        client = await server.connect()
        await client.stream.send_all(post("/completion", {"prompt": "x"}))
        generation = await engine.asked()
        engine.generations.append(generation)
        generation.say("a")
        await client.head()
        server.shutdown.set()
        lines = (await client.chunks()).splitlines()
        assert lines[1].startswith(b'{"error":"the engine is shutting down","content":"","stop":true,')
        with trio.fail_after(2):
            await server.stopped.wait()


async def test_a_client_that_does_not_read_does_not_delay_the_end() -> None:
    engine = FakeEngine()
    engine.config = EngineConfig(stall_timeout=math.inf)
    async with serving(engine, drain_timeout=0.1) as server:
        client = await server.connect()
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await client.stream.send_all(post("/completion", {"prompt": "x"}))
        generation = await engine.asked()
        engine.generations.append(generation)
        endless(generation)
        await trio.testing.wait_all_tasks_blocked(0.05)
        server.shutdown.set()
        with trio.fail_after(3):
            await server.stopped.wait()
        await generation.closed.wait()


async def test_half_a_request_does_not_delay_the_end() -> None:
    async with serving(FakeEngine(), drain_timeout=0.1) as server:
        for raw in (b"", b"GET /hea", b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"):
            client = await server.connect()
            await client.stream.send_all(raw)
        await trio.testing.wait_all_tasks_blocked(0.01)
        server.shutdown.set()
        with trio.fail_after(3):
            await server.stopped.wait()


async def test_cancelling_stops_at_once() -> None:
    engine = FakeEngine()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            run = partial(serve, cast(EngineInterface, engine), port=0)
            [(host, port)] = await nursery.start(run)
            stream = await trio.open_tcp_stream(host, port)
            await stream.send_all(post("/completion", {"prompt": "x"}))
            generation = await engine.asked()
            endless(generation)
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.cancel_scope.cancel()
        assert generation.closed.is_set()
        await stream.aclose()
