"""The reader's pace is the reader's problem, and nobody else's.

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
    """The gate keeps the decode thread from running to the end of the text before trio can say stop."""
    gate.let(N_TOKENS // 4)
    await until(lambda: is_paused(generation))
    gate.open()
    await until(lambda: engine.statistics().scheduler.n_paused == 1)


async def test_a_slow_reader_is_paused_and_the_others_are_not(toy: Toy) -> None:
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
        # It reads again, and has missed nothing.
        assert "".join([event.text async for event in generation]) == toy_text(slow, N_TOKENS)
        assert generation.usage is not None
        assert generation.usage.completion_tokens == N_TOKENS


async def test_the_backlog_is_bounded(toy: Toy) -> None:
    """By what it may be, and what the step that was running then adds."""
    (prompt,) = prompts(1, N_TOKENS)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(max_backlog=8) as engine, engine.generate(prompt, max_tokens=N_TOKENS) as generation:
        for n in range(1, N_TOKENS):
            await until(lambda n=n: is_paused(generation) or len(gate.batches) >= n)  # type: ignore[misc]
            # Its events have been handed over before the next batch may go.
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


async def test_it_goes_on_only_when_most_was_read(toy: Toy) -> None:
    """Not with every event it takes: that would be one mail for each token."""
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


async def test_a_stalled_reader_is_dropped(toy: Toy) -> None:
    slow, other = prompts(2, N_TOKENS)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=1, max_backlog=8, stall_timeout=0.05) as engine:
        async with engine.generate(slow, max_tokens=N_TOKENS) as generation:
            gate.let(N_TOKENS // 4)
            await until(lambda: engine.statistics().generations == 0)
            gate.open()
            # The slot is somebody else's now.
            assert await engine.generate(other, max_tokens=5).collect() == toy_text(other, 5)
            assert toy.model.samplers[0].closed
            text = ""
            with pytest.raises(ReaderStalled):  # noqa: PT012
                async for event in generation:
                    text += event.text
            # What had arrived until then was not lost.
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
        # Those that waited run when the first are dropped, and are dropped in their turn.
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


async def test_whoever_reads_again_has_no_deadline_any_more(toy: Toy) -> None:
    (prompt,) = prompts(1, N_TOKENS)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(max_backlog=8) as engine, engine.generate(prompt, max_tokens=N_TOKENS) as generation:
        await until_paused(engine, generation, gate)
        assert len(dispatcher_of(engine).stall_deadlines.moments) == 1
        generation.receive_nowait()
        assert dispatcher_of(engine).stall_deadlines.moments == {}
    await until_idle(engine)


async def test_every_event_that_a_slow_reader_takes_gives_it_more_time(toy: Toy) -> None:
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


async def test_a_paused_reader_that_leaves_has_no_deadline_any_more(toy: Toy) -> None:
    (prompt,) = prompts(1, N_TOKENS)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(max_backlog=8) as engine:
        async with engine.generate(prompt, max_tokens=N_TOKENS) as generation:
            await until_paused(engine, generation, gate)
        assert dispatcher_of(engine).stall_deadlines.moments == {}
        await until_idle(engine)


async def test_an_end_that_comes_while_it_is_paused_is_the_end(toy: Toy) -> None:
    """The last token was on its way when the reader fell behind: all can be read, and nothing stalls."""
    prompt = next(prompt for prompt in prompts(20, 40) if toy_text(prompt, 6).isascii())
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(max_backlog=4, stall_timeout=0.05) as engine:
        async with engine.generate(prompt, max_tokens=6) as generation:
            gate.let(5)
            # Trio does not run meanwhile, so that nobody can be paused before the last token is under way.
            while len(gate.batches) < 6:
                pass
            await until(lambda: is_paused(generation))
            gate.let()
            await until(lambda: engine.statistics().generations == 0)
            assert dispatcher_of(engine).stall_deadlines.moments == {}
            assert "".join([event.text async for event in generation]) == toy_text(prompt, 6)
        await until_idle(engine)
