"""Letting go of a request, whatever it is doing: its slot is free by the next step, what was decoded is kept for the
retry, and nobody else notices."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from tests.engine.toys import Gate, Latch, Toy, prompts, until, until_idle
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.events import Finished
from trio_runner.request import EmbedRequest
from trio_runner.testing import Interruption, toy_text

PROMPT = "a prompt that is long enough to be worth breaking off in the middle of it, 15"
"""The toy has 197 tokens to say to this."""
N_PROMPT = len(PROMPT)
N_KEPT = 20
"""Rows that are done when a batch is broken off."""


@dataclass
class Scene:
    """A request that has come to the state under test; `keeps` tokens of it are in the KV cache."""

    engine: Engine
    generation: Generation
    gate: Gate
    keeps: int = 0
    is_broken_off: bool = False
    release: Callable[[], None] = lambda: None
    """Lets go on what holds it, where that is not the gate."""
    reader: trio.CancelScope = field(default_factory=trio.CancelScope)
    leave: trio.Event = field(default_factory=trio.Event)

    async def read(self) -> None:
        with self.reader:
            async with self.generation:
                await self.leave.wait()


# -- the states -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _in_state(toy: Toy, request: dict[str, Any], options: dict[str, Any], **facts: Any) -> AsyncIterator[Scene]:
    gate = Gate(toy, n_kept=N_KEPT)
    toy.on_decode = gate
    async with toy.engine(slots=1, **options) as engine, trio.open_nursery() as nursery:
        scene = Scene(engine, engine.generate(PROMPT, **request), gate, **facts)
        nursery.start_soon(scene.read)
        yield scene


@asynccontextmanager
async def loading(toy: Toy) -> AsyncIterator[Scene]:
    toy.on_load = latch = Latch()
    async with _in_state(toy, {}, {"wait": False}, release=latch.open) as scene:
        await latch.reached()
        yield scene


@asynccontextmanager
async def tokenising(toy: Toy) -> AsyncIterator[Scene]:
    toy.on_tokenize = latch = Latch()
    async with _in_state(toy, {}, {}, release=latch.open) as scene:
        await latch.reached()
        yield scene


@asynccontextmanager
async def waiting(toy: Toy) -> AsyncIterator[Scene]:
    toy.on_tokenize = latch = Latch()
    async with _in_state(toy, {}, {}) as scene:
        await latch.reached()
        # Whoever needs no tokeniser overtakes it.
        somebody_else = scene.engine.generate(list(b"somebody else"), max_tokens=3)
        await somebody_else.start()
        await scene.gate.reached(1)
        latch.open()
        await until(lambda: scene.engine.statistics().generations == 2)
        yield scene


@asynccontextmanager
async def prefilling(toy: Toy) -> AsyncIterator[Scene]:
    async with _in_state(toy, {}, {}, keeps=N_KEPT, is_broken_off=True) as scene:
        await scene.gate.reached(1)
        yield scene


@asynccontextmanager
async def between_chunks(toy: Toy) -> AsyncIterator[Scene]:
    """The chunk that runs is small, but nobody else wants it; the next one must not come."""
    async with _in_state(toy, {}, {"batch_size": 8}, keeps=16, is_broken_off=True) as scene:
        scene.gate.let()
        await scene.gate.reached(2)
        yield scene


@asynccontextmanager
async def decoding(toy: Toy) -> AsyncIterator[Scene]:
    async with _in_state(toy, {}, {}, keeps=N_PROMPT - 1, is_broken_off=True) as scene:
        scene.gate.let(5)
        await scene.gate.reached(6)
        yield scene


@asynccontextmanager
async def holding_back(toy: Toy) -> AsyncIterator[Scene]:
    """All its text so far may turn out to be the start of a stop string."""
    request = {"stop": toy_text(PROMPT, 10) + " and more"}
    async with _in_state(toy, request, {}, keeps=N_PROMPT - 1, is_broken_off=True) as scene:
        scene.gate.let(5)
        await scene.gate.reached(6)
        assert scene.generation.receive_nowait() == []
        yield scene


@asynccontextmanager
async def paused(toy: Toy) -> AsyncIterator[Scene]:
    async with _in_state(toy, {}, {"max_backlog": 2}, keeps=N_PROMPT - 1) as scene:
        # Eight tokens are too many to leave unread. A ninth may be on its way by the time that is known.
        scene.gate.let(8)
        await until(lambda: scene.generation._paused)
        scene.gate.let()
        await until(lambda: scene.engine.statistics().scheduler.n_paused == 1)
        yield scene


@asynccontextmanager
async def over(toy: Toy) -> AsyncIterator[Scene]:
    async with _in_state(toy, {"max_tokens": 5}, {}, keeps=N_PROMPT - 1) as scene:
        scene.gate.open()
        await until(lambda: len(scene.gate.batches) >= 5)
        await until_idle(scene.engine)
        yield scene


STATES = [loading, tokenising, waiting, prefilling, between_chunks, decoding, holding_back, paused, over]


# -- the ways out -----------------------------------------------------------------------------------------------------


async def cancel_the_reader(scene: Scene) -> None:
    scene.reader.cancel()


async def leave_the_block(scene: Scene) -> None:
    scene.leave.set()


async def close_it(scene: Scene) -> None:
    """From another task, while the reader is wherever it is."""
    scene.generation.close()
    scene.leave.set()


async def close_it_twice(scene: Scene) -> None:
    scene.generation.close()
    await close_it(scene)


async def close_it_while_cancelled(scene: Scene) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.sleep_forever()
        finally:
            await close_it(scene)


WAYS = [cancel_the_reader, leave_the_block, close_it, close_it_twice, close_it_while_cancelled]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
async def test_let_go(
    toy: Toy,
    state: Callable[[Toy], AbstractAsyncContextManager[Scene]],
    way: Callable[[Scene], Awaitable[None]],
) -> None:
    async with state(toy) as scene:
        engine, gate, uid = scene.engine, scene.gate, scene.generation._uid
        n_batches = len(gate.batches)
        await way(scene)
        await trio.testing.wait_all_tasks_blocked()
        if scene.is_broken_off:
            await until(lambda: gate.n_aborted == 1)
        scene.release()
        gate.open()
        await engine.wait_ready()
        await until(lambda: all(sampler.closed for sampler in toy.model.samplers))
        await until_idle(engine)
        assert gate.n_aborted == scene.is_broken_off
        # Not one more row. What stands at the gate was on its way already.
        assert uid is None or uid not in toy.uids_run(since=n_batches)

        retry = engine.generate(PROMPT, max_tokens=40)
        assert await retry.collect() == toy_text(PROMPT, 40)
        assert retry.usage is not None
        assert retry.usage.cached_tokens >= scene.keeps
        scene.generation.close()
        with pytest.raises(trio.ClosedResourceError):
            await anext(scene.generation)


async def test_what_was_decoded_is_kept_for_the_continuation(toy: Toy) -> None:
    async with toy.engine(slots=1) as engine:
        text = ""
        async with engine.generate(PROMPT) as generation:
            while len(text) < 30:
                text += (await anext(generation)).text
        await until_idle(engine)
        n_held = len(toy.context.held(0))
        assert n_held > N_PROMPT
        longer = toy_text(PROMPT, n_held + 50 - N_PROMPT)
        # U+FFFD stands for bytes that cannot be given back as text.
        whole = longer.split("\ufffd")[0]
        retry = engine.generate(PROMPT + whole, max_tokens=1)
        await retry.collect()
        assert retry.usage is not None
        assert retry.usage.cached_tokens == min(n_held, N_PROMPT + len(whole.encode()) - 1)


@pytest.mark.parametrize("n_kept", [0, 1, 3, 4, 30, N_PROMPT, N_PROMPT + 2])
async def test_breaking_off_a_batch_changes_no_text_of_the_others(toy: Toy, n_kept: int) -> None:
    """Two decode, one is in the middle of its prompt, and the batch also carries a prompt that is cancelled. Whatever
    was done when it is broken off, even all of it, the others go on as if nothing had been."""
    gate = Gate(toy, n_kept=n_kept)
    toy.on_decode = gate
    texts: dict[str, str] = {}
    one, other, third = prompts(3, 40)

    async def read(engine: Engine, prompt: str) -> None:
        texts[prompt] = await engine.generate(prompt, max_tokens=40, cache_prompt=False).collect()

    async with toy.engine(slots=4, step_target=1) as engine, trio.open_nursery() as nursery:
        for prompt in (one, other):
            nursery.start_soon(read, engine, prompt)
        await until(lambda: engine.statistics().generations == 2)
        gate.let(3)
        await gate.reached(4)
        generation = engine.generate(PROMPT)
        await generation.start()
        nursery.start_soon(read, engine, third)
        await until(lambda: engine.statistics().generations == 4)
        gate.let()
        await gate.reached(5)
        assert {len(chunk.tokens) for chunk in gate.batches[-1].chunks} == {1, 10, N_PROMPT}
        generation.close()
        await until(lambda: gate.n_aborted == 1)
        gate.open()
    assert texts == {prompt: toy_text(prompt, 40) for prompt in (one, other, third)}


async def test_close_wakes_the_task_that_reads(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine() as engine:
        generation = engine.generate(PROMPT)

        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await anext(generation)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await gate.reached(1)
            generation.close()
        gate.open()
        await until_idle(engine)


async def test_nothing_is_delivered_after_close(toy: Toy) -> None:
    """Its events are on their way from the decode thread, with those of a neighbour behind them."""
    (prompt,) = prompts(1, 20)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine() as engine:
        generation, neighbour = engine.generate(PROMPT), engine.generate(prompt, max_tokens=20)
        await generation.start()
        await neighbour.start()
        gate.let(3)
        # This task does not let trio run, so that nothing can be handed over before the close.
        while len(toy.context.batches) < 4:
            pass
        generation.close()
        gate.open()
        assert await neighbour.collect() == toy_text(prompt, 20)
        with pytest.raises(trio.ClosedResourceError):
            generation.receive_nowait()
        await until_idle(engine)


async def test_a_scope_cancels_all_its_readers(toy: Toy) -> None:
    n_read = 0

    async def read(engine: Engine, prompt: str) -> None:
        nonlocal n_read
        async with engine.generate(prompt) as generation:
            async for _ in generation:
                n_read += 1

    async with toy.engine(slots=2) as engine:
        async with trio.open_nursery() as nursery:
            for prompt in prompts(6, 100):
                nursery.start_soon(read, engine, prompt)
            await until(lambda: n_read > 20)
            nursery.cancel_scope.cancel()
        assert engine.statistics().generations == 0
        await until_idle(engine)
        assert await engine.generate(PROMPT, max_tokens=30).collect() == toy_text(PROMPT, 30)


async def test_making_and_closing_quickly_leaves_nothing(toy: Toy) -> None:
    async with toy.engine(slots=2) as engine:
        for n in range(200):
            generation = engine.generate(f"{PROMPT} {n % 7}")
            await generation.start()
            if n % 3 == 0:
                await anext(generation)
            generation.close()
        assert engine.statistics().generations == 0
        assert len(toy.model.samplers) == 200
        await until(lambda: all(sampler.closed for sampler in toy.model.samplers))
        await until_idle(engine)
        assert await engine.generate(PROMPT, max_tokens=30).collect() == toy_text(PROMPT, 30)


async def test_order_and_text_with_a_reader_in_another_task(toy: Toy) -> None:
    """Tokens come from a thread in many small lots, and are taken one by one by whoever wants one."""
    (prompt,) = prompts(1, 200)
    text: list[str] = []

    async with toy.engine(max_backlog=4) as engine, engine.generate(prompt, max_tokens=200) as generation:

        async def take_one() -> None:
            event = await anext(generation)
            text.append(event.text)
            finished.append(isinstance(event, Finished))

        finished = [False]
        while not finished[-1]:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(take_one)
    assert "".join(text) == toy_text(prompt, 200)


# -- embeddings -------------------------------------------------------------------------------------------------------


async def test_an_embedding_in_flight(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=1) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.embed_request, EmbedRequest(content=PROMPT))
        await gate.reached(1)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await until(lambda: gate.n_aborted == 1)
            gate.open()
            await until_idle(engine)
            assert len(gate.batches) == 1
            assert await engine.generate(PROMPT, max_tokens=30).collect() == toy_text(PROMPT, 30)


@pytest.mark.parametrize("n_texts", [1, 2, 5, 20])
async def test_a_list_of_embeddings_in_flight(toy: Toy, n_texts: int) -> None:
    """One runs, some wait, the last are not even asked for."""
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=1) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.embed, [f"{PROMPT} {n}" for n in range(n_texts)])
            await gate.reached(1)
            await until(lambda: engine.statistics().generations == min(n_texts, 2))
            nursery.cancel_scope.cancel()
        assert engine.statistics().generations == 0
        gate.open()
        await until_idle(engine)
        assert len(gate.batches) == 1


# -- by chance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
async def test_who_stays_does_not_notice_who_goes(toy: Toy, seed: int) -> None:
    """Readers come and go as a seed says, in a context that breaks off or refuses batches now and then."""
    chance = random.Random(seed)
    in_the_context = random.Random(seed)

    def interrupt(batch: Batch) -> Interruption | None:
        what = in_the_context.random()
        if toy.context.aborted_number == batch.number or what < 0.1:
            return Interruption(DecodeOutcome.ABORTED, in_the_context.randrange(batch.n_rows + 1))
        if what < 0.15:
            return Interruption(DecodeOutcome.NO_KV_SPACE)
        return None

    toy.on_decode = interrupt
    stays = {prompt: toy_text(prompt, 40) for prompt in prompts(8, 40)}
    texts: dict[str, str] = {}

    async def stay(engine: Engine, prompt: str) -> None:
        texts[prompt] = await engine.generate(prompt, max_tokens=40).collect()

    async def go(engine: Engine, prompt: str, n_events: int) -> None:
        async with engine.generate(prompt) as generation:
            for _ in range(n_events):
                await anext(generation)

    async def be_cancelled(engine: Engine, prompt: str, n_turns: int) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.generate(prompt).collect)
                for _ in range(n_turns):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

    async with toy.engine(slots=3, batch_size=32) as engine:
        async with trio.open_nursery() as nursery:
            for prompt in stays:
                nursery.start_soon(stay, engine, prompt)
                for _ in range(3):
                    # Some start as another one does, so that slots are shared and forked.
                    start = chance.choice([prompt, PROMPT, chance.choice(list(stays))])
                    nursery.start_soon(go, engine, f"{start}{chance.choice('xyz')}", chance.randrange(2))
                    nursery.start_soon(be_cancelled, engine, start + PROMPT, chance.randrange(60))
        assert texts == stays
        await until_idle(engine)
