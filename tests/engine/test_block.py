"""The block of `open_engine`: what comes out of it, and what leaving it does to requests."""

# ruff: noqa: PT012 - what raises here is the end of a block

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.engine.toys import (
    DEADLINE,
    Gate,
    Latch,
    Toy,
    is_idle,
    open_when_closing,
    prompts,
    until_idle,
)
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.engine.helper_threads import LONG_TEXT
from trio_runner.errors import EngineBroken, EngineClosed, RunnerError
from trio_runner.front_door import open_engine
from trio_runner.testing import ToyContext, toy_text


class Interrupted(BaseException):
    """Like KeyboardInterrupt, but harmless where it escapes."""


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
async def test_an_error_of_the_block_comes_out_unchanged(toy: Toy, error: BaseException) -> None:
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


async def test_a_group_of_errors_comes_out_whole_while_requests_run(toy: Toy) -> None:
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


async def test_after_the_block_the_engine_is_closed(toy: Toy) -> None:
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


async def test_wrong_options_are_refused(toy: Toy) -> None:
    with pytest.raises(TypeError):
        async with open_engine(toy, slot=3):  # type: ignore[call-arg]
            pass
    with pytest.raises(ValueError, match="slots"):
        async with open_engine(toy, slots=0):
            pass


async def test_leaving_the_block_ends_all_requests(toy: Toy) -> None:
    """One runs, one waits, one is being tokenised. Each gets an error, and loses no event that had arrived."""
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
                # The helper thread is waited for: the model must outlive it.
                nursery.start_soon(open_when_closing, engine, toy, latch)
            assert toy.context.closed
            nursery.start_soon(read, first)
    assert errors == [EngineClosed] * 3
    assert sorted(texts) == ["", "", toy_text(one, 4)]


@pytest.mark.parametrize("turn", range(8))
@pytest.mark.parametrize("prompt", ["short", "long" * LONG_TEXT], ids=["short", "long"])
async def test_a_sampler_made_while_the_engine_closes_is_closed(toy: Toy, prompt: str, turn: int) -> None:
    """Which task hears of the end first, the request or the engine, is up to chance."""
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


async def test_leaving_the_block_aborts_the_running_batch(toy: Toy) -> None:
    """It has one row, so closing its generation alone would not have aborted it."""
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


async def test_every_reader_raises_an_exception_of_its_own(toy: Toy) -> None:
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
