"""Adapters that are loaded while requests run."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.engine.lora import SCALES, chosen, said, with_adapters
from tests.engine.toys import (
    DEADLINE,
    Gate,
    Latch,
    Toy,
    open_when_closing,
    prompts,
)
from trio_runner.engine.adapters import MAX_LOADED
from trio_runner.engine.engine import Engine
from trio_runner.errors import EngineClosed, InvalidRequest, LoadError, UnknownAdapter
from trio_runner.front_door import open_engine
from trio_runner.info import AdapterInfo
from trio_runner.testing import toy_text


async def test_an_adapter_is_loaded_while_requests_run(toy: Toy) -> None:
    toy.on_adapter = latch = Latch()
    (prompt,) = prompts(1, 60)
    infos: list[AdapterInfo] = []

    async def load(engine: Engine) -> None:
        infos.append(await engine.load_adapter("/lora/one.gguf"))

    async with toy.engine() as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load, engine)
            await latch.reached()
            assert await engine.generate(prompt, max_tokens=60).collect() == toy_text(prompt, 60)
            assert engine.adapters == ()
            latch.open()
        assert infos == [AdapterInfo("one", "/lora/one.gguf", 0.0)]
        assert engine.adapters == tuple(infos)
        # It applies only to requests that choose it.
        assert await engine.generate("hello", max_tokens=20).collect() == said("hello")
        assert await engine.generate("hello", max_tokens=20, adapters=chosen(one=1)).collect() == said("hello", one=1)


async def test_an_adapter_loaded_with_a_scale_applies_to_later_requests(toy: Toy) -> None:
    toy.on_decode = gate = Gate(toy)
    (prompt,) = prompts(1, 30)
    async with toy.engine(slots=1) as engine:
        running, waiting = engine.generate(prompt, max_tokens=30), engine.generate("hello", max_tokens=20)
        await running.start()
        await waiting.start()
        await engine.load_adapter("/lora/one.gguf", scale=2)
        later = engine.generate("hello", max_tokens=20)
        await later.start()
        gate.open()
        assert await running.collect() == said(prompt, 30)
        assert await waiting.collect() == said("hello")
        assert await later.collect() == said("hello", one=2)


async def test_two_adapters_cannot_have_one_name(toy: Toy) -> None:
    with_adapters(toy)
    toy.on_adapter = latch = Latch()
    async with toy.engine() as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.load_adapter, "/lora/four.gguf")
        await latch.reached()
        for name in ("one", "four"):  # the second one is still being loaded
            with pytest.raises(InvalidRequest) as caught:
                await engine.load_adapter("/lora/other.gguf", name=name)
            assert caught.value.param == "name"
        assert len(toy.model.adapters) == len(SCALES)
        latch.open()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": "no spaces"}, "name"),
        ({"name": "../one"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"),
    ],
)
async def test_the_error_of_a_load_names_the_field(toy: Toy, fields: dict[str, Any], param: str) -> None:
    async with toy.engine() as engine:
        with pytest.raises(InvalidRequest) as caught:
            await engine.load_adapter("/lora/one.gguf", **fields)
        assert caught.value.param == param
        assert toy.model.adapters == []


async def test_a_bad_adapter_file_changes_nothing(toy: Toy) -> None:
    with_adapters(toy)
    async with toy.engine() as engine, engine.generate(prompts(1, 30)[0], max_tokens=30) as neighbour:
        before = engine.adapters
        with pytest.raises(LoadError) as caught:
            await engine.load_adapter("/lora/bad.gguf", name="four")
        assert caught.value.path == "/lora/bad.gguf"
        assert engine.adapters == before
        with pytest.raises(UnknownAdapter):
            await engine.generate("hello", adapters=chosen(four=1)).start()
        await engine.load_adapter("/lora/four.gguf")  # the name is free
        assert await neighbour.collect() == said(prompts(1, 30)[0], 30, **SCALES)


async def test_only_so_many_adapters_can_be_loaded(toy: Toy) -> None:
    async with toy.engine() as engine:
        for n in range(MAX_LOADED):
            await engine.load_adapter(f"/lora/{n}.gguf")
        with pytest.raises(InvalidRequest):
            await engine.load_adapter("/lora/one.gguf")
        engine.unload_adapter("0")
        await engine.load_adapter("/lora/one.gguf")
        assert len(engine.adapters) == MAX_LOADED


async def test_a_load_that_is_cancelled(toy: Toy) -> None:
    """The name is free at once, and the adapter is closed when it arrives."""
    toy.on_adapter = latch = Latch()
    async with toy.engine() as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.load_adapter, "/lora/one.gguf")
            await latch.reached()
            nursery.cancel_scope.cancel()
        assert engine.adapters == ()
        latch.open()
        await engine.load_adapter("/lora/one.gguf")
        first, second = toy.model.adapters
        assert first.closed
        assert not second.closed
        assert await engine.generate("hello", max_tokens=20, adapters=chosen(one=1)).collect() == said("hello", one=1)


@pytest.mark.parametrize("turn", range(8))
async def test_an_adapter_that_loads_while_the_engine_closes_is_closed(toy: Toy, turn: int) -> None:
    """Which task hears of the end first is up to chance."""
    toy.on_adapter = latch = Latch()

    async def load(engine: Engine) -> None:
        with pytest.raises(EngineClosed):
            await engine.load_adapter("/lora/one.gguf")

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery, open_engine(toy) as engine:
            nursery.start_soon(load, engine)
            await latch.reached()
            nursery.start_soon(open_when_closing, engine, toy, latch)
