"""A slow reader slows its own generation down, and no other.

The clock is the real one here: trio's mock clock would jump while the decode thread works.
"""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.engine.inside import dispatcher_of, is_paused, n_unread, uid_of
from tests.engine.toys import Gate, Toy, prompts, until, until_idle
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.errors import ReaderStalled
from trio_runner.testing import toy_text

N_TOKENS = 200


async def until_paused(engine: Engine, generation: Generation, gate: Gate) -> None:
    """Wait until the generation is paused. The gate keeps the decode thread from finishing the text before that."""
    gate.let(N_TOKENS // 4)
    await until(lambda: is_paused(generation))
    gate.open()
    await until(lambda: engine.statistics().scheduler.n_paused == 1)


async def test_a_slow_reader_is_paused_and_others_are_not(toy: Toy) -> None:
    slow, *others = prompts(4, N_TOKENS)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=4, max_backlog=8) as engine, engine.generate(slow, max_tokens=N_TOKENS) as generation:
        await until_paused(engine, generation, gate)
        n_batches = len(gate.batches)
        uid = uid_of(generation)
        for prompt in others:
            assert await engine.generate(prompt, max_tokens=N_TOKENS).collect() == toy_text(prompt, N_TOKENS)
        assert uid not in toy.uids_run(since=n_batches)
        assert engine.statistics().scheduler.n_paused == 1
        assert engine.statistics().busy == 1
        # It reads on, and has missed nothing.
        assert "".join([event.text async for event in generation]) == toy_text(slow, N_TOKENS)
        assert generation.usage is not None
        assert generation.usage.completion_tokens == N_TOKENS


async def test_the_backlog_is_bounded(toy: Toy) -> None:
    """Its bound is `max_backlog` and the events of the step that runs meanwhile."""
    (prompt,) = prompts(1, N_TOKENS)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(max_backlog=8) as engine, engine.generate(prompt, max_tokens=N_TOKENS) as generation:
        for n in range(1, N_TOKENS):
            await until(lambda n=n: is_paused(generation) or len(gate.batches) >= n)  # type: ignore[misc]
            # Its events are delivered before the next batch may run.
            await trio.testing.wait_all_tasks_blocked()
            if is_paused(generation):
                break
            gate.let()
        gate.open()
        await until(lambda: engine.statistics().scheduler.n_paused == 1)
        await trio.testing.wait_all_tasks_blocked()
        events = generation.receive_nowait()
        assert 9 <= len(events) <= 10
        text = "".join(event.text for event in events)
        assert text + "".join([event.text async for event in generation]) == toy_text(prompt, N_TOKENS)


async def test_a_paused_generation_resumes_only_when_most_was_read(toy: Toy) -> None:
    """Otherwise there would be one mail for each token."""
    (prompt,) = prompts(1, N_TOKENS)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(max_backlog=16) as engine, engine.generate(prompt, max_tokens=N_TOKENS) as generation:
        await until_paused(engine, generation, gate)
        while n_unread(generation) > 5:
            await anext(generation)
            assert is_paused(generation)
        await anext(generation)
        assert not is_paused(generation)


@pytest.mark.parametrize("max_backlog", [1, 2, 3, 7])
async def test_pausing_all_the_time_loses_nothing(toy: Toy, max_backlog: int) -> None:
    texts: dict[str, str] = {}

    async def read(engine: Engine, prompt: str) -> None:
        text = ""
        async with engine.generate(prompt, max_tokens=N_TOKENS) as generation:
            async for event in generation:
                text += event.text + "".join(event.text for event in generation.receive_nowait())
                await trio.testing.wait_all_tasks_blocked()
        texts[prompt] = text

    async with toy.engine(slots=2, max_backlog=max_backlog) as engine, trio.open_nursery() as nursery:
        for prompt in prompts(2, N_TOKENS):
            nursery.start_soon(read, engine, prompt)
    assert texts == {prompt: toy_text(prompt, N_TOKENS) for prompt in prompts(2, N_TOKENS)}


async def test_a_generation_with_a_stalled_reader_is_ended(toy: Toy) -> None:
    slow, other = prompts(2, N_TOKENS)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=1, max_backlog=8, stall_timeout=0.05) as engine:
        async with engine.generate(slow, max_tokens=N_TOKENS) as generation:
            gate.let(N_TOKENS // 4)
            await until(lambda: engine.statistics().generations == 0)
            gate.open()
            # Another request has the slot now.
            assert await engine.generate(other, max_tokens=5).collect() == toy_text(other, 5)
            assert toy.model.samplers[0].closed
            text = ""
            with pytest.raises(ReaderStalled):  # noqa: PT012
                async for event in generation:
                    text += event.text
            # No event that had arrived is lost.
            assert len(text) >= 8
            assert toy_text(slow, N_TOKENS).startswith(text)
            with pytest.raises(StopAsyncIteration):
                await anext(generation)
        await until_idle(engine)
        retry = engine.generate(slow, max_tokens=N_TOKENS)
        assert await retry.collect() == toy_text(slow, N_TOKENS)


async def test_each_of_many_stalled_readers_has_its_own_deadline(toy: Toy) -> None:
    async with toy.engine(slots=3, max_backlog=4, stall_timeout=0.05) as engine:
        generations = [engine.generate(prompt) for prompt in prompts(6, N_TOKENS)]
        for generation in generations:
            await generation.start()
        # The waiting ones run after the first ones have ended, and end in the same way.
        await until_idle(engine)
        await until(lambda: engine.statistics().generations == 0)
    for generation in generations:
        text = ""
        try:
            async for event in generation:
                text += event.text
        except ReaderStalled:
            pass
        assert text
        assert toy_text(prompts(6, N_TOKENS)[generations.index(generation)], 1000).startswith(text)


async def test_a_reader_that_catches_up_has_no_stall_deadline_any_more(toy: Toy) -> None:
    (prompt,) = prompts(1, N_TOKENS)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(max_backlog=8) as engine, engine.generate(prompt, max_tokens=N_TOKENS) as generation:
        await until_paused(engine, generation, gate)
        assert len(dispatcher_of(engine).stall_deadlines.moments) == 1
        generation.receive_nowait()
        assert dispatcher_of(engine).stall_deadlines.moments == {}
    await until_idle(engine)


async def test_every_event_that_a_slow_reader_takes_extends_its_stall_deadline(toy: Toy) -> None:
    (prompt,) = prompts(1, N_TOKENS)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(max_backlog=8) as engine, engine.generate(prompt, max_tokens=N_TOKENS) as generation:
        await until_paused(engine, generation, gate)
        (before,) = dispatcher_of(engine).stall_deadlines.moments.values()
        await until(lambda: trio.current_time() > before - engine.config.stall_timeout)
        await anext(generation)
        assert is_paused(generation)
        (after,) = dispatcher_of(engine).stall_deadlines.moments.values()
        assert after > before
    await until_idle(engine)


async def test_closing_a_paused_generation_clears_its_stall_deadline(toy: Toy) -> None:
    (prompt,) = prompts(1, N_TOKENS)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(max_backlog=8) as engine:
        async with engine.generate(prompt, max_tokens=N_TOKENS) as generation:
            await until_paused(engine, generation, gate)
        assert dispatcher_of(engine).stall_deadlines.moments == {}
        await until_idle(engine)


async def test_a_text_that_ends_while_its_reader_is_paused(toy: Toy) -> None:
    """The last token was on its way when the reader fell behind. All can be read, and nothing stalls."""
    prompt = next(prompt for prompt in prompts(20, 40) if toy_text(prompt, 6).isascii())
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(max_backlog=4, stall_timeout=0.05) as engine:
        async with engine.generate(prompt, max_tokens=6) as generation:
            gate.let(5)
            # This task does not yield to trio, so nothing is paused before the last token is on its way.
            while len(gate.batches) < 6:
                pass
            await until(lambda: is_paused(generation))
            gate.let()
            await until(lambda: engine.statistics().generations == 0)
            assert dispatcher_of(engine).stall_deadlines.moments == {}
            assert "".join([event.text async for event in generation]) == toy_text(prompt, 6)
        await until_idle(engine)
