"""Adapters: every request chooses its own, and they come and go while others run."""

from __future__ import annotations

import itertools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.inside import uid_of
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
from trio_runner.config import AdapterConfig
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.engine.adapters import MAX_LOADED
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.errors import EngineBroken, EngineClosed, InvalidRequest, LoadError, NativeError, UnknownAdapter
from trio_runner.front_door import open_engine
from trio_runner.info import AdapterInfo
from trio_runner.request import AdapterChoice, EmbedRequest, Priority, RerankRequest
from trio_runner.testing import Interruption, ToyAdapter, toy_cache_key, toy_text, toy_vector

SCALES = {"one": 1.0, "two": 0.0, "three": -0.5}
"""By name; `two` is only there for those that ask for it."""


def with_adapters(toy: Toy) -> None:
    toy.adapters = tuple(AdapterConfig(f"/lora/{name}.gguf", scale) for name, scale in SCALES.items())


def chosen(**scales: float) -> tuple[AdapterChoice, ...]:
    return tuple(AdapterChoice(name, scale) for name, scale in scales.items())


def cache_key(**scales: float) -> str:
    return toy_cache_key([(f"/lora/{name}.gguf", float(scale)) for name, scale in scales.items() if scale])


def said(prompt: str, n_tokens: int = 20, /, **scales: float) -> str:
    return toy_text(prompt, n_tokens, cache_key(**scales))


CHOICES = st.dictionaries(st.sampled_from(list(SCALES)), st.sampled_from([0, 1, 1.0, 0.25, -2]))


# -- what they do -----------------------------------------------------------------------------------------------------


@given(st.lists(CHOICES, min_size=1, max_size=4))
async def test_text_is_what_the_model_says_with_them(choices: list[dict[str, float]]) -> None:
    """In whatever order, and whoever ran before in the same slots; scale 0 is as if it had not been chosen."""
    toy = Toy()
    with_adapters(toy)
    async with toy.engine(slots=1) as engine:
        for scales in choices:
            text = await engine.generate("hello", max_tokens=20, adapters=chosen(**scales)).collect()
            assert text == said("hello", **scales)
    toy.check_closed()


async def test_each_set_has_a_text_of_its_own(toy: Toy) -> None:
    with_adapters(toy)
    sets: list[dict[str, float]] = [{}, {"one": 1}, {"one": 2}, {"two": 1}, {"one": 1, "two": 1}]
    async with toy.engine() as engine:
        texts = {await engine.generate("hello", max_tokens=20, adapters=chosen(**scales)).collect() for scales in sets}
    assert len(texts) == len(sets)


async def test_without_a_choice_the_scales_of_the_engine_apply(toy: Toy) -> None:
    with_adapters(toy)
    async with toy.engine() as engine:
        assert engine.adapters == tuple(AdapterInfo(name, f"/lora/{name}.gguf", SCALES[name]) for name in SCALES)
        assert await engine.generate("hello", max_tokens=20).collect() == said("hello", **SCALES)
        assert await engine.generate("hello", max_tokens=20, adapters=()).collect() == said("hello")
        (vector,) = await engine.embed(["hello"])
        np.testing.assert_array_equal(vector, toy_vector(list(b"hello"), cache_key(**SCALES)))


async def test_vectors_have_adapters_too(toy: Toy) -> None:
    with_adapters(toy)
    texts = ["hello", "world"]
    async with toy.engine() as engine:
        for scales in ({}, {"two": 1.0}, {"one": 0.5, "two": 1.0}):
            expected = [toy_vector(list(text.encode()), cache_key(**scales)) for text in texts]
            np.testing.assert_array_equal(await engine.embed(texts, adapters=chosen(**scales)), expected)
            embedded = await engine.embed_request(EmbedRequest(content="hello", adapters=chosen(**scales)))
            np.testing.assert_array_equal(embedded.vector, expected[0])


async def test_scores_have_adapters_too(toy: Toy) -> None:
    with_adapters(toy)
    toy.capabilities = {"ranks": True}
    async with toy.engine() as engine:
        request = RerankRequest(query="a", documents=("b",), adapters=chosen(two=1))
        (score,) = await engine.rerank_request(request)
        assert score == toy_vector(list(b"ab"), cache_key(two=1))[0]


@pytest.mark.parametrize("scale", [1e30, -1e30])
async def test_a_default_that_no_request_may_ask_for_applies_all_the_same(toy: Toy, scale: float) -> None:
    toy.adapters = (AdapterConfig("/lora/one.gguf", scale),)
    async with toy.engine() as engine:
        assert await engine.generate("hello", max_tokens=20).collect() == said("hello", one=scale)


# -- side by side -----------------------------------------------------------------------------------------------------


SETS: list[dict[str, float]] = [{}, {"one": 1.0}, {"two": 1.0}, {"one": 1.0, "two": 0.5}]


async def read_all(engine: Engine, requests: dict[str, dict[str, float]], n_tokens: int, **options: Any) -> None:
    """Each at the same time, with its own set; the texts are checked."""

    async def read(prompt: str, scales: dict[str, float]) -> None:
        generation = engine.generate(prompt, max_tokens=n_tokens, adapters=chosen(**scales), **options)
        assert await generation.collect() == said(prompt, n_tokens, **scales)

    async with trio.open_nursery() as nursery:
        for prompt, scales in requests.items():
            nursery.start_soon(read, prompt, scales)


@pytest.mark.parametrize("slots", [1, 2, 4])
async def test_different_sets_run_side_by_side(toy: Toy, slots: int) -> None:
    with_adapters(toy)
    requests = {prompt: SETS[n % len(SETS)] for n, prompt in enumerate(prompts(10, 40))}
    async with toy.engine(slots=slots, batch_size=16) as engine:
        await read_all(engine, requests, 40)
        await until_idle(engine)
    assert len({batch.kind.adapters for batch in toy.context.batches}) == len(SETS)


async def test_none_of_them_starves(toy: Toy) -> None:
    """Each set has its turn, however many are of another."""
    with_adapters(toy)
    toy.on_decode = gate = Gate(toy)
    sets = [SETS[0]] * 5 + SETS[1:]
    async with toy.engine(slots=8, batch_size=16) as engine:
        generations = [
            engine.generate(f"{n} of eight: ", adapters=chosen(**scales), max_tokens=60)
            for n, scales in enumerate(sets)
        ]
        async with trio.open_nursery() as nursery:
            for generation in generations:
                nursery.start_soon(generation.collect)
            await until(lambda: engine.statistics().generations == 8)
            gate.open()
    for generation in generations:
        uid = uid_of(generation)
        runs = [n for n, batch in enumerate(toy.context.batches) if uid in {c.uid for c in batch.chunks}]
        gaps = [later - earlier for earlier, later in itertools.pairwise(runs)]
        assert max(gaps) <= 2 * len(SETS)


async def test_the_prompt_cache_is_within_a_set(toy: Toy) -> None:
    with_adapters(toy)
    prompt = "a prompt that is long enough to be worth something"
    cached: list[int] = []
    async with toy.engine(slots=4) as engine:
        both, both_again = {"one": 1.0, "two": 1.0}, {"two": 1.0, "one": 1.0}
        for scales in ({}, {"one": 1.0}, {"one": 0.5}, both, {}, {"one": 1.0}, {"two": 0.0}, both_again):
            generation = engine.generate(prompt, max_tokens=5, adapters=chosen(**scales))
            assert await generation.collect() == said(prompt, 5, **scales)
            assert generation.usage is not None
            cached.append(generation.usage.cached_tokens)
    n_all = len(prompt) - 1
    assert cached == [0, 0, 0, 0, n_all, n_all, n_all, n_all]


async def test_nobody_follows_a_prompt_of_another_set(toy: Toy) -> None:
    """The same prompts at the same time: decoded once for each set, not once for all."""
    with_adapters(toy)
    prefix = "a prefix of many words that all of them begin with, " * 4
    requests = {f"{prefix}{n}": SETS[n % 2] for n in range(4)}
    toy.on_decode = gate = Gate(toy)
    async with toy.engine(slots=4) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, engine, requests, 10)
            await until(lambda: engine.statistics().generations == 4)
            gate.open()
        assert engine.statistics().scheduler.n_prompt_rows == 2 * (len(prefix) + 2)


async def test_a_background_request_goes_on_with_its_own(toy: Toy) -> None:
    with_adapters(toy)
    slow, quick, other = prompts(3, 100)
    async with toy.engine(slots=1) as engine:
        background = engine.generate(slow, max_tokens=60, adapters=chosen(one=1), priority="background")
        async with background:
            text = "".join([(await anext(background)).text for _ in range(5)])
            await read_all(engine, {quick: {"two": 1.0}, other: {}}, 20)
            text += "".join([event.text async for event in background])
        assert text == said(slow, 60, one=1)


# -- wrong ones -------------------------------------------------------------------------------------------------------


async def test_an_unknown_one_takes_no_slot(toy: Toy) -> None:
    with_adapters(toy)
    (other,) = prompts(1, 30)
    toy.on_decode = gate = Gate(toy)
    async with toy.engine() as engine:
        neighbour = engine.generate(other, max_tokens=30, adapters=chosen(one=1))
        await neighbour.start()
        await gate.reached(1)
        uses: list[Callable[[], Awaitable[object]]] = [
            engine.generate("hello", adapters=chosen(four=1)).start,
            engine.generate("hello", adapters=chosen(one=1, four=0)).start,
            lambda: engine.embed(["hello"], adapters=chosen(four=1)),
        ]
        for use in uses:
            with pytest.raises(UnknownAdapter) as caught:
                await use()
            assert (caught.value.name, caught.value.param) == ("four", "adapters")
        assert engine.statistics().generations == 1
        assert len(toy.model.samplers) == 1
        gate.open()
        assert await neighbour.collect() == said(other, 30, one=1)


async def test_one_of_them_twice(toy: Toy) -> None:
    with_adapters(toy)
    async with toy.engine() as engine:
        with pytest.raises(InvalidRequest) as caught:
            engine.generate("hello", adapters=(*chosen(one=1), *chosen(one=2)))
        assert caught.value.param == "adapters"


# -- coming -----------------------------------------------------------------------------------------------------------


async def test_one_is_loaded_while_others_are_served(toy: Toy) -> None:
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
        # Nobody gets it without asking.
        assert await engine.generate("hello", max_tokens=20).collect() == said("hello")
        assert await engine.generate("hello", max_tokens=20, adapters=chosen(one=1)).collect() == said("hello", one=1)


async def test_what_is_loaded_with_a_scale_is_for_those_who_come_later(toy: Toy) -> None:
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


async def test_a_name_is_for_one(toy: Toy) -> None:
    with_adapters(toy)
    toy.on_adapter = latch = Latch()
    async with toy.engine() as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.load_adapter, "/lora/four.gguf")
        await latch.reached()
        for name in ("one", "four"):  # the latter only begins to be there
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
async def test_what_is_wrong_with_a_load_is_said_by_name(toy: Toy, fields: dict[str, Any], param: str) -> None:
    async with toy.engine() as engine:
        with pytest.raises(InvalidRequest) as caught:
            await engine.load_adapter("/lora/one.gguf", **fields)
        assert caught.value.param == param
        assert toy.model.adapters == []


async def test_a_bad_file_changes_nothing(toy: Toy) -> None:
    with_adapters(toy)
    async with toy.engine() as engine, engine.generate(prompts(1, 30)[0], max_tokens=30) as neighbour:
        before = engine.adapters
        with pytest.raises(LoadError) as caught:
            await engine.load_adapter("/lora/bad.gguf", name="four")
        assert caught.value.path == "/lora/bad.gguf"
        assert engine.adapters == before
        with pytest.raises(UnknownAdapter):
            await engine.generate("hello", adapters=chosen(four=1)).start()
        await engine.load_adapter("/lora/four.gguf")  # its name was not taken
        assert await neighbour.collect() == said(prompts(1, 30)[0], 30, **SCALES)


async def test_there_is_an_end_to_them(toy: Toy) -> None:
    async with toy.engine() as engine:
        for n in range(MAX_LOADED):
            await engine.load_adapter(f"/lora/{n}.gguf")
        with pytest.raises(InvalidRequest):
            await engine.load_adapter("/lora/one.gguf")
        engine.unload_adapter("0")
        await engine.load_adapter("/lora/one.gguf")
        assert len(engine.adapters) == MAX_LOADED


async def test_letting_go_of_a_load(toy: Toy) -> None:
    """Its name is free at once; what arrives later is for nobody."""
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
async def test_what_is_loaded_while_the_engine_is_leaving_is_closed(toy: Toy, turn: int) -> None:
    """Which of the two hears of it first is up to chance."""
    toy.on_adapter = latch = Latch()

    async def load(engine: Engine) -> None:
        with pytest.raises(EngineClosed):
            await engine.load_adapter("/lora/one.gguf")

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery, open_engine(toy) as engine:
            nursery.start_soon(load, engine)
            await latch.reached()
            nursery.start_soon(open_when_closing, engine, toy, latch)


# -- going ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def four_that_have_it(toy: Toy) -> AsyncIterator[tuple[Engine, Gate, list[Generation], ToyAdapter]]:
    """One runs, one has lost its slot to it, two wait; and their adapter was unloaded."""
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


async def test_who_comes_later_does_not_get_it(toy: Toy) -> None:
    async with four_that_have_it(toy) as (engine, gate, _, adapter):
        with pytest.raises(UnknownAdapter):
            await engine.generate("hello", adapters=chosen(one=1)).start()
        assert [info.name for info in engine.adapters] == ["two", "three"]
        # Who chooses nothing has what is left.
        other = engine.generate("hello", max_tokens=20)
        await other.start()
        assert not adapter.closed
        gate.open()
        assert await other.collect() == said("hello", three=-0.5)


async def test_it_is_closed_when_the_last_one_that_has_it_has_ended(toy: Toy) -> None:
    """The toy sees to it that it is not closed before."""
    async with four_that_have_it(toy) as (_, gate, generations, adapter):
        gate.open()
        for generation, prompt in zip(generations, prompts(4, 30), strict=True):
            assert await generation.collect() == said(prompt, 30, one=1)
        assert adapter.closed
        assert not any(other.closed for other in toy.model.adapters[1:])


@pytest.mark.parametrize("stays", range(4))
async def test_it_is_closed_when_the_last_one_that_has_it_was_let_go(toy: Toy, stays: int) -> None:
    async with four_that_have_it(toy) as (engine, gate, generations, adapter):
        for generation in generations:
            if generation is not generations[stays]:
                generation.close()
        gate.let()
        await until(lambda: engine.statistics().busy + engine.statistics().waiting == 1)
        assert not adapter.closed
        generations[stays].close()
        gate.open()
        await until(lambda: adapter.closed)


async def test_texts_go_on_with_what_is_no_longer_there(toy: Toy) -> None:
    with_adapters(toy)
    async with toy.engine(slots=2) as engine:
        generations = [engine.generate(prompt, max_tokens=30, adapters=chosen(one=1)) for prompt in prompts(4, 30)]
        for generation in generations:
            await generation.start()
        engine.unload_adapter("one")
        for generation, prompt in zip(generations, prompts(4, 30), strict=True):
            assert await generation.collect() == said(prompt, 30, one=1)


async def test_one_that_nobody_has_is_closed_at_once(toy: Toy) -> None:
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
async def test_every_end_counts(toy: Toy, how: str) -> None:
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


async def test_leaving_the_engine_closes_what_is_still_in_use(toy: Toy) -> None:
    with_adapters(toy)
    toy.on_decode = gate = Gate(toy)
    async with toy.engine(slots=1) as engine:
        for prompt in prompts(2, 30):
            await engine.generate(prompt, adapters=chosen(one=1, two=1)).start()
        await gate.reached(1)
        engine.unload_adapter("one")
        assert not toy.model.adapters[0].closed
    assert all(adapter.closed for adapter in toy.model.adapters)


async def test_one_that_goes_when_the_decode_thread_has_died(toy: Toy) -> None:
    """And nobody has heard of that yet."""
    with_adapters(toy)
    dead = threading.Event()

    def die(batch: Batch) -> None:
        dead.set()
        raise NativeError("decode", 1, "a bug")

    toy.on_decode = die
    with trio.fail_after(DEADLINE), pytest.raises(EngineBroken):  # noqa: PT012
        async with open_engine(toy) as engine:
            await engine.generate("hello").start()
            assert dead.wait(PATIENCE)  # trio does not run meanwhile
            engine.unload_adapter("one")
            await trio.sleep_forever()
    assert toy.model.adapters[0].closed


async def test_one_that_goes_while_its_request_is_tokenised(toy: Toy) -> None:
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
        # Even the same file: nobody knows what is in it by now.
        engine.unload_adapter("one")
        await engine.load_adapter("/lora/other.gguf", name="one")
        again = engine.generate(prompt, max_tokens=30, adapters=chosen(one=1))
        assert await again.collect() == said(prompt, 30, other=1)
        assert again.usage is not None
        assert again.usage.cached_tokens == 0
