"""More requests than slots."""

from __future__ import annotations

import pytest
import trio

from tests.engine.toys import Gate, Toy, prompts, until, until_idle
from trio_runner.engine.engine import Engine
from trio_runner.errors import EngineBusy
from trio_runner.testing import toy_text


async def read_all(engine: Engine, requests: list[str], n_tokens: int) -> dict[str, str]:
    """The texts of all, each read by a task of its own."""
    texts: dict[str, str] = {}

    async def read(prompt: str) -> None:
        texts[prompt] = await engine.generate(prompt, max_tokens=n_tokens).collect()

    async with trio.open_nursery() as nursery:
        for prompt in requests:
            nursery.start_soon(read, prompt)
    return texts


@pytest.mark.parametrize(("n_requests", "slots"), [(1, 1), (5, 4), (9, 2), (20, 16)])
async def test_all_finish_with_the_text_they_have_alone(toy: Toy, n_requests: int, slots: int) -> None:
    requests = list(prompts(n_requests, 50))
    async with toy.engine(slots=slots) as engine:
        assert await read_all(engine, requests, 50) == {prompt: toy_text(prompt, 50) for prompt in requests}
        await until_idle(engine)
        assert engine.statistics().slots == slots


async def test_the_same_request_many_times(toy: Toy) -> None:
    """They share what there is to share, and nothing else."""
    (prompt,) = prompts(1, 30)
    texts: list[str] = []

    async def read(engine: Engine) -> None:
        texts.append(await engine.generate(prompt, max_tokens=30).collect())

    async with toy.engine(slots=3) as engine, trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(read, engine)
    assert texts == [toy_text(prompt, 30)] * 12


async def test_first_come_first_served(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    requests = prompts(50, 10)
    async with toy.engine(slots=2) as engine:
        generations = [engine.generate(prompt, max_tokens=1 + n % 7) for n, prompt in enumerate(requests)]
        for generation in generations:
            await generation.start()
        assert engine.statistics().generations == 50
        gate.open()
        for n, generation in enumerate(generations):
            assert await generation.collect() == toy_text(requests[n], 1 + n % 7)
    # Two that get their slots at once may stand in their batch in either order.
    n_first_batch = [
        min(n for n, batch in enumerate(toy.context.batches) if uid in {chunk.uid for chunk in batch.chunks})
        for uid in sorted(set(toy.uids_run()))
    ]
    assert len(n_first_batch) == 50
    assert n_first_batch == sorted(n_first_batch)


async def test_a_short_one_does_not_wait_for_a_long_one_to_end(toy: Toy) -> None:
    long, short = prompts(2, 300)
    async with toy.engine(slots=2) as engine, engine.generate(long, max_tokens=300) as generation:
        await anext(generation)
        assert await engine.generate(short, max_tokens=5).collect() == toy_text(short, 5)


@pytest.mark.parametrize("max_queue", [0, 3])
async def test_a_full_queue_says_so(toy: Toy, max_queue: int) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    requests = prompts(2 + max_queue, 10)
    async with toy.engine(slots=2, max_queue=max_queue) as engine:
        generations = [engine.generate(prompt, max_tokens=10) for prompt in requests]
        for generation in generations:
            await generation.start()
        with pytest.raises(EngineBusy) as caught:
            await engine.generate("one too many").start()
        assert caught.value.retry_after == 1
        assert len(toy.model.samplers) == len(requests)

        # Whoever leaves makes room, even before the decode thread has heard of it.
        generations[-1].close()
        last = engine.generate("just in time", max_tokens=5)
        await last.start()
        gate.open()
        assert await last.collect() == toy_text("just in time", 5)
        for prompt, generation in zip(requests[:-1], generations[:-1], strict=True):
            assert await generation.collect() == toy_text(prompt, 10)


async def test_the_queue_is_full_though_all_came_at_once(toy: Toy) -> None:
    """They are counted again after their prompts were tokenised: many may have been let in before one was counted."""
    gate = Gate(toy)
    toy.on_decode = gate
    n_busy = 0
    texts: list[str] = []

    async def read(engine: Engine, prompt: str) -> None:
        nonlocal n_busy
        try:
            texts.append(await engine.generate(prompt, max_tokens=5).collect())
        except EngineBusy:
            n_busy += 1

    async with toy.engine(slots=1, max_queue=1) as engine, trio.open_nursery() as nursery:
        for prompt in prompts(8, 5):
            nursery.start_soon(read, engine, prompt)
        await until(lambda: n_busy == 6)
        gate.open()
    assert len(texts) == 2
    assert len(toy.model.samplers) <= 8


async def test_statistics(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=2) as engine:
        generations = [engine.generate(prompt, max_tokens=10) for prompt in prompts(5, 10)]
        for generation in generations:
            await generation.start()
        gate.let(3)
        await gate.reached(4)
        statistics = engine.statistics()
        assert (statistics.status, statistics.slots, statistics.generations) == ("ready", 2, 5)
        assert statistics.busy == 2
        assert statistics.busy + statistics.waiting == 5
        assert statistics.scheduler.n_cached_tokens > 10
        gate.open()
        for generation in generations:
            await generation.collect()
        await until_idle(engine)
        assert engine.statistics().scheduler.n_cached_tokens > 20
