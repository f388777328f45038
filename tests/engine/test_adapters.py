"""Adapters: every request chooses its own."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.inside import uid_of
from tests.engine.lora import CHOICES, SCALES, cache_key, chosen, said, with_adapters
from tests.engine.toys import (
    Gate,
    Toy,
    prompts,
    until,
    until_idle,
)
from trio_runner.config import AdapterConfig
from trio_runner.engine.engine import Engine
from trio_runner.errors import InvalidRequest, UnknownAdapter
from trio_runner.info import AdapterInfo
from trio_runner.request import EmbedRequest, RerankRequest
from trio_runner.testing import toy_vector


@given(st.lists(CHOICES, min_size=1, max_size=4))
async def test_text_is_that_of_the_model_with_the_chosen_adapters(choices: list[dict[str, float]]) -> None:
    """The order of the adapters and earlier requests in the slots make no difference. Scale 0 is the same as no
    adapter."""
    toy = Toy()
    with_adapters(toy)
    async with toy.engine(slots=1) as engine:
        for scales in choices:
            text = await engine.generate("hello", max_tokens=20, adapters=chosen(**scales)).collect()
            assert text == said("hello", **scales)
    toy.check_closed()


async def test_each_set_of_adapters_gives_another_text(toy: Toy) -> None:
    with_adapters(toy)
    sets: list[dict[str, float]] = [{}, {"one": 1}, {"one": 2}, {"two": 1}, {"one": 1, "two": 1}]
    async with toy.engine() as engine:
        texts = {await engine.generate("hello", max_tokens=20, adapters=chosen(**scales)).collect() for scales in sets}
    assert len(texts) == len(sets)


async def test_without_a_choice_all_adapters_apply_at_their_own_scales(toy: Toy) -> None:
    with_adapters(toy)
    async with toy.engine() as engine:
        assert engine.adapters == tuple(AdapterInfo(name, f"/lora/{name}.gguf", SCALES[name]) for name in SCALES)
        assert await engine.generate("hello", max_tokens=20).collect() == said("hello", **SCALES)
        assert await engine.generate("hello", max_tokens=20, adapters=()).collect() == said("hello")
        (vector,) = await engine.embed(["hello"])
        np.testing.assert_array_equal(vector, toy_vector(list(b"hello"), cache_key(**SCALES)))


async def test_embeddings_have_adapters(toy: Toy) -> None:
    with_adapters(toy)
    texts = ["hello", "world"]
    async with toy.engine() as engine:
        for scales in ({}, {"two": 1.0}, {"one": 0.5, "two": 1.0}):
            expected = [toy_vector(list(text.encode()), cache_key(**scales)) for text in texts]
            np.testing.assert_array_equal(await engine.embed(texts, adapters=chosen(**scales)), expected)
            embedded = await engine.embed_request(EmbedRequest(content="hello", adapters=chosen(**scales)))
            np.testing.assert_array_equal(embedded.vector, expected[0])


async def test_scores_have_adapters(toy: Toy) -> None:
    with_adapters(toy)
    toy.capabilities = {"ranks": True}
    async with toy.engine() as engine:
        request = RerankRequest(query="a", documents=("b",), adapters=chosen(two=1))
        (score,) = await engine.rerank_request(request)
        assert score == toy_vector(list(b"ab"), cache_key(two=1))[0]


@pytest.mark.parametrize("scale", [1e30, -1e30])
async def test_a_default_scale_may_be_larger_than_a_request_may_choose(toy: Toy, scale: float) -> None:
    toy.adapters = (AdapterConfig("/lora/one.gguf", scale),)
    async with toy.engine() as engine:
        assert await engine.generate("hello", max_tokens=20).collect() == said("hello", one=scale)


SETS: list[dict[str, float]] = [{}, {"one": 1.0}, {"two": 1.0}, {"one": 1.0, "two": 0.5}]


async def read_all(engine: Engine, requests: dict[str, dict[str, float]], n_tokens: int, **options: Any) -> None:
    """Read all requests at the same time, each with its own adapters, and check the texts."""

    async def read(prompt: str, scales: dict[str, float]) -> None:
        generation = engine.generate(prompt, max_tokens=n_tokens, adapters=chosen(**scales), **options)
        assert await generation.collect() == said(prompt, n_tokens, **scales)

    async with trio.open_nursery() as nursery:
        for prompt, scales in requests.items():
            nursery.start_soon(read, prompt, scales)


@pytest.mark.parametrize("slots", [1, 2, 4])
async def test_different_sets_of_adapters_run_side_by_side(toy: Toy, slots: int) -> None:
    with_adapters(toy)
    requests = {prompt: SETS[n % len(SETS)] for n, prompt in enumerate(prompts(10, 40))}
    async with toy.engine(slots=slots, batch_size=16) as engine:
        await read_all(engine, requests, 40)
        await until_idle(engine)
    assert len({batch.kind.adapters for batch in toy.context.batches}) == len(SETS)


async def test_no_set_of_adapters_starves(toy: Toy) -> None:
    """Each set has its turn, however many requests have another set."""
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


async def test_a_prompt_is_found_in_the_cache_only_with_the_same_adapters(toy: Toy) -> None:
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


async def test_a_request_follows_only_prompts_with_the_same_adapters(toy: Toy) -> None:
    """The same prompts at the same time are decoded once per set of adapters."""
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


async def test_a_preempted_request_goes_on_with_its_own_adapters(toy: Toy) -> None:
    with_adapters(toy)
    slow, quick, other = prompts(3, 100)
    async with toy.engine(slots=1) as engine:
        background = engine.generate(slow, max_tokens=60, adapters=chosen(one=1), priority="background")
        async with background:
            text = "".join([(await anext(background)).text for _ in range(5)])
            await read_all(engine, {quick: {"two": 1.0}, other: {}}, 20)
            text += "".join([event.text async for event in background])
        assert text == said(slow, 60, one=1)


async def test_an_unknown_adapter_takes_no_slot(toy: Toy) -> None:
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


async def test_an_adapter_may_be_chosen_only_once(toy: Toy) -> None:
    with_adapters(toy)
    async with toy.engine() as engine:
        with pytest.raises(InvalidRequest) as caught:
            engine.generate("hello", adapters=(*chosen(one=1), *chosen(one=2)))
        assert caught.value.param == "adapters"
