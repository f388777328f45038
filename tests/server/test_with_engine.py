"""The server with a real engine. In its toy model, every wrong cache entry would be a wrong word."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable

import pytest
import trio

from tests.engine.toys import prompts
from tests.server.client import DEADLINE, Client, Server, post, request, serving, until
from trio_runner.core.batch import Batch
from trio_runner.errors import EngineBroken, LoadError
from trio_runner.front_door import open_engine
from trio_runner.server import serve
from trio_runner.testing import ToyLoader, toy_text


async def text(server: Server, prompt: str, n_predict: int) -> str:
    answer = await server.ask(post("/completion", {"prompt": prompt, "n_predict": n_predict, "cache_prompt": True}))
    assert answer.status == 200
    assert [line["stop"] for line in answer.lines] == [False] * (len(answer.lines) - 1) + [True]
    return "".join(line["content"] for line in answer.lines)


async def test_more_requests_than_slots() -> None:
    async with open_engine(ToyLoader(), slots=2) as engine, serving(engine) as server:
        texts: dict[str, str] = {}

        async def ask(prompt: str) -> None:
            texts[prompt] = await text(server, prompt, 40)

        prompts = [f"prompt {i}" * (i + 1) for i in range(7)]
        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(ask, prompt)
        assert texts == {prompt: toy_text(prompt, 40) for prompt in prompts}


async def test_a_client_that_disconnects_frees_its_slot() -> None:
    def slowly(batch: Batch) -> None:
        time.sleep(0.005)

    async with open_engine(ToyLoader(on_decode=slowly), slots=1) as engine, serving(engine) as server:
        for _ in range(3):
            client = await server.connect()
            await client.stream.send_all(post("/completion", {"prompt": "abc" * 20}))
            await client.head()
            client.reset()
            await until(lambda: engine.statistics().generations == 0)
        assert await text(server, "after them", 10) == toy_text("after them", 10)


async def test_requests_wait_for_the_model() -> None:
    loaded = threading.Event()

    def wait(progress: Callable[[float], None], cancelled: Callable[[], bool]) -> None:
        progress(0.5)
        while not cancelled() and not loaded.wait(0.005):
            pass

    async with open_engine(ToyLoader(on_load=wait), wait=False) as engine, serving(engine) as server:
        await until(lambda: engine.progress > 0)
        assert (await server.ask(request("GET", "/health"))).json == {"status": "loading model", "progress": 0.5}
        early, gone = await server.connect(), await server.connect()
        for client in (early, gone):
            await client.stream.send_all(post("/completion", {"prompt": "x", "n_predict": 5}))
        await gone.stream.aclose()
        loaded.set()
        assert "".join(line["content"] for line in (await early.answer()).lines) == toy_text("x", 5)
        assert (await server.ask(request("GET", "/health"))).json["status"] == "ok"


async def test_a_request_does_not_wait_for_the_model_for_ever() -> None:
    """What is wrong with it is said at once, whether the model is loaded or not."""
    loaded = threading.Event()

    def wait(progress: Callable[[float], None], cancelled: Callable[[], bool]) -> None:
        progress(0.25)
        while not cancelled() and not loaded.wait(0.005):
            pass

    async with open_engine(ToyLoader(on_load=wait), wait=False, load_wait=0) as engine, serving(engine) as server:
        await until(lambda: engine.progress > 0)
        fields = {"prompt": "x", "content": "x", "n_predict": 5}
        for path in ("/completion", "/embedding", "/tokenize", "/rerank", "/detokenize"):
            answer = await server.ask(post(path, {**fields, "query": "x", "documents": ["x"], "tokens": [1]}))
            assert (answer.status, answer.body) == (503, b"the model is still loading (25%)\n")
            assert int(answer.headers["retry-after"]) >= 1
            assert "x-should-retry" not in answer.headers
        for path in ("/props", "/adapters"):
            answer = await server.ask(request("GET", path))
            assert (answer.status, answer.body) == (503, b"the model is still loading (25%)\n")
        assert (await server.ask(post("/completion", {"prompt": 1}))).status == 400
        loaded.set()
        await engine.wait_ready(math.inf)
        assert (await server.ask(post("/completion", fields))).text == toy_text("x", 5)


async def test_every_request_says_why_the_model_does_not_load() -> None:
    def fail(progress: Callable[[float], None], cancelled: Callable[[], bool]) -> None:
        raise LoadError("not a GGUF file", path="model.gguf")

    async with open_engine(ToyLoader(on_load=fail), wait=False) as engine, serving(engine) as server:
        answer = await server.ask(post("/completion", {"prompt": "x"}))
        assert (answer.status, answer.body) == (503, b"model.gguf: not a GGUF file\n")
        assert "retry-after" not in answer.headers
        assert answer.headers["x-should-retry"] == "false"
        health = await server.ask(request("GET", "/health"))
        assert (health.status, health.json["status"], health.json["error"]) == (503, "server error", "not a GGUF file")


async def test_other_endpoints() -> None:
    async with open_engine(ToyLoader()) as engine, serving(engine) as server:
        assert (await server.ask(post("/tokenize", {"content": "hé"}))).json == {"tokens": [*"hé".encode()]}
        assert (await server.ask(post("/detokenize", {"tokens": [*"hé".encode()]}))).json == {"content": "hé"}
        assert (await server.ask(post("/detokenize", {"tokens": [99999]}))).status == 400
        assert len((await server.ask(post("/embedding", {"content": "hé"}))).json["embedding"]) == engine.info.n_embd


async def test_shutdown_ends_running_and_waiting_requests() -> None:
    def slowly(batch: Batch) -> None:
        time.sleep(0.01)

    loader = ToyLoader(on_decode=slowly)
    async with open_engine(loader, slots=1) as engine, serving(engine, drain_timeout=0.1) as server:
        running, waiting = await server.connect(), await server.connect()
        for client in (running, waiting):
            await client.stream.send_all(post("/completion", {"prompt": "endless"}))
            await client.head()
        server.shutdown.set()
        with trio.fail_after(3):
            assert "error" in await last_line(running)
            assert "error" in await last_line(waiting)
            await server.stopped.wait()


async def test_a_dead_decode_thread_tells_every_client() -> None:
    def die(batch: Batch) -> None:
        raise RuntimeError("out of luck")

    async def run(*, task_status: trio.TaskStatus[list[tuple[str, int]]]) -> None:
        with pytest.raises(EngineBroken):
            async with open_engine(ToyLoader(on_decode=die)) as engine:
                await serve(engine, port=0, task_status=task_status)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            [(host, port)] = await nursery.start(run)
            client = Client(await trio.open_tcp_stream(host, port))
            answer = await client.ask(post("/completion", {"prompt": "x"}))
            assert "out of luck" in answer.lines[-1]["error"]
            await client.stream.aclose()


async def last_line(client: Client) -> str:
    return (await client.chunks()).decode().splitlines()[-1]


async def test_nobody_computes_for_a_client_that_does_not_read() -> None:
    """Its sequence goes on until the buffers are full, is paused, and goes on again when the client reads."""

    def slowly(batch: Batch) -> None:
        time.sleep(0.002)  # so that a client that reads is never behind

    (prompt,) = prompts(1, 200)
    loader = ToyLoader(on_decode=slowly)
    async with open_engine(loader, slots=1, max_backlog=16) as engine, serving(engine) as server:
        with socket.socket() as quiet:
            quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before connecting, or it is ignored
            quiet.connect((server.host, server.port))
            # With a hundred alternatives each, two hundred tokens are more than a megabyte.
            fields = {"prompt": prompt, "n_predict": 200, "logprobs": 100}
            quiet.sendall(post("/completion", fields, "Connection: close"))
            await until(lambda: engine.statistics().scheduler.n_paused == 1)
            assert engine.statistics().scheduler.n_sampled < 150
            client = Client(trio.SocketStream(trio.socket.from_stdlib_socket(quiet.dup())))
            answer = await client.answer()
            assert "".join(line["content"] for line in answer.lines) == toy_text(prompt, 200)
            await client.stream.aclose()


async def test_a_deadline_ends_an_answer_with_the_text_it_has() -> None:
    def slowly(batch: Batch) -> None:
        time.sleep(0.005)

    (prompt,) = prompts(1, 200)
    async with open_engine(ToyLoader(on_decode=slowly)) as engine, serving(engine) as server:
        answer = await server.ask(post("/completion", {"prompt": prompt, "n_predict": 200, "deadline": 0.2}))
        *pieces, last = answer.lines
        assert last["stopped_deadline"]
        assert 0 < last["timings"]["predicted_n"] < 200
        text = "".join(line["content"] for line in pieces)
        assert text
        assert toy_text(prompt, 200).startswith(text)
