"""A client that disconnects is noticed, in every phase and in every way of disconnecting."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.server.client import WAYS, Leave, post, request, serving, until
from tests.server.fake_engine import FakeEngine, endless

COMPLETION = post("/completion", {"prompt": "x"})
UPGRADE = post("/completion", {"prompt": "x"}, "Connection: upgrade", "Upgrade: foo")
WAITING = {
    "plain": COMPLETION,
    "upgrade": UPGRADE,
    "embed": post("/embedding", {"content": "x"}),
    "embed a list": post("/embedding", {"content": ["x", "y"]}),
    "rerank": post("/rerank", {"query": "x", "documents": ["y"]}),
    "load": post("/adapters", {"file": "x"}),
    "unload": request("DELETE", "/adapters/x"),
}
HEAD_ONLY = b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"

WITHOUT_REQUEST = {
    "connected": b"",
    "in the head": b"POST /comple",
    "before the body": HEAD_ONLY,
    "in the body": HEAD_ONLY + b'{"prompt"',
    "in a chunked body": b"POST /completion HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
    "after an answer": request("GET", "/health"),
}

TRAILING = {
    "nothing": b"",
    "a line break": b"\r\n",
    "half a request": b"GET /hea",
    "a request": request("GET", "/health"),
    "rubbish": b"\x00\xff",
}


async def tasks_return_to(n_tasks: int) -> None:
    await until(lambda: trio.lowlevel.current_statistics().tasks_living <= n_tasks)


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("phase", WITHOUT_REQUEST)
async def test_before_the_request_is_complete(phase: str, leave: Leave) -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        n_tasks = trio.lowlevel.current_statistics().tasks_living
        client = await server.connect()
        await client.stream.send_all(WITHOUT_REQUEST[phase])
        if phase == "after an answer":
            await client.answer()
        else:
            await trio.testing.wait_all_tasks_blocked(0.01)
        await leave(client)
        with trio.fail_after(1):
            await tasks_return_to(n_tasks)
        assert engine.calls == []


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("trailing", TRAILING)
@pytest.mark.parametrize("what", WAITING)
async def test_while_waiting_for_the_model_or_a_slot(what: str, trailing: str, leave: Leave, tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.admitting = trio.Event()
    async with serving(engine, adapter_dir=tmp_path) as server:
        n_tasks = trio.lowlevel.current_statistics().tasks_living
        client = await server.connect()
        await client.stream.send_all(WAITING[what] + TRAILING[trailing])
        await until(lambda: engine.calls)
        await leave(client)
        with trio.fail_after(1):
            await engine.cancelled.wait()
            for generation in engine.generations:
                await generation.closed.wait()
            await tasks_return_to(n_tasks)


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("trailing", TRAILING)
@pytest.mark.parametrize("spoken", [False, True], ids=["prefill", "decode"])
async def test_during_the_answer(spoken: bool, trailing: str, leave: Leave) -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        n_tasks = trio.lowlevel.current_statistics().tasks_living
        client = await server.connect()
        await client.stream.send_all(COMPLETION + TRAILING[trailing])
        generation = await engine.asked()
        await client.head()
        if spoken:
            generation.say("a")
            await client.chunk()
        await leave(client)
        with trio.fail_after(1):
            await generation.closed.wait()
            await tasks_return_to(n_tasks)


@pytest.mark.parametrize("leave", WAYS)
async def test_while_the_server_waits_to_send(leave: Leave) -> None:
    """The socket is full."""
    engine = FakeEngine()
    async with serving(engine) as server:
        n_tasks = trio.lowlevel.current_statistics().tasks_living
        client = await server.connect()
        await client.stream.send_all(COMPLETION)
        generation = await engine.asked()
        endless(generation)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await leave(client)
        with trio.fail_after(1):
            await generation.closed.wait()
            await tasks_return_to(n_tasks)


async def test_a_hundred_clients_at_once() -> None:
    engine = FakeEngine()
    async with serving(engine, deadline=30) as server:
        n_tasks = trio.lowlevel.current_statistics().tasks_living
        clients = [await server.connect() for _ in range(100)]
        for client in clients:
            await client.stream.send_all(COMPLETION)
        await until(lambda: len(engine.calls) == 100)
        for i, client in enumerate(clients):
            await WAYS[i % 3](client)
        with trio.fail_after(5):
            for generation in engine.generations:
                await generation.closed.wait()
            await tasks_return_to(n_tasks)
