"""A decode thread that dies: every request and the block end with `EngineBroken`."""

# ruff: noqa: PT012 - what raises here is the end of a block

from __future__ import annotations

import threading

import pytest
import trio
import trio.testing

from tests.engine.toys import (
    DEADLINE,
    HOLD_SECONDS,
    Gate,
    Latch,
    Toy,
    prompts,
    until,
)
from trio_runner.core.batch import Batch
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.errors import EngineBroken, NativeError, RunnerError
from trio_runner.front_door import open_engine
from trio_runner.testing import ToySampler, toy_text


def die(batch: Batch) -> None:
    raise NativeError("decode", -3, "out of memory")


async def test_a_dead_decode_thread_ends_every_request_and_the_block(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    one, other = prompts(2, 60)
    errors: list[RunnerError] = []
    texts: list[str] = []

    async def read(generation: Generation) -> None:
        text = ""
        try:
            async for event in generation:
                text += event.text
        except RunnerError as error:
            errors.append(error)
        texts.append(text)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            with pytest.raises(EngineBroken) as caught:
                async with open_engine(toy, slots=1) as engine:
                    for prompt in (one, other):
                        generation = engine.generate(prompt)
                        await generation.start()
                        nursery.start_soon(read, generation)
                    gate.let(4)
                    await gate.reached(5)
                    toy.context.on_decode = die
                    gate.open()
                    await trio.sleep_forever()
            assert isinstance(caught.value.__cause__, NativeError)
    assert engine.status == "broken"
    assert isinstance(engine.failure, NativeError)
    assert [type(error) for error in errors] == [EngineBroken] * 2
    assert len({id(error) for error in errors}) == 2
    assert all(error.__cause__ is engine.failure for error in errors)
    assert sorted(texts) == ["", toy_text(one, 5)]
    with pytest.raises(EngineBroken):
        await engine.generate("hello").start()
    with pytest.raises(EngineBroken):
        await engine.embed(["hello"])
    with pytest.raises(EngineBroken):
        _ = engine.info


async def test_a_reader_in_the_block_and_the_engine_raise_one_error(toy: Toy) -> None:
    """The reader's error and the engine's own leave the block together, as one EngineBroken and not as a group."""
    toy.on_decode = die
    with trio.fail_after(DEADLINE), pytest.raises(EngineBroken) as caught:
        async with open_engine(toy) as engine:
            await engine.generate("hello").collect()
    assert isinstance(caught.value.__cause__, NativeError)


async def test_readers_in_a_nursery_in_the_block_and_the_engine_raise_one_error(toy: Toy) -> None:
    toy.on_decode = die
    with trio.fail_after(DEADLINE), pytest.raises(EngineBroken) as caught:
        async with open_engine(toy) as engine, trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(engine.generate("hello").collect)
    assert isinstance(caught.value.__cause__, NativeError)


async def test_another_error_at_the_same_time_is_not_lost(toy: Toy) -> None:
    toy.on_decode = die
    with trio.fail_after(DEADLINE), pytest.raises(ExceptionGroup) as caught:
        async with open_engine(toy) as engine:
            try:
                await engine.generate("hello").collect()
            finally:
                raise ValueError("and this")
    broken, rest = caught.value.split(EngineBroken)
    assert broken is not None
    assert rest is not None


async def test_the_decode_thread_dies_while_a_request_is_tokenised(toy: Toy) -> None:
    latch = Latch()
    toy.on_tokenize = lambda text: latch() if text == "slow" else None
    toy.on_decode = die
    errors: list[Exception] = []

    async def read(engine: Engine) -> None:
        try:
            await engine.generate("slow").collect()
        except RunnerError as error:
            errors.append(error)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            with pytest.raises(EngineBroken):
                async with open_engine(toy) as engine:
                    nursery.start_soon(read, engine)
                    await latch.reached()
                    with pytest.raises(EngineBroken):
                        await engine.generate("quick").collect()
                    assert engine.status == "broken"
                    assert not toy.model.closed
                    latch.open()
                    await trio.sleep_forever()
    assert [type(error) for error in errors] == [EngineBroken]


async def test_a_request_that_is_submitted_while_the_decode_thread_dies(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode thread has read its last mail, but the trio thread does not know it yet. The request fails, and its
    sampler is closed."""
    dying, may_die = threading.Event(), threading.Event()
    toy.on_decode = die

    class SlowToClose(ToySampler):
        def close(self) -> None:
            if threading.current_thread() is not threading.main_thread():
                dying.set()
                assert may_die.wait(HOLD_SECONDS)
            super().close()

    monkeypatch.setattr("trio_runner.testing.model.ToySampler", SlowToClose)
    with trio.fail_after(DEADLINE), pytest.raises(EngineBroken):
        async with open_engine(toy) as engine:
            first, second = engine.generate("first"), engine.generate("second")
            await first.start()
            await until(dying.is_set)
            await second.start()
            may_die.set()
            for generation in (first, second):
                with pytest.raises(EngineBroken):
                    await anext(generation)
            await trio.sleep_forever()
    assert len(toy.model.samplers) == 2
