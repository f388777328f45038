"""Adapters that are unloaded: requests that have one keep it, and it is closed after the last of them."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.engine.lora import chosen, said, with_adapters
from tests.engine.toys import (
    DEADLINE,
    HOLD_SECONDS,
    Gate,
    Latch,
    Toy,
    is_idle,
    prompts,
    until,
)
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.errors import EngineBroken, NativeError, UnknownAdapter
from trio_runner.front_door import open_engine
from trio_runner.info import AdapterInfo
from trio_runner.request import EmbedRequest, Priority
from trio_runner.testing import Interruption, ToyAdapter


@asynccontextmanager
async def four_requests_with_an_unloaded_adapter(
    toy: Toy,
) -> AsyncIterator[tuple[Engine, Gate, list[Generation], ToyAdapter]]:
    """One request runs, one was preempted by it, two wait. Then their adapter is unloaded."""
    with_adapters(toy)
    toy.on_decode = gate = Gate(toy)
    async with toy.engine(slots=1) as engine:
        generations: list[Generation] = []
        for n, prompt in enumerate(prompts(4, 30)):
            priority: Priority = "background" if n in (0, 3) else "interactive"
            generation = engine.generate(prompt, max_tokens=30, adapters=chosen(one=1), priority=priority)
            await generation.start()
            generations.append(generation)
            if n == 0:
                await gate.reached(1)
        gate.let(2)
        await gate.reached(3)
        assert engine.statistics().scheduler.n_preempted == 1
        assert engine.unload_adapter("one") == AdapterInfo("one", "/lora/one.gguf", 1.0)
        yield engine, gate, generations, toy.model.adapters[0]


async def test_a_later_request_cannot_choose_an_unloaded_adapter(toy: Toy) -> None:
    async with four_requests_with_an_unloaded_adapter(toy) as (engine, gate, _, adapter):
        with pytest.raises(UnknownAdapter):
            await engine.generate("hello", adapters=chosen(one=1)).start()
        assert [info.name for info in engine.adapters] == ["two", "three"]
        # A request that chooses nothing gets the adapters that are left.
        other = engine.generate("hello", max_tokens=20)
        await other.start()
        assert not adapter.closed
        gate.open()
        assert await other.collect() == said("hello", three=-0.5)


async def test_an_adapter_is_closed_when_the_last_request_with_it_ends(toy: Toy) -> None:
    """The toy checks that it is not closed before."""
    async with four_requests_with_an_unloaded_adapter(toy) as (_, gate, generations, adapter):
        gate.open()
        for generation, prompt in zip(generations, prompts(4, 30), strict=True):
            assert await generation.collect() == said(prompt, 30, one=1)
        assert adapter.closed
        assert not any(other.closed for other in toy.model.adapters[1:])


@pytest.mark.parametrize("stays", range(4))
async def test_an_adapter_is_closed_when_the_last_request_with_it_is_closed(toy: Toy, stays: int) -> None:
    async with four_requests_with_an_unloaded_adapter(toy) as (engine, gate, generations, adapter):
        for generation in generations:
            if generation is not generations[stays]:
                generation.close()
        gate.let()
        await until(lambda: engine.statistics().busy + engine.statistics().waiting == 1)
        assert not adapter.closed
        generations[stays].close()
        gate.open()
        await until(lambda: adapter.closed)


async def test_requests_go_on_with_an_unloaded_adapter(toy: Toy) -> None:
    with_adapters(toy)
    async with toy.engine(slots=2) as engine:
        generations = [engine.generate(prompt, max_tokens=30, adapters=chosen(one=1)) for prompt in prompts(4, 30)]
        for generation in generations:
            await generation.start()
        engine.unload_adapter("one")
        for generation, prompt in zip(generations, prompts(4, 30), strict=True):
            assert await generation.collect() == said(prompt, 30, one=1)


async def test_an_unused_adapter_is_closed_at_once(toy: Toy) -> None:
    with_adapters(toy)
    async with toy.engine() as engine:
        await engine.generate("hello", max_tokens=5, adapters=chosen(one=1)).collect()
        engine.unload_adapter("one")
        await until(lambda: toy.model.adapters[0].closed)
        for name in ("one", "four"):
            with pytest.raises(UnknownAdapter) as caught:
                engine.unload_adapter(name)
            assert (caught.value.name, caught.value.param) == (name, "name")


@pytest.mark.parametrize("how", ["deadline", "failure", "embedding"])
async def test_every_end_of_a_request_gives_its_adapter_back(toy: Toy, how: str) -> None:
    with_adapters(toy)
    gate = Gate(toy)

    def decode(batch: Batch) -> Interruption | None:
        return gate(batch) or (Interruption(DecodeOutcome.INVALID) if how == "failure" else None)

    toy.on_decode = decode
    async with toy.engine() as engine, trio.open_nursery() as nursery:
        if how == "embedding":
            nursery.start_soon(engine.embed_request, EmbedRequest(content="hello", adapters=chosen(one=1)))
        else:
            deadline = 0.05 if how == "deadline" else None
            await engine.generate("hello", adapters=chosen(one=1), deadline=deadline).start()
        await gate.reached(1)
        engine.unload_adapter("one")
        assert not toy.model.adapters[0].closed
        gate.open()
        await until(lambda: toy.model.adapters[0].closed)


async def test_closing_the_engine_closes_adapters_in_use(toy: Toy) -> None:
    with_adapters(toy)
    toy.on_decode = gate = Gate(toy)
    async with toy.engine(slots=1) as engine:
        for prompt in prompts(2, 30):
            await engine.generate(prompt, adapters=chosen(one=1, two=1)).start()
        await gate.reached(1)
        engine.unload_adapter("one")
        assert not toy.model.adapters[0].closed
    assert all(adapter.closed for adapter in toy.model.adapters)


async def test_an_adapter_unloaded_after_the_decode_thread_died_is_closed(toy: Toy) -> None:
    """The trio thread does not know of the death yet."""
    with_adapters(toy)
    dead = threading.Event()

    def die(batch: Batch) -> None:
        dead.set()
        raise NativeError("decode", 1, "a bug")

    toy.on_decode = die
    with trio.fail_after(DEADLINE), pytest.raises(EngineBroken):  # noqa: PT012
        async with open_engine(toy) as engine:
            await engine.generate("hello").start()
            assert dead.wait(HOLD_SECONDS)  # the event loop does not run meanwhile
            engine.unload_adapter("one")
            await trio.sleep_forever()
    assert toy.model.adapters[0].closed


async def test_an_adapter_unloaded_while_its_request_is_tokenised(toy: Toy) -> None:
    with_adapters(toy)
    toy.on_tokenize = latch = Latch()

    async def ask(engine: Engine) -> None:
        with pytest.raises(UnknownAdapter) as caught:
            await engine.generate("hello", adapters=chosen(two=1)).start()
        assert caught.value.name == "two"

    async with toy.engine() as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, engine)
            await latch.reached()
            engine.unload_adapter("two")
            latch.open()
        assert [sampler.closed for sampler in toy.model.samplers] == [True]
        assert is_idle(engine)


async def test_the_same_name_again_is_another_adapter(toy: Toy) -> None:
    with_adapters(toy)
    (prompt,) = prompts(1, 30)
    toy.on_decode = gate = Gate(toy)
    async with toy.engine() as engine:
        old = engine.generate(prompt, max_tokens=30, adapters=chosen(one=1))
        await old.start()
        await gate.reached(1)
        engine.unload_adapter("one")
        await engine.load_adapter("/lora/other.gguf", name="one")
        new = engine.generate(prompt, max_tokens=30, adapters=chosen(one=1))
        await new.start()
        gate.open()
        assert await old.collect() == said(prompt, 30, one=1)
        assert await new.collect() == said(prompt, 30, other=1)
        assert new.usage is not None
        assert new.usage.cached_tokens == 0
        # Even the same path is another adapter: the file may have changed.
        engine.unload_adapter("one")
        await engine.load_adapter("/lora/other.gguf", name="one")
        again = engine.generate(prompt, max_tokens=30, adapters=chosen(one=1))
        assert await again.collect() == said(prompt, 30, other=1)
        assert again.usage is not None
        assert again.usage.cached_tokens == 0
