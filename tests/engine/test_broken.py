"""An engine that breaks while its block goes on."""

# ruff: noqa: PT012 - what raises here is the end of a block

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio

from tests.engine.toys import (
    DEADLINE,
    HOLD_SECONDS,
    Gate,
    Latch,
    Projector,
    Shutter,
    Toy,
    is_idle,
    picture,
    prompts,
    until,
    until_idle,
)
from trio_runner.config import AdapterConfig
from trio_runner.core.batch import Batch
from trio_runner.engine import lifecycle
from trio_runner.engine.engine import Engine
from trio_runner.engine.helper_threads import LONG_TEXT, MAX_HELPERS
from trio_runner.errors import EngineBroken, NativeError, RunnerError
from trio_runner.request import Chat
from trio_runner.testing import ToyContext, toy_text


def die(batch: Batch) -> None:
    raise NativeError("trio_step", -3, "the device\nis lost")


REASON = "trio_step failed with -3: the device\nis lost"


@asynccontextmanager
async def surviving(toy: Toy, **options: object) -> AsyncIterator[Engine]:
    async with toy.engine(cancel_when_broken=False, **options) as engine:
        yield engine


async def break_it(engine: Engine) -> None:
    with pytest.raises(EngineBroken):
        await engine.generate("hello").collect()


async def test_every_request_fails_and_the_block_goes_on(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    """Requests that run, wait, are being tokenised, or want one embedding or many: each keeps what it had got until
    then."""
    toy.on_decode = gate = Gate(toy)
    latch = Latch()
    toy.on_tokenize = lambda text: latch() if text == "slow" else None
    one, other, third = prompts(3, 60)
    errors: list[RunnerError] = []
    texts: list[str] = []

    async def read(prompt: str) -> None:
        text = ""
        try:
            async for event in engine.generate(prompt):
                text += event.text
        except RunnerError as error:
            errors.append(error)
        texts.append(text)

    async def embed(*contents: str) -> None:
        with pytest.raises(EngineBroken) as caught:
            await engine.embed(contents)
        errors.append(caught.value)

    async with surviving(toy, slots=2) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, one)
            await gate.reached(1)
            gate.let(4)
            await gate.reached(5)
            nursery.start_soon(read, other)
            nursery.start_soon(read, third)
            nursery.start_soon(embed, "a vector")
            nursery.start_soon(embed, *(f"vector {n}" for n in range(20)))
            nursery.start_soon(read, "slow")
            await latch.reached()
            await until(lambda: engine.statistics().generations >= 5)
            toy.context.on_decode = die
            gate.open()
            await until(lambda: engine.status == "broken")
            latch.open()
        assert len(errors) == len({id(error) for error in errors}) == 6
        for error in errors:
            assert type(error) is EngineBroken
            assert str(error) == f"the engine is broken: {REASON}"
            assert error.__cause__ is engine.failure
        assert sorted(texts) == ["", "", "", toy_text(one, 5)]
        await until_idle(engine)
        await until(lambda: toy.model.closed)
    assert engine.status == "broken"
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == "the decode thread died: trio_step failed with -3: the device is lost"
    assert record.exc_info is None


async def test_a_broken_engine_refuses_everything_at_once(toy: Toy) -> None:
    toy.on_decode = die
    toy.adapters = (AdapterConfig("one"),)
    async with surviving(toy, max_queue=0) as engine:
        await break_it(engine)
        assert (engine.status, str(engine.failure)) == ("broken", REASON)
        for _ in range(2):  # the first time, its memory is still being freed
            for use in uses(engine):
                with pytest.raises(EngineBroken) as caught:
                    await use()
                assert REASON in str(caught.value)
            for facts in (lambda: engine.info, lambda: engine.capabilities, lambda: engine.adapters):
                with pytest.raises(EngineBroken):
                    facts()
            with pytest.raises(EngineBroken):
                _ = engine.has_projector
            assert engine.statistics().status == "broken"
            await engine.drain(math.inf)
            await until(lambda: toy.model.closed)
            assert is_idle(engine)
        assert (engine.status, engine.progress) == ("broken", 1)


def uses(engine: Engine) -> list[Callable[[], Awaitable[object]]]:
    async def unload() -> None:
        engine.unload_adapter("one")

    return [
        engine.wait_ready,
        engine.generate("hello").start,
        engine.generate("hello", deadline=5).collect,
        engine.generate(["hello", picture(0)]).collect,
        engine.chat([{"role": "user", "content": "hello"}]).collect,
        lambda: engine.embed([]),
        lambda: engine.embed(["hello"] * 100),
        lambda: engine.rerank("query", ["one", "two"]),
        lambda: engine.tokenize("hello"),
        lambda: engine.detokenize([65]),
        lambda: engine.pieces([65]),
        lambda: engine.render(Chat(messages=({"role": "user", "content": "hello"},))),
        lambda: engine.load_adapter("two"),
        unload,
    ]


async def test_a_failure_outside_the_native_library_is_logged_with_a_traceback(
    toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(batch: Batch) -> None:
        raise AssertionError

    toy.on_decode = fail
    async with surviving(toy) as engine:
        await break_it(engine)
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None


@pytest.mark.parametrize("fails", ["loading", "decoding"])
async def test_the_kept_failure_keeps_no_memory(toy: Toy, fails: str) -> None:
    """A traceback refers to the variables of its frames, and they may be the last references to the model."""
    handles: list[weakref.ref[Toy]] = []

    def call() -> None:
        handle = Toy()
        handles.append(weakref.ref(handle))
        raise KeyError("inside")

    def fail(*_: object) -> None:
        try:
            call()
        except KeyError as error:
            handle = Toy()
            handles.append(weakref.ref(handle))
            raise NativeError("trio_step", -3, "the device is lost") from error

    if fails == "loading":
        toy.on_load = fail
    else:
        toy.on_decode = fail
    async with surviving(toy, wait=False) as engine:
        await break_it(engine)
        assert isinstance(engine.failure, NativeError)
        assert engine.failure.__traceback__ is not None
        assert len(handles) == 2
        await until(lambda: not any(handle() for handle in handles))


async def test_another_engine_can_be_opened_meanwhile() -> None:
    one, other = Toy(), Toy()
    one.on_decode = die
    async with surviving(one) as engine:
        await break_it(engine)
        await until(lambda: one.model.closed)
        async with other.engine() as next_one:
            assert await next_one.generate("hello", max_tokens=30).collect() == toy_text("hello", 30)
    one.check_closed()
    other.check_closed()


async def test_an_error_of_the_block_comes_out_unchanged(toy: Toy) -> None:
    toy.on_decode = die
    mine = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        async with surviving(toy) as engine:
            await break_it(engine)
            raise mine
    assert caught.value is mine


async def test_a_reader_that_does_not_catch_the_error_ends_the_block(toy: Toy) -> None:
    toy.on_decode = die
    with pytest.raises(EngineBroken) as caught:
        async with surviving(toy) as engine:
            await engine.generate("hello").collect()
    assert isinstance(caught.value.__cause__, NativeError)


async def test_a_scope_around_the_block_can_be_cancelled(toy: Toy) -> None:
    toy.on_decode = die
    with trio.CancelScope() as scope:
        async with surviving(toy) as engine:
            await break_it(engine)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert engine.status == "broken"


@pytest.mark.parametrize("prompt", ["short {}", "long {}" + " " * LONG_TEXT], ids=["short", "long"])
async def test_requests_that_wait_for_a_helper_thread_are_not_tokenised_any_more(toy: Toy, prompt: str) -> None:
    """So they fail at once, and the memory is free soon."""
    latch = Latch()
    toy.on_decode = gate = Gate(toy)
    toy.on_tokenize = lambda text: latch() if text != "hello" else None
    n_at_once = 1 if len(prompt) >= LONG_TEXT else MAX_HELPERS
    n_told = 0

    async def ask(n: int) -> None:
        nonlocal n_told
        with pytest.raises(EngineBroken):
            await engine.generate(prompt.format(n), truncate=True).start()
        n_told += 1

    async with surviving(toy) as engine, trio.open_nursery() as nursery:
        await engine.generate("hello").start()
        await gate.reached(1)
        for n in range(6):
            nursery.start_soon(ask, n)
        await latch.reached(n_at_once)
        toy.context.on_decode = die
        gate.open()
        await until(lambda: engine.status == "broken")
        latch.open()
        await until(lambda: n_told == 6)
        assert latch.n_arrived == n_at_once


async def test_requests_that_wait_for_images_fail(toy: Toy) -> None:
    """One image is being encoded, the others wait for their turn."""
    toy.projector = Projector()
    toy.projector.on_encode = shutter = Shutter()
    toy.on_decode = die
    n_told = 0

    async def ask(number: int) -> None:
        nonlocal n_told
        with pytest.raises(EngineBroken):
            await engine.generate([picture(number)]).collect()
        n_told += 1

    async with surviving(toy) as engine:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(ask, number)
            await shutter.reached()
            nursery.start_soon(break_it, engine)
        assert n_told == 20


async def test_an_adapter_that_is_being_loaded_fails(toy: Toy) -> None:
    toy.on_adapter = latch = Latch()
    toy.on_decode = die

    async def load() -> None:
        with pytest.raises(EngineBroken):
            await engine.load_adapter("one")

    async with surviving(toy) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await latch.reached()
            await break_it(engine)
            assert not toy.model.closed
            latch.open()
        await until(lambda: toy.model.closed)


async def test_a_slow_reader_gets_its_unread_events_before_the_error(toy: Toy) -> None:
    (prompt,) = prompts(1, 400)
    toy.on_decode = lambda batch: time.sleep(0.001)  # so that the text does not end before the pause
    async with surviving(toy, max_backlog=4) as engine:
        generation = engine.generate(prompt)
        await generation.start()
        await until(lambda: engine.statistics().scheduler.n_paused == 1)
        toy.context.on_decode = die
        await break_it(engine)
        text = ""
        with pytest.raises(EngineBroken):
            async for event in generation:
                text += event.text
        assert len(text) > 4
        assert toy_text(prompt, 2 * len(text) + 2).startswith(text)
        generation.close()


async def test_a_device_that_does_not_release_its_memory_is_not_waited_for(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds up neither the event loop nor the end of the block, beyond a short wait."""
    monkeypatch.setattr(lifecycle, "FREE_SECONDS", 0.05)
    closing, answers = threading.Event(), threading.Event()
    original = ToyContext.close

    def close(context: ToyContext) -> None:
        closing.set()
        assert answers.wait(HOLD_SECONDS)
        original(context)

    monkeypatch.setattr(ToyContext, "close", close)
    toy.on_decode = die
    async with surviving(toy) as engine:
        await break_it(engine)
        await until(closing.is_set)
    assert not toy.model.closed
    assert "a device does not answer" in caplog.text
    answers.set()
    with trio.fail_after(DEADLINE):
        await until(lambda: toy.model.n_closed == 1)


async def test_a_healthy_engine_does_not_break(toy: Toy) -> None:
    async with surviving(toy) as engine:
        assert await engine.generate("hello", max_tokens=30).collect() == toy_text("hello", 30)
        assert np.shape(await engine.embed(["hello"])) == (1, 8)
    assert (engine.status, engine.failure) == ("closed", None)
