"""The engine over the native library: what the toy promises holds for real memory and real arithmetic too."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trio

from tests.engine.toys import until, until_idle
from tests.placing import device_number, model_config
from tests.tiny_models import tiny_model
from trio_runner.engine.engine import Engine
from trio_runner.engine.generation import Generation
from trio_runner.events import Finished, SampledToken
from trio_runner.front_door import open_engine
from trio_runner.request import GenerateRequest
from trio_runner.sampling import SamplingParams

DEADLINE = 60.0
KINDS = ["llama", "swa", "mrope", "gpt2", "mamba", "lfm2", "t5"]
"""One for each kind of memory there is."""
GREEDY = SamplingParams(temperature=0, repeat_penalty=1)
NEAR_TIE = 0.05
"""Nats. GPUs round a row differently alone and in a batch, and so does T5 with its biased attention. If the two most
probable tokens are nearer to each other than this, either may be chosen."""
PROMPT = "the story and the model and the answer of the user " * 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@asynccontextmanager
async def running(models: Path, name: str, **options: object) -> AsyncIterator[Engine]:
    settings = {"threads": 1, "context_length": 512, "batch_size": 64, "kv_type": "f32"} | options
    with trio.fail_after(DEADLINE):
        async with open_engine(model_config(tiny_model(name, models)), **settings) as engine:  # type: ignore[arg-type]
            yield engine


def asked(prompt: str, max_tokens: int | None = 40, **fields: object) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, max_tokens=max_tokens, sampling=GREEDY, **fields)  # type: ignore[arg-type]


async def tokens_of(engine: Engine, prompt: str, **fields: object) -> list[SampledToken]:
    """The tokens of a greedy continuation, each with the most probable alternatives."""
    request = replace(asked(prompt, 40, **fields), sampling=replace(GREEDY, logprobs=2))
    async with engine.generate(request) as generation:
        return [token async for event in generation for token in getattr(event, "tokens", ())]


def assert_same_tokens(found: list[SampledToken], expected: list[SampledToken]) -> None:
    """The tokens are equal up to the first near tie that was decided the other way. A wrong cell in the cache shows: it
    changes probabilities by far more than rounding does."""
    for one, other in zip(found, expected, strict=False):
        if one.token != other.token:
            assert margin(other) < NEAR_TIE
            return
        assert one.logprob == pytest.approx(other.logprob, abs=NEAR_TIE)
    assert len(found) == len(expected)


def margin(token: SampledToken) -> float:
    return token.top[0].logprob - token.top[1].logprob


async def alone(engine: Engine, *prompts: str) -> dict[str, str]:
    """The texts of the prompts, one after the other, without the prompt cache."""
    return {prompt: await engine.generate(asked(prompt, cache_prompt=False)).collect() for prompt in prompts}


@pytest.mark.parametrize("name", KINDS)
async def test_a_preempted_request_continues_its_text(models: Path, name: str) -> None:
    slow, *quick = "hello", "the world", "a count", "system and user"
    async with running(models, name, slots=1) as engine:
        texts = await alone(engine, slow, *quick)
        background = engine.generate(asked(slow, priority="background"))
        async with background:
            pieces = [(await anext(background)).text for _ in range(5)]
            for prompt in quick:
                assert await engine.generate(asked(prompt)).collect() == texts[prompt]
            pieces += [event.text async for event in background]
        assert "".join(pieces) == texts[slow]
        assert background.usage is not None
        assert background.usage.completion_tokens == 40


async def test_embeddings_beside_full_slots(models: Path) -> None:
    async with running(models, "llama", slots=1, max_queue=1) as engine:
        vectors = await engine.embed([PROMPT[:80], "hello"])
        assert not np.allclose(vectors[0], vectors[1])
        text = (await alone(engine, "hello"))["hello"]
        streams = [engine.generate(asked("hello")), engine.generate(asked("the world", None))]
        for stream in streams:
            await stream.start()
        first = (await anext(streams[0])).text
        atol = 0.0 if device_number() is None else 1e-4
        np.testing.assert_allclose(await engine.embed([PROMPT[:80], "hello"]), vectors, rtol=0, atol=atol)
        assert first + await streams[0].collect() == text
        streams[1].close()


LONG = {"embedding_batch_size": 512}


@pytest.mark.parametrize(("name", "options"), [("llama", {}), ("bert", LONG), ("mamba", LONG), ("lfm2", LONG)])
async def test_a_long_embedding_does_not_depend_on_the_batch_size(
    models: Path, name: str, options: dict[str, int]
) -> None:
    """Its last row is its embedding, or the batch of an encoder or a recurrent model is as long as the text."""
    text = PROMPT[:300]
    async with running(models, name, batch_size=512) as engine:
        expected = await engine.embed([text, "hello"])
    async with running(models, name, **options) as engine:
        assert len(await engine.tokenize(text)) > engine.config.batch_size
        np.testing.assert_array_equal(await engine.embed([text, "hello"]), expected)
        if engine.capabilities.can_generate:
            texts = await alone(engine, "hello")
            np.testing.assert_array_equal(await engine.embed([text]), expected[:1])
            assert await alone(engine, "hello") == texts


async def test_an_encoder_gets_no_more_rows_than_it_was_trained_for(models: Path) -> None:
    async with running(models, "bert", context_length=2048, embedding_batch_size=2048) as engine:
        assert engine.capabilities.max_rows == engine.info.n_ctx_train == 512
    async with running(models, "llama", embedding_batch_size=512) as engine:
        assert engine.capabilities.max_rows == engine.config.batch_size


@pytest.mark.parametrize("name", KINDS)
async def test_a_deadline_ends_a_text_early(models: Path, name: str) -> None:
    async with running(models, name) as engine:
        whole = (await alone(engine, "hello"))["hello"]
        generation = engine.generate(asked("hello", None, deadline=0.3))
        events = [event async for event in generation]
        last = events[-1]
        assert isinstance(last, Finished)
        assert last.reason == "deadline"
        text = "".join(event.text for event in events)
        assert text.startswith(whole) or whole.startswith(text)
        await until_idle(engine)


async def test_requests_with_a_shared_prefix_decode_it_once(models: Path) -> None:
    async with running(models, "llama", slots=4) as engine:
        prompts = [f"{PROMPT}{word}" for word in ("hello", "world", "count", "system")]
        n_shared_cells = len(await engine.tokenize(PROMPT))
        texts: dict[str, str] = {}

        async def read(prompt: str) -> None:
            texts[prompt] = await engine.generate(asked(prompt)).collect()

        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(read, prompt)
        assert engine.statistics().scheduler.n_prompt_rows < n_shared_cells * 1.2
        assert texts == await alone(engine, *prompts)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", KINDS)
async def test_requests_that_stay_do_not_notice_those_that_go(models: Path, name: str, seed: int) -> None:
    """Three stay. Sixty go: in the queue, in the middle of a prompt, or while they decode."""
    chance = random.Random(seed)
    longest = 60 if name == "gpt2" else 300  # characters; the table of positions has 96 entries
    prompts = [PROMPT[: longest // 8 * n] + word for n, word in enumerate(("hello", "world", "count"), 1)]
    found: dict[str, list[SampledToken]] = {}

    async def stay(engine: Engine, prompt: str) -> None:
        found[prompt] = await tokens_of(engine, prompt, priority=chance.choice(["interactive", "background"]))

    async def go(engine: Engine, prompt: str, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await Generation.collect(engine.generate(asked(prompt, None)))

    # An encoder reads all texts in one batch.
    async with running(models, name, slots=3, batch_size=512 if name == "t5" else 64) as engine:
        expected = {prompt: await tokens_of(engine, prompt, cache_prompt=False) for prompt in prompts}
        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(stay, engine, prompt)
                for _ in range(20):
                    start = chance.choice([prompt, PROMPT, PROMPT[::-1]])
                    nursery.start_soon(go, engine, start[: chance.randrange(20, longest)], chance.random() * 0.05)
                    await trio.sleep(chance.random() * 0.005)
        for prompt in prompts:
            if device_number() is None and name != "t5":
                assert found[prompt] == expected[prompt]
            else:
                assert_same_tokens(found[prompt], expected[prompt])
        await until_idle(engine)
        await until(lambda: engine.statistics().scheduler.n_preempted == 0)
