"""A model with an encoder and a decoder: the encoder reads the whole prompt at once, and the text begins with a
token of its own."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.core.oracle import alone
from tests.engine.toys import Gate, Toy, prompts, until_idle
from trio_runner.config import AdapterConfig
from trio_runner.core.sequence import SequenceSpec
from trio_runner.engine.engine import Engine
from trio_runner.errors import InvalidRequest, PromptTooLong, Unsupported
from trio_runner.request import AdapterChoice
from trio_runner.testing import ToyAdapters, toy_cache_key, toy_text

START = 1


def reading(toy: Toy) -> None:
    toy.capabilities = {**toy.capabilities, "decoder_start": START}


def said(prompt: str, n_tokens: int = 20, *, adapters: ToyAdapters = (), end: bytes = b"") -> str:
    return toy_text([START], n_tokens, toy_cache_key(adapters, list(prompt.encode() + end)))


async def read_all(engine: Engine, requests: list[str], n_tokens: int, **options: Any) -> None:
    """Read all requests at the same time, and check the texts."""

    async def read(prompt: str) -> None:
        text = await engine.generate(prompt, max_tokens=n_tokens, **options).collect()
        assert text == said(prompt, n_tokens)

    async with trio.open_nursery() as nursery:
        for prompt in requests:
            nursery.start_soon(read, prompt)


@pytest.mark.parametrize("prompt", ["a", "hello", "a prompt that is a bit longer", "été"])
async def test_text_is_that_of_the_model_for_the_prompt_it_read(toy: Toy, prompt: str) -> None:
    reading(toy)
    async with toy.engine() as engine:
        for given in (prompt, list(prompt.encode()), [prompt]):
            assert await engine.generate(given, max_tokens=20).collect() == said(prompt)


async def test_the_encoder_reads_the_token_that_ends_a_prompt(toy: Toy) -> None:
    reading(toy)
    toy.info = {"token_eos": 3, "adds_eos": True}
    async with toy.engine() as engine:
        for prompt in ("hello", ["hello"], ["he", "", "llo"]):
            assert await engine.generate(prompt, max_tokens=20).collect() == said("hello", end=b"\3")


async def test_usage_counts_tokens_of_the_encoder_and_the_decoder(toy: Toy) -> None:
    """Of those that are read, and of those that are said."""
    reading(toy)
    async with toy.engine() as engine:
        generation = engine.generate("hello", max_tokens=3)
        assert await generation.collect() == said("hello", 3)
    assert generation.usage is not None
    assert generation.usage.prompt_tokens == len("hello") + 1
    assert generation.usage.completion_tokens == 3
    assert sum(batch.n_rows for batch in toy.context.batches) == 3


async def test_nothing_is_reused_from_another_prompt(toy: Toy) -> None:
    """All texts begin with the same token, but it depends on the prompt that the encoder read."""
    reading(toy)
    async with toy.engine(slots=1) as engine:
        for prompt in ("hello", "help", "hello", "hello"):
            generation = engine.generate(prompt, max_tokens=20)
            assert await generation.collect() == said(prompt)
            assert generation.usage is not None
            assert generation.usage.cached_tokens == 0


@pytest.mark.parametrize("slots", [1, 3, 8])
async def test_only_so_many_requests_run_as_fit_into_the_encoder(toy: Toy, slots: int) -> None:
    """The toy checks it."""
    reading(toy)
    async with toy.engine(slots=slots, batch_size=32) as engine:
        await read_all(engine, [f"{prompt * n}"[:32] for n, prompt in enumerate(prompts(12, 40), 1)], 40)
        await until_idle(engine)


async def test_closing_a_request_makes_room_in_the_encoder(toy: Toy) -> None:
    reading(toy)
    toy.on_decode = gate = Gate(toy)
    async with toy.engine(slots=4, batch_size=32) as engine:
        first, second = engine.generate("x" * 20, max_tokens=40), engine.generate("y" * 20, max_tokens=20)
        await first.start()
        await second.start()
        gate.let(2)
        await gate.reached(3)
        assert (engine.statistics().busy, engine.statistics().waiting) == (1, 1)
        first.close()
        gate.open()
        assert await second.collect() == said("y" * 20)


async def test_the_encoder_reads_a_preempted_prompt_again(toy: Toy) -> None:
    reading(toy)
    slow, *quick = prompts(3, 60)
    async with toy.engine(slots=1) as engine:
        background = engine.generate(slow, max_tokens=60, priority="background")
        async with background:
            text = "".join([(await anext(background)).text for _ in range(3)])
            await read_all(engine, quick, 20)
            text += "".join([event.text async for event in background])
        assert text == said(slow, 60)


async def test_the_encoder_depends_on_adapters(toy: Toy) -> None:
    reading(toy)
    toy.adapters = (AdapterConfig("/lora/one.gguf"),)
    async with toy.engine(slots=2) as engine, trio.open_nursery() as nursery:

        async def read(scale: float) -> None:
            text = await engine.generate("hello", max_tokens=20, adapters=[AdapterChoice("one", scale)]).collect()
            assert text == said("hello", adapters=[("/lora/one.gguf", scale)] if scale else [])

        for scale in (0.0, 1.0, 0.5, 1.0):
            nursery.start_soon(read, scale)


@pytest.mark.parametrize("can_shift", [False, True])
async def test_a_context_shift_keeps_the_first_token(toy: Toy, can_shift: bool) -> None:
    reading(toy)
    toy.capabilities["can_shift"] = can_shift
    prompt = next(prompt for prompt in prompts(50, 40) if len(_endless(prompt, 100)) > 50)
    async with toy.engine(context_length=24) as engine:
        assert await engine.generate(prompt, max_tokens=100).collect() == _endless(prompt, 100)


def _endless(prompt: str, n_tokens: int) -> str:
    source = tuple(prompt.encode())
    return alone(SequenceSpec(uid=0, prompt=(START,), encoder_tokens=source, n_keep=1, max_tokens=n_tokens), 24).text


async def test_a_prompt_must_fit_into_one_batch(toy: Toy) -> None:
    """The length of the context makes no difference."""
    reading(toy)
    async with toy.engine(batch_size=16, context_length=64) as engine:
        assert await engine.generate("x" * 16, max_tokens=20).collect() == said("x" * 16)
        with pytest.raises(PromptTooLong) as caught:
            await engine.generate("x" * 17).start()
        assert (caught.value.n_prompt, caught.value.n_ctx) == (17, 16)
        text = await engine.generate("0123456789abcdefghij", truncate=True, n_keep=4, max_tokens=20).collect()
        assert text == said("012389abcdefghij")


async def test_an_empty_prompt_is_refused(toy: Toy) -> None:
    reading(toy)
    async with toy.engine() as engine:
        with pytest.raises(InvalidRequest):
            await engine.generate("").start()


async def test_it_makes_no_embeddings(toy: Toy) -> None:
    reading(toy)
    async with toy.engine() as engine:
        with pytest.raises(Unsupported) as caught:
            await engine.embed(["hello"])
        assert caught.value.feature == "embeddings"
