"""Closing a request in any state: its slot is free by the next step, what was decoded is kept for a retry, and other
requests do not notice."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import trio
import trio.testing

from tests.engine.inside import uid_of
from tests.engine.states import N_PROMPT, PROMPT, STATES, Scene, State
from tests.engine.toys import Gate, Toy, prompts, until, until_idle
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.engine.engine import Engine
from trio_runner.events import Finished
from trio_runner.request import EmbedRequest, GenerateRequest, Priority
from trio_runner.testing import Interruption, toy_text, toy_vector

# -- the ways out -----------------------------------------------------------------------------------------------------


async def cancel_the_reader(scene: Scene) -> None:
    scene.reader.cancel()


async def leave_the_block(scene: Scene) -> None:
    scene.leave.set()


async def close_it(scene: Scene) -> None:
    """Close it from another task, wherever its reader is."""
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
async def test_closing_a_request_in_every_state_and_in_every_way(
    toy: Toy,
    state: State,
    way: Callable[[Scene], Awaitable[None]],
) -> None:
    async with state(toy) as scene:
        engine, gate, uid = scene.engine, scene.gate, uid_of(scene.generation)
        n_batches = len(gate.batches)
        await way(scene)
        await trio.testing.wait_all_tasks_blocked()
        if scene.is_aborted:
            await until(lambda: gate.n_aborted == 1)
        if way is not leave_the_block:  # the block must be entered first
            assert scene.is_abandoned()
        scene.release()
        gate.open()
        await engine.wait_ready()
        await until(lambda: all(sampler.closed for sampler in toy.model.samplers))
        await until_idle(engine)
        assert gate.n_aborted == scene.is_aborted
        # Not one more row is decoded. The batch at the gate was on its way already.
        assert uid is None or uid not in toy.uids_run(since=n_batches)

        retry = engine.generate(PROMPT, max_tokens=40)
        assert await retry.collect() == toy_text(PROMPT, 40)
        assert retry.usage is not None
        assert retry.usage.cached_tokens >= scene.keeps
        scene.generation.close()
        with pytest.raises(trio.ClosedResourceError):
            await anext(scene.generation)


async def test_decoded_tokens_are_kept_for_a_continuation(toy: Toy) -> None:
    async with toy.engine(slots=1) as engine:
        text = ""
        async with engine.generate(PROMPT) as generation:
            while len(text) < 30:
                text += (await anext(generation)).text
        await until_idle(engine)
        n_held = len(toy.context.held(0))
        assert n_held > N_PROMPT
        longer = toy_text(PROMPT, n_held + 50 - N_PROMPT)
        # U+FFFD stands for bytes that cannot be sent back as text.
        whole = longer.split("\ufffd")[0]
        retry = engine.generate(PROMPT + whole, max_tokens=1)
        await retry.collect()
        assert retry.usage is not None
        assert retry.usage.cached_tokens == min(n_held, N_PROMPT + len(whole.encode()) - 1)


@pytest.mark.parametrize("n_kept", [0, 1, 3, 4, 30, N_PROMPT, N_PROMPT + 2])
async def test_aborting_a_batch_changes_no_text_of_other_requests(toy: Toy, n_kept: int) -> None:
    """Two requests decode, one is in the middle of its prompt, and the batch also carries a prompt that is
    cancelled. However many rows were done when the batch is aborted, the others go on as if nothing had happened."""
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
        assert {len(chunk.items) for chunk in gate.batches[-1].chunks} == {1, 10, N_PROMPT}
        generation.close()
        await until(lambda: gate.n_aborted == 1)
        gate.open()
    assert texts == {prompt: toy_text(prompt, 40) for prompt in (one, other, third)}


async def test_close_wakes_the_reading_task(toy: Toy) -> None:
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
    """Its events are on their way from the decode thread, and those of a neighbour are behind them."""
    (prompt,) = prompts(1, 20)
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine() as engine:
        generation, neighbour = engine.generate(PROMPT), engine.generate(prompt, max_tokens=20)
        await generation.start()
        await neighbour.start()
        gate.let(3)
        # This task does not yield to trio, so nothing can be delivered before the close.
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


async def test_starting_and_closing_many_requests_leaves_nothing(toy: Toy) -> None:
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


async def test_every_event_may_be_read_by_another_task(toy: Toy) -> None:
    """Tokens come from a thread in small lots, and each is read by a task of its own."""
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


async def test_cancelling_an_embedding(toy: Toy) -> None:
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
async def test_cancelling_a_list_of_embeddings(toy: Toy, n_texts: int) -> None:
    """One runs, some wait, the last were not submitted yet."""
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


CAPABILITIES: list[dict[str, object]] = [{}, {"can_trim": False}, {"embeds_last_row": True}, {"can_shift": False}]


class Storm:
    """Requests that come and go as a seed says, beside some that stay. Now and then the context aborts or refuses a
    batch."""

    def __init__(self, toy: Toy, seed: int) -> None:
        toy.capabilities = CAPABILITIES[seed % len(CAPABILITIES)]
        toy.on_decode = self.interrupt
        self.toy = toy
        self.chance = random.Random(seed)
        self.in_the_context = random.Random(seed)
        self.texts: dict[str, str] = {}
        self.n_gone = 0
        self.engine: Engine

    def interrupt(self, batch: Batch) -> Interruption | None:
        what = self.in_the_context.random()
        if self.toy.context.aborted_number == batch.number or what < 0.1:
            return Interruption(DecodeOutcome.ABORTED, self.in_the_context.randrange(batch.n_rows + 1))
        return Interruption(DecodeOutcome.NO_KV_SPACE) if what < 0.15 else None

    def a_request(self, prompt: str) -> GenerateRequest:
        return GenerateRequest(
            prompt=prompt,
            max_tokens=self.chance.choice([None, 1, 100]),
            priority=self.chance.choice(["interactive", "background"]),
            cache_prompt=self.chance.random() < 0.8,
        )

    async def stay(self, prompt: str) -> None:
        priority: Priority = self.chance.choice(["interactive", "background"])
        generation = self.engine.generate(prompt, max_tokens=40, priority=priority, deadline=1000)
        self.texts[prompt] = await generation.collect()

    async def read_some(self, prompt: str, n_events: int) -> None:
        async with self.engine.generate(self.a_request(prompt)) as generation:
            for _ in range(n_events):
                await anext(generation)
        self.n_gone += 1

    async def be_cancelled(self, use: Callable[[], Awaitable[object]], n_turns: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            for _ in range(n_turns):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        self.n_gone += 1

    async def run_out_of_time(self, prompt: str, seconds: float) -> None:
        generation = self.engine.generate(replace(self.a_request(prompt), deadline=seconds))
        text = await generation.collect()
        assert generation.usage is not None
        assert text == toy_text(prompt, generation.usage.completion_tokens)
        self.n_gone += 1

    async def embed(self, text: str) -> None:
        (vector,) = await self.engine.embed([text])
        np.testing.assert_array_equal(vector, toy_vector(list(text.encode())))

    def start_one_that_goes(self, nursery: trio.Nursery, prompt: str) -> None:
        n_turns = self.chance.randrange(60)
        match self.chance.randrange(5):
            case 0:
                nursery.start_soon(self.read_some, prompt, n_turns % 2)
            case 1 | 2:
                generation = self.engine.generate(self.a_request(prompt))
                nursery.start_soon(self.be_cancelled, generation.collect, n_turns)
            case 3:
                nursery.start_soon(self.run_out_of_time, prompt, 0.001 + n_turns / 1000)
            case _:
                nursery.start_soon(self.be_cancelled, partial(self.embed, prompt[:30]), n_turns)
                nursery.start_soon(self.embed, prompt[-30:])


@pytest.mark.parametrize("seed", range(16))
async def test_requests_that_stay_do_not_notice_those_that_go(toy: Toy, seed: int) -> None:
    storm = Storm(toy, seed)
    stays = {prompt: toy_text(prompt, 40) for prompt in prompts(8, 40)}
    async with toy.engine(slots=3, batch_size=32, max_backlog=8, step_target=0.02) as engine:
        storm.engine = engine
        async with trio.open_nursery() as nursery:
            for prompt in stays:
                nursery.start_soon(storm.stay, prompt)
                for _ in range(8):
                    # Some begin like another one, so that slots are shared and forked.
                    start = storm.chance.choice([prompt, PROMPT, storm.chance.choice(list(stays))])
                    storm.start_one_that_goes(nursery, f"{start}{storm.chance.choice('xyz')}")
        assert storm.texts == stays
        assert storm.n_gone == 64
        await until_idle(engine)
        statistics = engine.statistics().scheduler
        assert statistics.n_paused == statistics.n_preempted == 0
