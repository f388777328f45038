"""Loading a model: its progress, its failures and its cancellation."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.inside import state_of
from tests.engine.toys import (
    DEADLINE,
    Latch,
    Toy,
    until,
)
from trio_runner.engine.engine import Engine
from trio_runner.engine.state import MAX_RETRY_AFTER, seconds_left
from trio_runner.errors import EngineBroken, EngineBusy, EngineClosed, EngineLoading, LoadError, RunnerError
from trio_runner.front_door import open_engine
from trio_runner.testing import toy_text


def fail_to_load(report: object, cancelled: object) -> None:
    raise LoadError("not a model", path="model.gguf")


async def test_a_model_that_does_not_load(toy: Toy) -> None:
    toy.on_load = fail_to_load
    with trio.fail_after(DEADLINE), pytest.raises(LoadError) as caught:
        async with open_engine(toy):
            pytest.fail("the block was entered")
    assert caught.value.path == "model.gguf"
    assert str(caught.value) == "model.gguf: not a model"


async def test_a_model_that_does_not_load_while_the_block_runs(toy: Toy) -> None:
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


async def test_a_loader_that_raises_another_error_breaks_the_engine(toy: Toy) -> None:
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


async def test_requests_do_not_wait_for_the_model_for_ever(toy: Toy) -> None:
    latch = Latch()

    def load(report: Callable[[float], None], cancelled: object) -> None:
        report(0.5)
        latch()

    toy.on_load = load
    async with toy.engine(wait=False, load_wait=0, slots=1, max_queue=0) as engine:
        await latch.reached()
        generation = engine.generate("hello")
        for use in (generation.start, engine.wait_ready, lambda: engine.embed(["x"]), lambda: engine.tokenize("x")):
            with pytest.raises(EngineLoading, match=r"^the model is still loading \(50%\)$") as caught:
                await use()
            assert caught.value.retry_after >= 1
        with pytest.raises(EngineLoading):
            _ = engine.info
        latch.open()
        await engine.wait_ready(math.inf)
        await engine.wait_ready()
        assert await engine.generate("hello", max_tokens=10).collect() == toy_text("hello", 10)


async def test_a_full_queue_waits_for_the_load(toy: Toy) -> None:
    latch = Latch()
    toy.on_load = latch
    async with toy.engine(wait=False, slots=1, max_queue=0) as engine, trio.open_nursery() as nursery:
        await latch.reached()
        nursery.start_soon(engine.generate("hello", max_tokens=1).collect)
        await trio.testing.wait_all_tasks_blocked()
        state_of(engine).begun -= 20  # as if it had taken so long already
        with pytest.raises(EngineBusy) as caught:
            await engine.generate("hello").start()
        assert 20 <= caught.value.retry_after <= MAX_RETRY_AFTER
        latch.open()


@given(st.floats(0, 1), st.floats(0, 1e9))
def test_the_rest_of_a_load_goes_on_as_it_began(progress: float, elapsed: float) -> None:
    seconds = seconds_left(progress, elapsed)
    assert 1 <= seconds <= MAX_RETRY_AFTER
    assert seconds_left(progress, elapsed * 2) >= seconds
    if 1 < seconds < MAX_RETRY_AFTER and progress > 0:
        assert elapsed / (elapsed + seconds) == pytest.approx(progress)


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


async def test_leaving_the_block_while_the_model_loads(toy: Toy) -> None:
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


async def test_draining_while_the_model_loads(toy: Toy) -> None:
    started = threading.Event()
    toy.on_load = load_until_cancelled(started)
    async with toy.engine(wait=False) as engine:
        await until(started.is_set)
        await engine.drain(1)
        with pytest.raises(EngineClosed):
            await engine.generate("hello").start()


async def test_a_loader_that_does_not_notice_its_cancellation(toy: Toy) -> None:
    """It loads to the end. Then the model is closed."""
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
