"""A request with a deadline ends in time in every state, with the text it has, and other requests do not notice."""

from __future__ import annotations

import math

import pytest
import trio
import trio.testing

from tests.engine.inside import dispatcher_of, uid_of
from tests.engine.states import N_PROMPT, PROMPT, STATES, State, loading, over, waiting
from tests.engine.toys import Gate, Toy, prompts, until, until_idle
from trio_runner.engine.deadlines import Deadlines
from trio_runner.events import Event, Finished, Usage
from trio_runner.testing import toy_text

SECONDS = 8.0
PROMPT_BATCHES = 2
"""Batches that the first prompt of an engine takes."""


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """A clock that runs like the real one, because the decode thread is real, and that can jump."""
    return trio.testing.MockClock(rate=1)


@pytest.mark.parametrize("state", STATES)
async def test_a_deadline_ends_a_request_in_every_state(toy: Toy, clock: trio.testing.MockClock, state: State) -> None:
    async with state(toy, deadline=SECONDS) as scene:
        engine, gate = scene.engine, scene.gate
        n_batches, uid = len(gate.batches), uid_of(scene.generation)
        clock.jump(SECONDS)
        if scene.is_aborted:
            await until(lambda: gate.n_aborted == 1)
        if state is waiting:
            await until(lambda: dispatcher_of(engine).request_deadlines.moments == {})
            gate.open()  # the decode thread reads the mail between two batches of others
        if state is not loading:
            scene.release()
        events = [event async for event in scene.generation]
        scene.leave.set()
        scene.release()
        gate.open()

        last = events[-1]
        assert isinstance(last, Finished)
        assert last.reason == ("length" if state is over else "deadline")
        # Text that was held back for a stop string is certain now.
        assert "".join(event.text for event in events) == toy_text(PROMPT, last.usage.completion_tokens)
        assert uid is None or uid not in toy.uids_run(since=n_batches)
        await engine.wait_ready()
        await until(lambda: all(sampler.closed for sampler in toy.model.samplers))
        await until_idle(engine)
        assert dispatcher_of(engine).request_deadlines.moments == {}

        retry = engine.generate(PROMPT, max_tokens=40)
        assert await retry.collect() == toy_text(PROMPT, 40)
        assert retry.usage is not None
        assert retry.usage.cached_tokens >= scene.keeps


async def test_a_request_that_never_ran_has_cost_nothing(toy: Toy, clock: trio.testing.MockClock) -> None:
    async with loading(toy, deadline=SECONDS) as scene:
        clock.jump(SECONDS)
        assert [event async for event in scene.generation] == [Finished("deadline", Usage())]
        assert scene.engine.status == "loading"
        scene.leave.set()
        scene.release()
        await scene.engine.wait_ready()
        assert toy.model.samplers == []


async def test_the_time_in_the_queue_counts(toy: Toy, clock: trio.testing.MockClock) -> None:
    async with waiting(toy, deadline=SECONDS) as scene:
        clock.jump(SECONDS / 2)
        scene.gate.let(2)  # up to the last but one token of the other request
        await scene.gate.reached(3)
        clock.jump(SECONDS / 2)
        await trio.testing.wait_all_tasks_blocked()  # so that the mail arrives before the slot is free
        scene.gate.open()
        (last,) = [event async for event in scene.generation]
        scene.leave.set()
        assert isinstance(last, Finished)
        assert (last.reason, last.usage.prompt_tokens) == ("deadline", N_PROMPT)


async def test_other_requests_do_not_notice(toy: Toy, clock: trio.testing.MockClock) -> None:
    gate = Gate(toy, n_kept=30)
    toy.on_decode = gate
    (prompt,) = prompts(1, 40)
    async with toy.engine(slots=2) as engine:
        neighbour = engine.generate(prompt, max_tokens=40)
        await neighbour.start()
        gate.let(2)
        await gate.reached(3)
        hurried = engine.generate(PROMPT, deadline=SECONDS)
        await hurried.start()
        gate.let()
        await gate.reached(4)
        clock.jump(SECONDS)
        await until(lambda: gate.n_aborted == 1)
        gate.open()
        assert await hurried.collect() == ""
        assert await neighbour.collect() == toy_text(prompt, 40)


async def test_a_request_that_ends_before_its_deadline_is_not_ended_again(
    toy: Toy, clock: trio.testing.MockClock
) -> None:
    async with toy.engine() as engine:
        generation = engine.generate(PROMPT, max_tokens=5, deadline=SECONDS)
        events: list[Event] = []
        async with generation:
            async for event in generation:
                events.append(event)
        clock.jump(SECONDS)
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(events[-1], Finished)
        assert events[-1].reason == "length"
        assert dispatcher_of(engine).request_deadlines.moments == {}


async def test_deadlines_pass_in_order_and_once(autojump_clock: trio.testing.MockClock) -> None:
    passed: list[tuple[int, float]] = []
    deadlines = Deadlines(lambda uid: passed.append((uid, trio.current_time())))
    start = trio.current_time()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            deadlines.set(1, start + 30)
            nursery.start_soon(deadlines.watch)
            await trio.testing.wait_all_tasks_blocked()
            deadlines.set(2, start + 10)  # earlier than the deadline that is waited for
            deadlines.set(3, start + 20)
            deadlines.set(4, start + 20)
            deadlines.set(3, start + 40)  # replaced
            deadlines.clear(4)
            deadlines.clear(99)
            deadlines.set(5, -math.inf)  # has passed already
            await trio.sleep_until(start + 100)
            nursery.cancel_scope.cancel()
    assert passed == [(5, start), (2, start + 10), (1, start + 30), (3, start + 40)]
    assert deadlines.moments == {}


async def test_the_time_from_the_first_token_on_is_limited(toy: Toy, clock: trio.testing.MockClock) -> None:
    """Also while its text is held back, since it may be the beginning of a stop string."""
    toy.on_decode = gate = Gate(toy)
    stop = toy_text(PROMPT, 4)
    async with toy.engine() as engine:
        generation = engine.generate(PROMPT, decode_seconds=SECONDS, stop=[stop + "no"])
        await generation.start()
        await gate.reached(1)
        clock.jump(SECONDS)  # the prompt may take its time
        await trio.testing.wait_all_tasks_blocked()
        assert dispatcher_of(engine).request_deadlines.moments == {}
        gate.let(PROMPT_BATCHES)
        await until(lambda: bool(dispatcher_of(engine).request_deadlines.moments))
        gate.let(1)
        await gate.reached(PROMPT_BATCHES + 2)
        clock.jump(SECONDS)
        await until(lambda: not dispatcher_of(engine).request_deadlines.moments)
        gate.open()
        events = [event async for event in generation]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "deadline"
    assert "".join(event.text for event in events) == toy_text(PROMPT, events[-1].usage.completion_tokens)
    assert events[-1].usage.completion_tokens in (2, 3)


@pytest.mark.parametrize(("deadline", "decode_seconds"), [(SECONDS, 2 * SECONDS), (2 * SECONDS, SECONDS)])
async def test_the_earlier_of_two_limits_counts(
    toy: Toy, clock: trio.testing.MockClock, deadline: float, decode_seconds: float
) -> None:
    toy.on_decode = gate = Gate(toy)
    async with toy.engine() as engine:
        generation = engine.generate(PROMPT, deadline=deadline, decode_seconds=decode_seconds)
        async with generation:
            gate.let(PROMPT_BATCHES)
            await anext(generation)
            await gate.reached(PROMPT_BATCHES + 1)
            clock.jump(SECONDS)
            await until(lambda: not dispatcher_of(engine).request_deadlines.moments)
            gate.open()
            *_, last = [event async for event in generation]
    assert isinstance(last, Finished)
    assert last.reason == "deadline"


async def test_requests_without_a_limit_are_not_timed(toy: Toy) -> None:
    toy.on_decode = gate = Gate(toy)
    async with toy.engine() as engine, engine.generate(PROMPT, max_tokens=5) as generation:
        gate.let(PROMPT_BATCHES)
        await anext(generation)
        assert dispatcher_of(engine).request_deadlines.moments == {}
        gate.open()
