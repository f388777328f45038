"""More requests than slots: who waits, who is refused, and who goes first."""

from __future__ import annotations

import pytest
import trio

from tests.engine.inside import admission_of
from tests.engine.toys import Gate, Latch, Toy, prompts, until, until_idle
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.engine.helper_threads import LONG_TEXT
from trio_runner.engine.state import MAX_RETRY_AFTER
from trio_runner.errors import EngineBusy, InvalidGrammar, InvalidRequest
from trio_runner.testing import toy_text


async def read_all(engine: Engine, requests: list[str], n_tokens: int) -> dict[str, str]:
    """The texts of all requests, each read by a task of its own."""
    texts: dict[str, str] = {}

    async def read(prompt: str) -> None:
        texts[prompt] = await engine.generate(prompt, max_tokens=n_tokens).collect()

    async with trio.open_nursery() as nursery:
        for prompt in requests:
            nursery.start_soon(read, prompt)
    return texts


@pytest.mark.parametrize(("n_requests", "slots"), [(1, 1), (5, 4), (9, 2), (20, 16)])
async def test_all_requests_finish_with_the_text_that_they_have_alone(toy: Toy, n_requests: int, slots: int) -> None:
    requests = list(prompts(n_requests, 50))
    async with toy.engine(slots=slots) as engine:
        assert await read_all(engine, requests, 50) == {prompt: toy_text(prompt, 50) for prompt in requests}
        await until_idle(engine)
        assert engine.statistics().slots == slots


async def test_the_same_request_many_times(toy: Toy) -> None:
    """They share rows of the KV cache, and nothing else."""
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
    # Two requests that get their slots at once may be in their batch in either order.
    n_first_batch = [
        min(n for n, batch in enumerate(toy.context.batches) if uid in {chunk.uid for chunk in batch.chunks})
        for uid in sorted(set(toy.uids_run()))
    ]
    assert len(n_first_batch) == 50
    assert n_first_batch == sorted(n_first_batch)


async def test_a_short_request_does_not_wait_for_a_long_one_to_end(toy: Toy) -> None:
    long, short = prompts(2, 300)
    async with toy.engine(slots=2) as engine, engine.generate(long, max_tokens=300) as generation:
        await anext(generation)
        assert await engine.generate(short, max_tokens=5).collect() == toy_text(short, 5)


@pytest.mark.parametrize("max_queue", [0, 3])
async def test_a_full_queue_refuses_requests(toy: Toy, max_queue: int) -> None:
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

        # Closing a request makes room, even before the decode thread knows of it.
        generations[-1].close()
        last = engine.generate("just in time", max_tokens=5)
        await last.start()
        gate.open()
        assert await last.collect() == toy_text("just in time", 5)
        for prompt, generation in zip(requests[:-1], generations[:-1], strict=True):
            assert await generation.collect() == toy_text(prompt, 10)


async def test_the_bound_holds_for_requests_that_come_at_once(toy: Toy) -> None:
    """A request counts before it is tokenised, so no two of them take the same place."""
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


# -- how long to wait -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "retry_after"), [(None, 1), (0.01, 1), (10, 5), (20, 10), (1000, MAX_RETRY_AFTER)])
async def test_retry_after_is_when_a_slot_is_likely_to_be_free(
    toy: Toy, seconds: float | None, retry_after: float
) -> None:
    """When one of the two slots is likely to have become free."""
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=2, max_queue=3) as engine:
        if seconds is not None:
            admission_of(engine).seconds["generation"] = seconds
        for prompt in prompts(5, 5):
            await engine.generate(prompt).start()
        with pytest.raises(EngineBusy) as caught:
            await engine.generate("one too many").start()
        assert caught.value.retry_after == pytest.approx(retry_after)


async def test_the_time_in_a_slot_is_measured(toy: Toy) -> None:
    """The toy says that a row takes a millisecond. Requests that fail do not count."""
    (prompt,) = prompts(1, 200)
    async with toy.engine() as engine:
        with pytest.raises(InvalidGrammar):
            await engine.generate(prompt, grammar="x").collect()
        assert not admission_of(engine).seconds
        await engine.generate(prompt, max_tokens=11, cache_prompt=False).collect()
        assert admission_of(engine).seconds["generation"] == pytest.approx(0.02)
        for _ in range(50):
            await engine.generate(prompt, max_tokens=111, cache_prompt=False).collect()
        assert admission_of(engine).seconds["generation"] == pytest.approx(0.12, rel=0.01)
        await engine.embed([prompt])
        assert admission_of(engine).seconds == {
            "generation": pytest.approx(0.12, rel=0.01),
            "embedding": pytest.approx(0.01),
        }


async def test_a_request_that_waits_for_a_helper_thread_has_a_place_in_the_queue(toy: Toy) -> None:
    toy.on_tokenize = latch = Latch()
    async with toy.engine(slots=1, max_queue=2) as engine, trio.open_nursery() as nursery:
        for prompt in prompts(3, 5):
            nursery.start_soon(engine.generate(prompt, max_tokens=1).collect)
        await latch.reached(2)  # as many helper threads as there are
        with pytest.raises(EngineBusy):
            await engine.generate("one too many").start()
        latch.open()
    assert len(toy.model.samplers) == 3


async def test_samplers_that_take_long_to_make_hold_up_no_other_request(toy: Toy) -> None:
    """llama.cpp compares each DRY breaker with each token of a vocabulary that may be large."""
    latch = Latch()
    toy.info = {"n_vocab": 250_000}
    toy.on_sampler = lambda params: latch() if params.dry_multiplier else None
    breakers = [str(n) for n in range(16)]
    texts: list[str] = []

    async def read(engine: Engine) -> None:
        dry = engine.generate("slow", max_tokens=5, dry_multiplier=0.8, dry_sequence_breakers=breakers)
        texts.append(await dry.collect())

    async with toy.engine() as engine, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read, engine)
        await latch.reached()
        assert await engine.generate("quick", max_tokens=20).collect() == toy_text("quick", 20)
        assert await engine.tokenize("quick") == list(b"quick")
        long = "long" * LONG_TEXT
        assert await engine.tokenize(long) == list(long.encode())
        latch.open()
    assert texts == [toy_text("slow", 5)] * 3


async def test_the_default_dry_breakers_do_not_wait_for_long_texts(toy: Toy) -> None:
    latch = Latch()
    toy.info = {"n_vocab": 152_000}
    toy.on_tokenize = lambda text: latch() if len(text) >= LONG_TEXT else None
    async with toy.engine() as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.tokenize, "x" * LONG_TEXT)
        await latch.reached()
        assert await engine.generate("dry", max_tokens=20, dry_multiplier=0.8).collect() == toy_text("dry", 20)
        latch.open()


async def test_a_list_of_texts_waits_for_room_in_the_queue(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=1, max_queue=2) as engine, trio.open_nursery() as nursery:
        vectors: list[int] = []

        async def embed(n_texts: int) -> None:
            vectors.append(len(await engine.embed([f"text {n}" for n in range(n_texts)])))

        nursery.start_soon(embed, 1)
        await gate.reached(1)
        nursery.start_soon(embed, 1)
        nursery.start_soon(embed, 9)
        await until(lambda: engine.statistics().generations == 3)
        gate.open()
    assert sorted(vectors) == [1, 1, 9]


@pytest.mark.parametrize("n_at_once", [1, 5])
async def test_cancelling_a_request_does_not_wait_for_its_helper_thread(toy: Toy, n_at_once: int) -> None:
    """The request may even wait for a thread. A sampler that is made for nothing is closed."""
    toy.on_tokenize = latch = Latch()
    async with toy.engine(slots=1) as engine:
        async with trio.open_nursery() as nursery:
            for prompt in prompts(n_at_once, 5):
                nursery.start_soon(engine.generate(prompt, max_tokens=1).collect)
            await latch.reached(min(n_at_once, 2))
            nursery.cancel_scope.cancel()
        assert engine.statistics().generations == 0
        latch.open()
    toy.check_closed()


# -- who goes first ---------------------------------------------------------------------------------------------------


async def test_background_requests_leave_half_of_the_queue(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    requests = iter(prompts(20, 10))
    async with toy.engine(slots=2, max_queue=5) as engine:
        generations = [engine.generate(next(requests), max_tokens=10, priority="background") for _ in range(4)]
        for generation in generations:
            await generation.start()
        with pytest.raises(EngineBusy):
            await engine.generate(next(requests), priority="background").start()
        for _ in range(3):
            generations.append(engine.generate(next(requests), max_tokens=10))
            await generations[-1].start()
        with pytest.raises(EngineBusy):
            await engine.generate(next(requests)).start()
        gate.open()
        for generation in generations:
            await generation.collect()


async def test_a_background_request_gives_up_its_slot_and_goes_on_later(toy: Toy) -> None:
    slow, quick = prompts(2, 100)
    gate = Gate(toy)
    toy.on_decode = gate

    async def read(generation: Generation) -> None:
        prompt = generation.request.prompt
        assert isinstance(prompt, str)
        assert await generation.collect() == toy_text(prompt, 100)

    async with toy.engine(slots=1) as engine:
        async with trio.open_nursery() as nursery:
            background = engine.generate(slow, max_tokens=100, priority="background")
            await background.start()
            nursery.start_soon(read, background)
            gate.let(30)
            await gate.reached(31)
            interactive = engine.generate(quick, max_tokens=100)
            await interactive.start()
            nursery.start_soon(read, interactive)
            gate.let(1)
            await gate.reached(32)
            statistics = engine.statistics().scheduler
            assert (statistics.n_running, statistics.n_waiting, statistics.n_preempted) == (1, 1, 1)
            gate.open()
        assert background.usage is not None
        assert background.usage.completion_tokens == 100
        assert background.usage.prompt_tokens == len(slow)


async def test_a_preempted_background_request_can_be_closed(toy: Toy) -> None:
    slow, quick = prompts(2, 100)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=1) as engine:
        background = engine.generate(slow, priority="background")
        await background.start()
        gate.let(5)
        await gate.reached(6)
        interactive = engine.generate(quick, max_tokens=50)
        await interactive.start()
        gate.let(1)
        await gate.reached(7)
        assert engine.statistics().scheduler.n_preempted == 1
        background.close()
        gate.let(1)
        await until(lambda: engine.statistics().scheduler.n_preempted == 0)
        assert toy.model.samplers[0].closed
        assert gate.n_aborted == 0
        gate.open()
        assert await interactive.collect() == toy_text(quick, 50)
        await until_idle(engine)


async def test_requests_with_a_shared_prefix_decode_it_once(toy: Toy) -> None:
    prefix = "a prefix of many words that all of them begin with, " * 4
    requests = [f"{prefix}{n}" for n in range(4)]
    async with toy.engine(slots=4) as engine:
        texts = await read_all(engine, requests, 10)
        assert texts == {prompt: toy_text(prompt, 10) for prompt in requests}
        assert engine.statistics().scheduler.n_prompt_rows == len(prefix) + 4


async def test_a_request_takes_the_slot_that_it_prefers(toy: Toy) -> None:
    toy.on_decode = gate = Gate(toy)
    async with toy.engine(slots=2) as engine:
        for preferred in (1, 1, 0):
            generation = engine.generate("hello", max_tokens=1, preferred_slot=preferred)
            gate.let(1)
            await generation.collect()
        gate.open()
        assert [batch.chunks[0].slot for batch in gate.batches] == [1, 1, 0]
        with pytest.raises(InvalidRequest) as caught:
            await engine.generate("hello", preferred_slot=2).start()
        assert caught.value.param == "preferred_slot"
