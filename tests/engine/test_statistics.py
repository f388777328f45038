"""After known requests the statistics of an engine are exactly what they must be."""

from __future__ import annotations

import math
from time import perf_counter

import pytest
import trio
import trio.testing

from tests.engine import states
from tests.engine.states import N_PROMPT, PROMPT, State
from tests.engine.toys import Gate, Latch, Toy, prompts, until, until_idle
from trio_runner.core.batch import DecodeOutcome
from trio_runner.engine.engine import Engine
from trio_runner.errors import EngineBusy, RequestError
from trio_runner.info import RequestStatistics
from trio_runner.testing import Interruption

SECONDS = 5.0
"""A deadline of a request, on a clock that the test moves."""


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """A clock that runs like the real one, because the decode thread is real, and that can jump."""
    return trio.testing.MockClock(rate=1)


def ended(statistics: RequestStatistics) -> dict[str, int]:
    """The reasons that there were."""
    return {reason: n for reason, n in statistics.finished.items() if n}


def cancelled(statistics: RequestStatistics) -> dict[str, int]:
    return {phase: n for phase, n in statistics.cancelled.items() if n}


async def test_an_engine_that_did_nothing(toy: Toy) -> None:
    async with toy.engine() as engine:
        requests = engine.statistics().requests
        assert set(requests.finished) == {"stop", "length", "deadline", "error", "abort"}
        assert set(requests.cancelled) == {"preparing", "waiting", "prefill", "decode"}
        assert set(requests.cancel) == {"waiting", "prefill", "decode"}
        assert not ended(requests)
        assert not cancelled(requests)


async def test_generations_that_come_to_their_end(toy: Toy) -> None:
    texts = prompts(3, 20)
    async with toy.engine() as engine:
        usages = []
        for text in texts:
            async with engine.generate(text, max_tokens=7) as generation:
                async for _ in generation:
                    pass
            assert generation.usage is not None
            usages.append(generation.usage)
        told, requests = engine.statistics().scheduler, engine.statistics().requests
        assert ended(requests) == {"length": 3}
        assert told.n_sampled == told.n_generated == 21
        assert told.n_prompt_tokens == sum(map(len, texts))
        assert requests.first_token.count == requests.prefill.count == requests.decode.count == 3
        assert requests.latency.count == requests.queue.count == 3
        assert requests.between_tokens.count == 18
        assert (requests.generated_tokens.count, requests.generated_tokens.total) == (3, 21)
        assert (requests.prompt_tokens.count, requests.prompt_tokens.total) == (3, sum(map(len, texts)))
        assert math.isclose(requests.queue.total, sum(usage.queue_seconds for usage in usages))
        assert math.isclose(told.prompt_seconds, sum(usage.prompt_seconds for usage in usages))
        assert math.isclose(told.generation_seconds, sum(usage.completion_seconds for usage in usages))
        # The parts of a request are no longer than the whole.
        parts = requests.queue.total + requests.prefill.total + requests.decode.total
        assert 0 < parts <= requests.latency.total


async def test_what_is_found_in_the_prompt_cache(toy: Toy) -> None:
    async with toy.engine(slots=1) as engine:
        for reuse in (True, True, False):
            await engine.generate("the same prompt", max_tokens=1, cache_prompt=reuse).collect()
        told = engine.statistics().scheduler
        n_prompt = len("the same prompt")
        assert (told.n_looked_up, told.n_found) == (2 * n_prompt, n_prompt - 1)
        assert told.n_prompt_tokens == 3 * n_prompt
        assert told.n_prompt_decoded == 2 * n_prompt + 1


async def test_a_prompt_that_is_only_warmed(toy: Toy) -> None:
    async with toy.engine() as engine:
        await engine.generate("warm", max_tokens=0).collect()
        told, requests = engine.statistics().scheduler, engine.statistics().requests
        assert ended(requests) == {"length": 1}
        assert (told.n_prompt_tokens, told.n_looked_up, told.n_sampled) == (4, 4, 0)
        assert (requests.latency.count, requests.queue.count) == (1, 1)
        assert requests.first_token.count == requests.prefill.count == requests.decode.count == 0


async def test_embeddings_are_no_generations(toy: Toy) -> None:
    async with toy.engine() as engine:
        await engine.embed(["one", "another"])
        told, requests = engine.statistics().scheduler, engine.statistics().requests
        assert (requests.embedding.count, told.n_prompt_tokens) == (2, len("oneanother"))
        assert told.n_looked_up == told.n_prompt_decoded == told.n_generated == requests.latency.count == 0
        assert not ended(requests)


@pytest.mark.parametrize(
    ("state", "phase"),
    [
        (states.loading, "preparing"),
        (states.tokenising, "preparing"),
        (states.encoding, "preparing"),
        (states.waiting, "waiting"),
        (states.prefilling, "prefill"),
        (states.between_chunks, "prefill"),
        (states.decoding, "decode"),
        (states.holding_back, "decode"),
        (states.paused, "decode"),
    ],
)
async def test_a_cancelled_request_is_counted_in_its_phase(toy: Toy, state: State, phase: str) -> None:
    async with state(toy) as scene:
        scene.generation.close()
        scene.leave.set()
        scene.gate.open()
        scene.release()
        await until(lambda: bool(cancelled(scene.engine.statistics().requests)))
        await until_idle(scene.engine)
        requests = scene.engine.statistics().requests
        assert cancelled(requests) == {phase: 1}
        assert {name: times.count for name, times in requests.cancel.items() if times.count} == (
            {} if phase == "preparing" else {phase: 1}
        )
        assert all(0 <= times.total < 10 for times in requests.cancel.values())
        assert requests.finished["abort"] == 1
        assert scene.engine.statistics().scheduler.n_aborted == scene.is_aborted


async def test_a_request_that_is_over_cannot_be_cancelled(toy: Toy) -> None:
    async with states.over(toy) as scene:
        scene.generation.close()
        scene.leave.set()
        await until_idle(scene.engine)
        requests = scene.engine.statistics().requests
        assert ended(requests) == {"length": 1}
        assert not cancelled(requests)


async def test_the_time_until_a_slot_is_free_begins_when_the_reader_closes(toy: Toy) -> None:
    """The batch goes on, because it is not worth aborting, and ends only when the test lets it."""
    toy.capabilities["can_trim"] = False  # nothing is aborted then
    async with states.prefilling(toy) as scene:
        before = perf_counter()
        scene.generation.close()
        closed = perf_counter()
        scene.leave.set()
        await trio.testing.wait_all_tasks_blocked()
        opened = perf_counter()
        scene.gate.open()
        await until_idle(scene.engine)
        assert opened - closed <= scene.engine.statistics().requests.cancel["prefill"].total <= perf_counter() - before


async def test_a_request_that_is_prepared_is_neither_running_nor_waiting(toy: Toy) -> None:
    async with states.tokenising(toy) as scene:
        told = scene.engine.statistics()
        assert (told.preparing, told.busy, told.waiting) == (1, 0, 0)
        scene.leave.set()
        scene.release()
        scene.gate.open()
        await until_idle(scene.engine)
        await until(lambda: not scene.engine.statistics().preparing)


@pytest.mark.parametrize("state", [states.tokenising, states.waiting, states.decoding])
async def test_deadlines(toy: Toy, state: State, clock: trio.testing.MockClock) -> None:
    async with state(toy, deadline=SECONDS) as scene:
        before = ended(scene.engine.statistics().requests)
        clock.jump(SECONDS)
        scene.gate.open()
        await until(lambda: ended(scene.engine.statistics().requests) != before)
        await until_idle(scene.engine)
        requests = scene.engine.statistics().requests
        assert requests.finished["deadline"] == 1
        assert not cancelled(requests)
        scene.leave.set()
        scene.release()


async def test_a_wrong_request_is_not_counted(toy: Toy) -> None:
    async with toy.engine() as engine:
        with pytest.raises(RequestError):
            await engine.generate("x" * 100_000, truncate=False).collect()
        told = engine.statistics()
        assert not ended(told.requests)
        assert not cancelled(told.requests)
        assert told.preparing == 0


async def test_refused_requests(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=1, max_queue=0) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.generate("first", max_tokens=2).collect)
        await gate.reached(1)
        for _ in range(2):
            with pytest.raises(EngineBusy):
                await engine.generate("second").start()
        assert engine.statistics().requests.n_refused == 2
        gate.open()


async def test_a_preempted_request_goes_on_and_is_counted_once(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    background, interactive = prompts(2, 20)
    async with toy.engine(slots=1) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.generate(background, max_tokens=6, priority="background").collect)
        await gate.reached(1)
        gate.let(2)
        await gate.reached(3)
        nursery.start_soon(engine.generate(interactive, max_tokens=3).collect)
        await until(lambda: engine.statistics().generations == 2)
        gate.open()
        await until_idle(engine)
        told, requests = engine.statistics().scheduler, engine.statistics().requests
        assert told.n_preemptions == 1
        assert ended(requests) == {"length": 2}
        assert told.n_sampled == told.n_generated == 9
        assert (requests.first_token.count, requests.between_tokens.count, requests.queue.count) == (2, 7, 2)
        assert told.n_prompt_tokens == len(background) + len(interactive)


async def test_rows_that_requests_hold_and_rows_that_are_kept(toy: Toy) -> None:
    async with states.decoding(toy) as scene:
        told = scene.engine.statistics().scheduler
        assert told.n_sampled > 1
        # The token that was sampled last is not in the KV cache yet.
        assert told.n_used_tokens == told.n_cached_tokens == N_PROMPT + told.n_sampled - 1
        scene.leave.set()
        scene.gate.open()
        await until_idle(scene.engine)
        told = scene.engine.statistics().scheduler
        assert told.n_used_tokens == 0
        assert told.n_cached_tokens >= N_PROMPT


async def test_batches_and_the_slots_that_they_had(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    one, two = prompts(2, 20)
    async with toy.engine(slots=2) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.generate(one, max_tokens=5).collect)
        await gate.reached(1)
        nursery.start_soon(engine.generate(two, max_tokens=3).collect)
        await until(lambda: engine.statistics().generations == 2)
        gate.open()
        await until_idle(engine)
        told = engine.statistics().scheduler
        assert (told.n_batches, told.n_slots_used) == (5, 8)


async def test_a_sequence_that_fails(toy: Toy) -> None:
    toy.on_decode = lambda batch: Interruption(DecodeOutcome.INVALID, 0)
    async with toy.engine() as engine:
        with pytest.raises(Exception, match="refused"):
            await engine.generate("hello").collect()
        requests = engine.statistics().requests
        assert ended(requests) == {"error": 1}
        assert (requests.first_token.count, requests.latency.count) == (0, 1)


async def test_the_counters_outlive_the_model(toy: Toy) -> None:
    kept: Engine | None = None
    async with toy.engine() as engine:
        kept = engine
        await engine.generate(prompts(1, 20)[0], max_tokens=4).collect()
    told = kept.statistics()
    assert (told.status, told.scheduler.n_sampled, ended(told.requests)) == ("closed", 4, {"length": 1})
    assert told.scheduler.n_cached_tokens == told.scheduler.n_running == 0


async def test_requests_that_the_end_of_the_engine_ends(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine() as engine:
        generation = engine.generate(PROMPT)
        await generation.start()
        await gate.reached(1)
        assert engine.statistics().scheduler.n_running == 1
    assert ended(engine.statistics().requests) == {"error": 1}


async def test_time_in_the_queue_is_in_the_usage(toy: Toy) -> None:
    latch = Latch()
    first = True

    def hold(_: object) -> None:
        nonlocal first
        if first:
            first = False
            latch()

    toy.on_decode = hold
    async with toy.engine(slots=1) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.generate("first", max_tokens=1).collect)
        await latch.reached()
        second = engine.generate("second", max_tokens=1)
        before = perf_counter()
        await second.start()
        started, opened = perf_counter(), perf_counter()
        latch.open()
        await second.collect()
        assert second.usage is not None
        assert opened - started <= second.usage.queue_seconds <= perf_counter() - before
