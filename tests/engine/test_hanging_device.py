"""A device that hangs: the thread that waits for it is abandoned, and the program ends."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import trio
import trio.testing

from tests.engine.toys import DEADLINE, HOLD_SECONDS, Latch, Projector, Toy, picture, until
from trio_runner.engine import lifecycle
from trio_runner.engine.device_threads import DeviceHangs, DeviceThreads
from trio_runner.engine.engine import Engine
from trio_runner.errors import EngineClosed
from trio_runner.front_door import open_engine


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "CLOSE_SECONDS", 0.05)


@pytest.fixture
def hang() -> Iterator[Latch]:
    """A latch that holds threads until the test ends."""
    latch = Latch()
    yield latch
    latch.open()


async def read(engine: Engine, prompt: object) -> None:
    with pytest.raises(EngineClosed):
        await engine.generate(prompt).collect()  # type: ignore[arg-type]


async def test_a_batch_that_hangs(hang: Latch, caplog: pytest.LogCaptureFixture) -> None:
    """What it computes with is kept as long as the thread lives, and no longer."""
    toy = Toy()
    toy.on_decode = hang
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery, open_engine(toy) as engine:
            nursery.start_soon(read, engine, "hello")
            await hang.reached()
            nursery.start_soon(read, engine, "waits")
            await until(lambda: engine.statistics().generations == 2)
        assert engine.status == "closed"
        assert "the decode thread does not stop" in caplog.text
        assert not toy.context.closed
        context, samplers = weakref.ref(toy.context), toy.model.samplers
        del toy.context, toy.model
        gc.collect()
        assert context() is not None
        hang.open()
        await until(
            lambda: gc.collect() < 0 or context() is None
        )  # collects garbage each time; the first part is never true
    assert all(sampler.closed for sampler in samplers)


async def test_a_load_that_hangs(hang: Latch, caplog: pytest.LogCaptureFixture) -> None:
    toy = Toy()
    toy.on_load = hang
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery, open_engine(toy, wait=False) as engine:
            nursery.start_soon(read, engine, "hello")
            await hang.reached()
    assert engine.status == "closed"
    assert "loading does not stop" in caplog.text


async def test_an_image_that_hangs(hang: Latch, caplog: pytest.LogCaptureFixture) -> None:
    toy = Toy()
    toy.projector = Projector()
    toy.projector.on_encode = hang
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery, open_engine(toy) as engine:
            nursery.start_soon(read, engine, ["see ", picture(0)])
            await hang.reached()
    assert engine.status == "closed"
    assert "is not free yet" in caplog.text


@pytest.mark.parametrize("ends", ["before", "while it runs"])
async def test_the_wait_for_a_thread_is_bounded(hang: Latch, ends: str) -> None:
    threads = DeviceThreads()
    with trio.fail_after(DEADLINE):
        if ends == "before":
            threads.wait_at_most(0.01)
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(DeviceHangs):
                    await threads.run(hang)

            nursery.start_soon(wait)
            await hang.reached()
            nursery.cancel_scope.cancel()  # a cancellation does not abandon the thread
            threads.wait_at_most(0.01)
            threads.wait_at_most(HOLD_SECONDS)  # only the first call counts


async def test_a_thread_that_ends_in_time_returns_or_raises() -> None:
    threads, go = DeviceThreads(), threading.Event()
    results: list[object] = []

    async def run(call: Callable[[], object]) -> None:
        try:
            results.append(await threads.run(call))
        except ValueError as error:
            results.append(str(error))

    def fail() -> None:
        assert go.wait(HOLD_SECONDS)
        raise ValueError("inside")

    with trio.fail_after(DEADLINE), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, lambda: go.wait(HOLD_SECONDS))
            nursery.start_soon(run, fail)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            threads.wait_at_most(DEADLINE)
            go.set()
    assert sorted(map(str, results)) == ["True", "inside"]
