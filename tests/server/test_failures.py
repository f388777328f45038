"""What clients see of a device that fails, over a toy model whose every wrong cache entry would be a wrong word."""

from __future__ import annotations

import pytest
import trio

from tests.engine.toys import Gate, Toy, prompts
from tests.server.client import Answer, Server, post, request, serving
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.testing import Interruption, toy_text, toy_vector

NO_MEMORY = "failed to allocate 1.5 GiB\non device 0"


def completion(prompt: str) -> bytes:
    return post("/completion", {"prompt": prompt, "n_predict": 40, "cache_prompt": True})


async def ask_all(server: Server, *requests: bytes) -> list[Answer]:
    """All at once; the answers in the order of the requests."""
    answers: dict[bytes, Answer] = {}

    async def ask(raw: bytes) -> None:
        answers[raw] = await server.ask(raw)

    async with trio.open_nursery() as nursery:
        for raw in requests:
            nursery.start_soon(ask, raw)
    return [answers[raw] for raw in requests]


# -- a batch that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [0, 4])
async def test_a_batch_that_the_device_cannot_run_ends_the_request_it_was_too_much_for(toy: Toy, n_rows: int) -> None:
    """Alone or in company. The others do not notice, and what comes after finds slots and a prompt cache in order."""

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


async def test_a_device_that_fails_for_a_while(toy: Toy) -> None:
    """In the middle of every text: each request is told, once, and the same requests succeed afterwards."""
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
