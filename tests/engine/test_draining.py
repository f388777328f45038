"""Draining an engine: no more requests, and time for those in flight."""

# ruff: noqa: PT012 - what raises here is the end of a block

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.engine.toys import (
    DEADLINE,
    Gate,
    Toy,
    is_idle,
    prompts,
    until,
    until_idle,
)
from trio_runner.errors import EngineClosed
from trio_runner.testing import toy_text


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
        # A drained engine runs nothing, but events may still be unread.
        assert await running.collect() == toy_text(one, 20)
        assert await waiting.collect() == toy_text(other, 20)
        await engine.drain(DEADLINE)


async def test_draining_an_idle_engine(toy: Toy) -> None:
    async with toy.engine() as engine:
        await engine.drain(float("inf"))
        assert engine.status == "closing"


async def test_draining_ends_requests_that_do_not_finish_in_time(toy: Toy) -> None:
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


async def test_a_cancelled_drain_ends_no_request(toy: Toy) -> None:
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
