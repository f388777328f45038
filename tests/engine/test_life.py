"""An engine's life: loading, the block, and every way out of it."""

# ruff: noqa: PT012 - what raises here is the end of a block

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.engine.toys import (
    DEADLINE,
    PATIENCE,
    Gate,
    Latch,
    Toy,
    is_idle,
    open_when_closing,
    prompts,
    until,
    until_idle,
)
from trio_runner.core.batch import Batch
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.engine.helper_threads import LONG_TEXT
from trio_runner.errors import EngineBroken, EngineClosed, LoadError, NativeError, RunnerError
from trio_runner.front_door import open_engine
from trio_runner.testing import ToyContext, ToySampler, toy_text


class Interrupted(BaseException):
    """Like KeyboardInterrupt, but harmless where it escapes."""


# -- the block --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"),
        RuntimeError("mine"),
        StopIteration("mine"),
        StopAsyncIteration("mine"),
        Interrupted("mine"),
        EngineBroken("mine"),
        ExceptionGroup("mine", [ValueError("inside")]),
        ExceptionGroup("mine", [ValueError("inside"), EngineBroken("inside")]),
        ExceptionGroup("mine", [ExceptionGroup("deeper", [ValueError("inside")])]),
        BaseExceptionGroup("mine", [Interrupted("inside")]),
    ],
    ids=repr,
)
async def test_what_the_block_raises_comes_out_as_it_is(toy: Toy, error: BaseException) -> None:
    cause, context = KeyError("cause"), KeyError("context")
    error.__cause__, error.__context__ = cause, context
    with trio.fail_after(DEADLINE), pytest.raises(type(error)) as caught:
        async with open_engine(toy):
            raise error
    assert caught.value is error
    assert error.__cause__ is cause
    assert error.__context__ is context
    if isinstance(error, BaseExceptionGroup):
        assert error.message == "mine"


async def test_groups_of_the_block_come_out_whole_while_requests_run(toy: Toy) -> None:
    async def fail(generation: Generation) -> None:
        await anext(generation)
        raise ValueError("a reader failed")

    with trio.fail_after(DEADLINE), pytest.raises(ExceptionGroup) as caught:
        async with open_engine(toy) as engine, trio.open_nursery() as nursery:
            for prompt in prompts(3, 60):
                nursery.start_soon(fail, engine.generate(prompt))
    assert 1 <= len(caught.value.exceptions) <= 3
    assert all(isinstance(error, ValueError) for error in caught.value.exceptions)


async def test_a_scope_around_the_block_can_be_cancelled(toy: Toy) -> None:
    with trio.fail_after(DEADLINE), trio.CancelScope() as scope:
        async with open_engine(toy) as engine, engine.generate(prompts(1, 60)[0]) as generation:
            await anext(generation)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert engine.status == "closed"


async def test_an_error_while_cancelled_is_not_lost(toy: Toy) -> None:
    with trio.fail_after(DEADLINE), pytest.raises(ValueError, match="on the way out"), trio.CancelScope() as scope:
        async with open_engine(toy):
            scope.cancel()
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("on the way out")


async def test_afterwards_it_is_closed(toy: Toy) -> None:
    async with toy.engine() as engine:
        generation = engine.generate("hello")
    assert engine.status == "closed"
    assert is_idle(engine)
    for use in (generation.start, engine.wait_ready, lambda: engine.tokenize("x"), lambda: engine.embed(["x"])):
        with pytest.raises(EngineClosed):
            await use()
    for facts in (lambda: engine.info, lambda: engine.capabilities):
        with pytest.raises(EngineClosed):
            facts()
    await engine.drain(1)


async def test_two_engines_at_once() -> None:
    one, other = Toy(), Toy()
    async with one.engine() as first, other.engine() as second:
        async with first.generate("one", max_tokens=30) as generation:
            await anext(generation)
            assert await second.generate("other", max_tokens=30).collect() == toy_text("other", 30)
        await until_idle(first)
    one.check_closed()
    other.check_closed()


async def test_config_and_its_fields_do_not_mix(toy: Toy) -> None:
    with pytest.raises(TypeError):
        async with open_engine(toy, slot=3):  # type: ignore[call-arg]
            pass
    with pytest.raises(ValueError, match="slots"):
        async with open_engine(toy, slots=0):
            pass


# -- loading ----------------------------------------------------------------------------------------------------------


def fail_to_load(report: object, cancelled: object) -> None:
    raise LoadError("not a model", path="model.gguf")


async def test_a_model_that_does_not_load(toy: Toy) -> None:
    toy.on_load = fail_to_load
    with trio.fail_after(DEADLINE), pytest.raises(LoadError) as caught:
        async with open_engine(toy):
            pytest.fail("the block was entered")
    assert caught.value.path == "model.gguf"
    assert str(caught.value) == "model.gguf: not a model"


async def test_a_model_that_does_not_load_while_nobody_waits(toy: Toy) -> None:
    toy.on_load = fail_to_load
    async with toy.engine(wait=False) as engine:
        with pytest.raises(LoadError):
            await engine.wait_ready()
        assert engine.status == "broken"
        assert isinstance(engine.failure, LoadError)
        generation = engine.generate("hello")
        for use in (generation.start, engine.generate("hello").collect, lambda: engine.embed(["x"])):
            with pytest.raises(LoadError) as caught:
                await use()
            assert str(caught.value) == "model.gguf: not a model"
        with pytest.raises(trio.ClosedResourceError):
            await anext(generation)
        with pytest.raises(LoadError):
            _ = engine.info
        await engine.drain(1)
    assert engine.status == "broken"


async def test_a_loader_that_fails_in_another_way(toy: Toy) -> None:
    def fail(report: object, cancelled: object) -> None:
        raise MemoryError("a big model")

    toy.on_load = fail
    with trio.fail_after(DEADLINE), pytest.raises(EngineBroken) as caught:
        async with open_engine(toy):
            pytest.fail("the block was entered")
    assert isinstance(caught.value.__cause__, MemoryError)


async def test_requests_wait_for_the_model(toy: Toy) -> None:
    latch = Latch()
    toy.on_load = latch
    texts: list[str] = []

    async def read(engine: Engine) -> None:
        texts.append(await engine.generate("hello", max_tokens=10).collect())

    async with toy.engine(wait=False) as engine, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read, engine)
        await latch.reached()
        assert engine.status == "loading"
        latch.open()
    assert texts == [toy_text("hello", 10)] * 3


async def test_progress_of_loading(toy: Toy) -> None:
    latch = Latch()

    def load(report: Callable[[float], None], cancelled: object) -> None:
        report(0.5)
        latch()

    toy.on_load = load
    async with toy.engine(wait=False) as engine:
        await latch.reached()
        assert engine.progress == 0.5
        latch.open()
        await engine.wait_ready()
        assert engine.progress == 1.0


def load_until_cancelled(started: threading.Event) -> Callable[[object, Callable[[], bool]], None]:
    def load(report: object, cancelled: Callable[[], bool]) -> None:
        started.set()
        while not cancelled():
            started.wait(0)

    return load


async def test_loading_can_be_cancelled(toy: Toy) -> None:
    started = threading.Event()
    toy.on_load = load_until_cancelled(started)
    with trio.fail_after(DEADLINE), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await until(started.is_set)
                scope.cancel()

            nursery.start_soon(cancel)
            async with open_engine(toy):
                pytest.fail("the block was entered")
    assert scope.cancelled_caught
    assert toy.n_loaded == 0


async def test_leaving_while_it_loads(toy: Toy) -> None:
    started = threading.Event()
    toy.on_load = load_until_cancelled(started)
    errors: list[Exception] = []

    async def read(engine: Engine) -> None:
        try:
            await engine.generate("hello").collect()
        except RunnerError as error:
            errors.append(error)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery, open_engine(toy, wait=False) as engine:
            nursery.start_soon(read, engine)
            await until(started.is_set)
    assert engine.status == "closed"
    assert [type(error) for error in errors] == [EngineClosed]


async def test_draining_while_it_loads(toy: Toy) -> None:
    started = threading.Event()
    toy.on_load = load_until_cancelled(started)
    async with toy.engine(wait=False) as engine:
        await until(started.is_set)
        await engine.drain(1)
        with pytest.raises(EngineClosed):
            await engine.generate("hello").start()


async def test_a_loader_that_does_not_look(toy: Toy) -> None:
    """It loads to the end though nobody wants the model any more: then that is closed."""
    latch = Latch()
    toy.on_load = latch

    def load_all_the_same(config: object, *, progress: Callable[[float], None], cancelled: object) -> object:
        return Toy.__call__(toy, config, progress=progress, cancelled=lambda: False)  # type: ignore[arg-type]

    with trio.fail_after(DEADLINE), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await latch.reached()
                scope.cancel()
                latch.open()

            nursery.start_soon(cancel)
            async with open_engine(load_all_the_same):  # type: ignore[arg-type]
                pytest.fail("the block was entered")
    assert scope.cancelled_caught
    assert toy.n_loaded == 1


# -- leaving ----------------------------------------------------------------------------------------------------------


async def test_leaving_ends_what_runs(toy: Toy) -> None:
    """Running, waiting, and somewhere in a tokeniser: all are told, and nothing that had arrived is lost."""
    gate, latch = Gate(toy), Latch()
    toy.on_decode = gate
    toy.on_tokenize = lambda text: latch() if text == "slow" else None
    one, other = prompts(2, 60)
    errors: list[type[Exception]] = []
    texts: list[str] = []

    async def read(generation: Generation) -> None:
        text = ""
        try:
            async for event in generation:
                text += event.text
        except RunnerError as error:
            errors.append(type(error))
        texts.append(text)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            async with open_engine(toy, slots=1) as engine:
                first = engine.generate(one)
                await first.start()
                second = engine.generate(other)
                await second.start()
                third = engine.generate("slow")
                nursery.start_soon(read, third)
                await latch.reached()
                gate.let(4)
                await gate.reached(5)
                nursery.start_soon(read, second)
                # The helper thread is not abandoned: the model must outlive it.
                nursery.start_soon(open_when_closing, engine, toy, latch)
            assert toy.context.closed
            nursery.start_soon(read, first)
    assert errors == [EngineClosed] * 3
    assert sorted(texts) == ["", "", toy_text(one, 4)]


@pytest.mark.parametrize("turn", range(8))
@pytest.mark.parametrize("prompt", ["short", "long" * LONG_TEXT], ids=["short", "long"])
async def test_what_is_tokenised_while_it_leaves_is_closed(toy: Toy, prompt: str, turn: int) -> None:
    """Who hears of it first, the one that waits for the tokeniser or the one that asked for it, is up to chance."""
    toy.on_tokenize = latch = Latch()

    async def ask(engine: Engine) -> None:
        with pytest.raises(EngineClosed):
            await engine.generate(prompt, truncate=True).start()

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery, open_engine(toy) as engine:
            nursery.start_soon(ask, engine)
            await latch.reached()
            nursery.start_soon(open_when_closing, engine, toy, latch)
    assert [sampler.closed for sampler in toy.model.samplers] == [True]


async def test_leaving_breaks_off_the_batch_that_runs(toy: Toy) -> None:
    """One row, so that no cancelled generation would have broken it off."""
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine() as engine, trio.open_nursery() as nursery:
        generation = engine.generate("x")
        await generation.start()
        await gate.reached(1)
        assert toy.context.aborted_number is None
        nursery.cancel_scope.cancel()
    assert gate.n_aborted == 1
    with pytest.raises(EngineClosed):
        await anext(generation)


async def test_everybody_is_told_in_an_exception_of_their_own(toy: Toy) -> None:
    toy.on_decode = Gate(toy)
    async with toy.engine() as engine:
        generations = [engine.generate("hello") for _ in range(3)]
        for generation in generations:
            await generation.start()
    errors = []
    for generation in generations:
        with pytest.raises(EngineClosed) as caught:
            await anext(generation)
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3


# -- draining ---------------------------------------------------------------------------------------------------------


async def test_draining_lets_requests_finish(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    one, other = prompts(2, 20)
    async with toy.engine(slots=1) as engine:
        running, waiting = engine.generate(one, max_tokens=20), engine.generate(other, max_tokens=20)
        await running.start()
        await waiting.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.drain, DEADLINE)
            await until(lambda: engine.status == "closing")
            with pytest.raises(EngineClosed):
                await engine.generate("new").start()
            with pytest.raises(EngineClosed):
                await engine.embed(["new"])
            with pytest.raises(EngineClosed):
                await engine.wait_ready()
            gate.open()
        assert is_idle(engine)
        # Drained means that nothing runs, not that everything was read.
        assert await running.collect() == toy_text(one, 20)
        assert await waiting.collect() == toy_text(other, 20)
        await engine.drain(DEADLINE)


async def test_draining_with_nothing_to_wait_for(toy: Toy) -> None:
    async with toy.engine() as engine:
        await engine.drain(float("inf"))
        assert engine.status == "closing"


async def test_draining_ends_what_is_left(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    (prompt,) = prompts(1, 20)
    async with toy.engine(slots=1) as engine:
        running, waiting = engine.generate(prompt), engine.generate("hello")
        await running.start()
        await waiting.start()
        gate.let(3)
        await gate.reached(4)
        await engine.drain(0.01)
        got = ""
        with pytest.raises(EngineClosed):
            async for event in running:
                got += event.text
        assert got == toy_text(prompt, 3)
        with pytest.raises(EngineClosed):
            await anext(waiting)
        gate.open()
        await until_idle(engine)


async def test_a_drain_that_is_cancelled_ends_nothing(toy: Toy) -> None:
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine() as engine:
        generation = engine.generate("hello", max_tokens=5)
        await generation.start()
        with trio.move_on_after(0.01) as scope:
            await engine.drain(DEADLINE)
        assert scope.cancelled_caught
        gate.open()
        assert await generation.collect() == toy_text("hello", 5)


# -- the decode thread dies -------------------------------------------------------------------------------------------


def die(batch: Batch) -> None:
    raise NativeError("decode", -3, "out of memory")


async def test_a_dead_decode_thread_is_heard_everywhere(toy: Toy) -> None:
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


async def test_a_reader_in_the_block_hears_it_once(toy: Toy) -> None:
    """The reader's error leaves the block as the engine's own comes: still it is one EngineBroken, not a group."""
    toy.on_decode = die
    with trio.fail_after(DEADLINE), pytest.raises(EngineBroken) as caught:
        async with open_engine(toy) as engine:
            await engine.generate("hello").collect()
    assert isinstance(caught.value.__cause__, NativeError)


async def test_readers_in_a_nursery_in_the_block_hear_it_once(toy: Toy) -> None:
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


async def test_it_dies_while_a_request_is_tokenised(toy: Toy) -> None:
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


async def test_a_request_that_comes_while_it_dies(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread has read its last mail, and trio has not been told of its end: whoever submits now is told too, and
    leaves no sampler behind."""
    dying, may_die = threading.Event(), threading.Event()
    toy.on_decode = die

    class SlowToClose(ToySampler):
        def close(self) -> None:
            if threading.current_thread() is not threading.main_thread():
                dying.set()
                assert may_die.wait(PATIENCE)
            super().close()

    monkeypatch.setattr("trio_runner.testing.ToySampler", SlowToClose)
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


async def test_the_context_is_closed_before_the_model(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    original = ToyContext.close

    def close(context: ToyContext) -> None:
        order.append("context")
        assert not toy.model.closed
        original(context)

    monkeypatch.setattr(ToyContext, "close", close)
    async with toy.engine() as engine:
        await engine.generate("hello", max_tokens=3).collect()
    assert order == ["context"]
