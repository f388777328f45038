"""What clients see when a device fails. In the toy model, every wrong cache entry would be a wrong word."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.engine.toys import Gate, Toy, picture, prompts
from tests.server.client import Answer, Server, image, post, request, serving, until
from trio_runner.bench.server import Unavailable, meet
from trio_runner.config import AdapterConfig
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.engine.engine import Engine
from trio_runner.errors import NativeError
from trio_runner.testing import Interruption, toy_text, toy_vector

NO_MEMORY = "failed to allocate 1.5 GiB\non device 0"


def completion(prompt: str) -> bytes:
    return post("/completion", {"prompt": prompt, "n_predict": 40, "cache_prompt": True})


async def ask_all(server: Server, *requests: bytes) -> list[Answer]:
    """Send all requests at once. Returns the answers in their order."""
    answers: dict[bytes, Answer] = {}

    async def ask(raw: bytes) -> None:
        answers[raw] = await server.ask(raw)

    async with trio.open_nursery() as nursery:
        for raw in requests:
            nursery.start_soon(ask, raw)
    return [answers[raw] for raw in requests]


# -- a batch that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [0, 4])
async def test_a_batch_that_fails_ends_only_the_request_that_is_too_large(toy: Toy, n_rows: int) -> None:
    """Alone or beside others, which do not notice. Later requests find the slots and the prompt cache in order."""

    def run_out(batch: Batch) -> Interruption | None:
        too_much = any(ord("!") in chunk.items for chunk in batch.chunks)
        return Interruption(DecodeOutcome.FATAL, n_rows, NO_MEMORY) if too_much else None

    toy.on_decode = run_out
    good = prompts(4, 40)
    bad = [f"{prompt}!" for prompt in good]
    async with toy.engine(slots=2) as engine, serving(engine) as server:
        for _ in range(2):
            answers = await ask_all(server, *map(completion, [good[0], bad[0], bad[1], good[1], bad[2], good[2]]))
            assert [answers[index].text for index in (0, 3, 5)] == [toy_text(prompt, 40) for prompt in good[:3]]
            for answer in (answers[1], answers[2], answers[4]):
                [line] = answer.lines
                assert line["error"] == "decode failed: failed to allocate 1.5 GiB on device 0"
                assert line["stop"]
        embeddings = [post("/embedding", {"content": text}) for text in (bad[3], good[3])]
        refused, vector = await ask_all(server, *embeddings)
        assert (refused.status, refused.body) == (500, b"decode failed: failed to allocate 1.5 GiB on device 0\n")
        assert vector.json["embedding"] == toy_vector(list(good[3].encode())).tolist()
        assert (await server.ask(completion(bad[3]))).lines[-1]["stop"]
        assert (await server.ask(completion(good[3]))).text == toy_text(good[3], 40)
        assert (await server.ask(request("GET", "/health"))).json["status"] == "ok"
        assert engine.statistics().generations == engine.statistics().busy == 0


async def test_requests_succeed_after_a_device_that_failed_for_a_while(toy: Toy) -> None:
    """Each request is told once, in the middle of its text. The same requests succeed afterwards."""
    texts = prompts(3, 40)
    gate = Gate(toy)
    toy.on_decode = gate
    n_failed = 0

    def fail(batch: Batch) -> Interruption:
        nonlocal n_failed
        n_failed += 1
        return Interruption(DecodeOutcome.FATAL, 0, NO_MEMORY)

    async with toy.engine(slots=2) as engine, serving(engine) as server, trio.open_nursery() as nursery:

        async def ask() -> None:
            for answer in await ask_all(server, *map(completion, texts)):
                assert answer.lines[-1]["error"] == "decode failed: failed to allocate 1.5 GiB on device 0"
            toy.context.on_decode = None
            for answer, prompt in zip(await ask_all(server, *map(completion, texts)), texts, strict=True):
                assert answer.text == toy_text(prompt, 40)

        nursery.start_soon(ask)
        gate.let(5)
        await gate.reached(6)
        toy.context.on_decode = fail
        gate.open()
    assert n_failed <= 2 * len(texts)


# -- a device that is gone --------------------------------------------------------------------------------------------


def vanish(batch: Batch) -> None:
    raise NativeError("trio_step", -3, "the <server>\nhas hung up")


REASON = "trio_step failed with -3: the <server> has hung up"
TEXT = f"the engine is broken: {REASON}"


@asynccontextmanager
async def surviving(
    toy: Toy, adapter_dir: Path | None = None, **options: object
) -> AsyncIterator[tuple[Server, Engine]]:
    async with (
        toy.engine(cancel_when_broken=False, **options) as engine,
        serving(engine, adapter_dir=adapter_dir) as server,
    ):
        yield server, engine


async def test_every_client_is_told_when_a_device_vanishes(toy: Toy) -> None:
    """Three streams, one request that waits, and some embeddings, all at once."""
    toy.on_decode = gate = Gate(toy)
    texts = prompts(4, 60)
    async with surviving(toy, slots=3) as (server, engine):
        streams = [await server.connect() for _ in texts]
        for stream, prompt in zip(streams, texts, strict=True):
            await stream.stream.send_all(post("/completion", {"prompt": prompt}))
            await stream.head()
        gate.let(12)
        for stream in streams[:3]:
            assert await stream.chunk()
        await gate.reached(13)
        vectors: list[Answer] = []

        async def embed(content: object) -> None:
            vectors.append(await server.ask(post("/embedding", {"content": content})))

        async with trio.open_nursery() as nursery:
            for content in ("a vector", ["many", "vectors"]):
                nursery.start_soon(embed, content)
            await until(lambda: engine.statistics().generations == 7)
            toy.context.on_decode = vanish
            gate.open()
            for stream in streams:
                *_, last = (await stream.chunks()).splitlines()
                assert json.loads(last) == {
                    "error": TEXT,
                    "content": "",
                    "stop": True,
                    "timings": {"predicted_n": 0, "predicted_ms": 0, "prompt_n": 0, "prompt_ms": 0},
                }
        assert [(answer.status, answer.body) for answer in vectors] == [(503, TEXT.encode() + b"\n")] * 2


async def test_every_path_tells_of_a_device_that_has_vanished(toy: Toy, tmp_path: Path) -> None:
    toy.on_decode = vanish
    toy.adapters = (AdapterConfig(str(tmp_path / "one")),)
    async with surviving(toy, tmp_path, max_queue=0) as (server, _):
        client = await server.connect()
        assert (await client.ask(post("/completion", {"prompt": "x"}))).lines[-1]["error"] == TEXT
        for _ in range(2):  # at first the model is being freed
            for raw in (
                post("/completion", {"prompt": "x"}),
                post("/completion", {"prompt": "[img-0]", "image_data": [image(picture(0))]}),
                post("/embedding", {"content": "x"}),
                post("/embedding", {"content": ["x"] * 30}),
                post("/rerank", {"query": "x", "documents": ["y"]}),
                post("/tokenize", {"content": "x"}),
                post("/detokenize", {"tokens": [65]}),
                post("/adapters", {"file": "two"}),
                request("GET", "/adapters"),
                request("DELETE", "/adapters/one"),
            ):
                answer = await client.ask(raw)
                assert (answer.status, answer.body) == (503, TEXT.encode() + b"\n"), raw
            health = await client.ask(request("GET", "/health"))
            assert (health.status, health.headers["content-type"]) == (503, "application/json")
            assert health.json == {"status": "server error", "progress": 1, "error": REASON}
            assert (await client.ask(request("HEAD", "/health"))).status == 503
            statistics = await client.ask(request("GET", "/statistics"))
            assert (statistics.status, statistics.json["status"]) == (200, "server error")
            assert statistics.json["generations"] == 0
            # A request that is wrong is still told so.
            assert (await client.ask(post("/completion", {"prompt": 1}))).status == 400
            await until(lambda: toy.model.closed)


async def test_a_server_with_a_broken_engine_stops_in_order(toy: Toy) -> None:
    toy.on_decode = vanish
    async with surviving(toy) as (server, _):
        await server.ask(post("/completion", {"prompt": "x"}))
        idle = await server.connect()
        await idle.ask(request("GET", "/health"))
        server.shutdown.set()
        with trio.fail_after(2):
            await server.stopped.wait()
            assert await idle.closed()


async def test_the_bench_refuses_a_server_with_a_broken_engine(toy: Toy) -> None:
    toy.on_decode = vanish
    async with surviving(toy) as (server, _):
        await server.ask(post("/completion", {"prompt": "x"}))
        with pytest.raises(Unavailable, match="has hung up"):
            await meet(f"http://{server.host}:{server.port}")
