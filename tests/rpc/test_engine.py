"""A model whose layers lie on two rpc-servers generates the same text as in one process."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import trio

from tests.engine.toys import picture, until, until_idle
from tests.rpc.servers import RpcServer
from trio_runner.config import AdapterConfig, ModelConfig
from trio_runner.engine.engine import Engine
from trio_runner.events import PromptProgress, TokenInfo
from trio_runner.front_door import open_engine
from trio_runner.models import DEFAULT_MODEL, resolve_model
from trio_runner.request import GenerateRequest
from trio_runner.sampling import SamplingParams

Models: TypeAlias = Callable[[str], Path]
Servers: TypeAlias = tuple[RpcServer, RpcServer]

DEADLINE = 60.0
PROMPT = "the story and the model and the answer of the user " * 4


@asynccontextmanager
async def running(path: Path, *servers: RpcServer, **options: object) -> AsyncIterator[Engine]:
    """An engine whose layers lie on `servers` in equal shares, or in this process without servers."""
    names = ("adapters", "projector", "gpu_layers")
    chosen = {name: options.pop(name) for name in names if name in options}
    endpoints = tuple(server.endpoint for server in servers)
    config = ModelConfig(path=str(path), rpc=endpoints, tensor_split=(1,) * len(servers), **chosen)  # type: ignore[arg-type]
    settings = {"threads": 1, "slots": 2, "context_length": 512, "batch_size": 64, "kv_type": "f32"} | options
    with trio.fail_after(DEADLINE):
        async with open_engine(config, **settings) as engine:  # type: ignore[arg-type]
            yield engine


def asked(prompt: str = PROMPT, max_tokens: int = 24, **fields: object) -> GenerateRequest:
    greedy = SamplingParams(temperature=0, repeat_penalty=1, logprobs=2)
    return GenerateRequest(prompt=prompt, max_tokens=max_tokens, sampling=greedy, **fields)  # type: ignore[arg-type]


Told: TypeAlias = tuple[str, list[float]]
"""A text, and the log-probabilities of its tokens and of their alternatives."""


async def told(engine: Engine, request: GenerateRequest | None = None) -> Told:
    text, logprobs = "", []
    async for event in engine.generate(request or asked()):
        text += event.text
        for token in getattr(event, "tokens", ()):
            alternatives: tuple[TokenInfo, ...] = token.top
            logprobs += [token.logprob, *(other.logprob for other in alternatives)]
    assert text
    assert logprobs
    return text, logprobs


@pytest.mark.parametrize("name", ["llama", "swa", "mrope", "mamba", "lfm2", "gpt2", "t5"])
async def test_the_text_is_the_same(models: Models, servers: Servers, name: str) -> None:
    request = asked("the story of the user" if name == "gpt2" else PROMPT)
    async with running(models(name)) as engine:
        expected = await told(engine, request)
    async with running(models(name), *servers) as engine:
        assert await told(engine, request) == expected


async def test_layers_lie_on_both_servers(models: Models, servers: Servers) -> None:
    async with running(models("swa"), *servers) as engine:
        placement = engine.placement
    assert placement is not None
    assert (placement.n_device_layers, placement.n_layers) == (7, 7)
    assert [device.description for device in placement.devices] == [server.endpoint for server in servers]
    for device in placement.devices:
        use = placement.used(device.number)
        assert device.is_remote
        assert min(use.model, use.context, use.compute) > 100_000
    assert placement.used(None).context == 0
    async with running(models("swa"), *servers[::-1], gpu_layers=2) as engine:
        placement = engine.placement
    assert placement is not None
    assert placement.n_device_layers == 2
    assert [device.description for device in placement.devices] == [server.endpoint for server in servers[::-1]]
    assert placement.used(None).context > 100_000


async def test_a_prompt_is_found_in_the_cache(models: Models, servers: Servers) -> None:
    async with running(models("llama"), *servers) as engine:
        request = asked(cache_prompt=True)
        first = await told(engine, request)
        generation = engine.generate(request)
        assert await generation.collect() == first[0]
        assert generation.usage is not None
        assert generation.usage.cached_tokens == generation.usage.prompt_tokens - 1


@pytest.mark.parametrize("name", ["llama", "swa"])
async def test_a_full_context_shifts(models: Models, servers: Servers, name: str) -> None:
    request = asked("hello world", 150, shift=True)
    async with running(models(name), context_length=64) as engine:
        expected = await told(engine, request)
    async with running(models(name), *servers, context_length=64) as engine:
        assert await told(engine, request) == expected


@pytest.mark.parametrize("name", ["bert", "llama", "qwen-embed"])
async def test_embeddings_are_the_same(models: Models, servers: Servers, name: str) -> None:
    texts = ["hello", "the model and the answer", "a count", "system and user " * 3]
    async with running(models(name)) as engine:
        vectors = await engine.embed(texts)
    async with running(models(name), *servers) as engine:
        np.testing.assert_array_equal(await engine.embed(texts), vectors)


async def test_a_retry_continues_where_the_prompt_was_cancelled(models: Models, servers: Servers) -> None:
    """The running batch is not aborted, but the rest of the prompt is not decoded."""
    async with running(models("swa"), context_length=2048, batch_size=16) as engine:
        expected = await told(engine, asked(PROMPT * 4))
    async with running(models("swa"), *servers, context_length=2048, batch_size=16) as engine:
        n_decoded = 0
        generation = engine.generate(asked(PROMPT * 4, cache_prompt=True, progress=True))
        async with generation:
            async for event in generation:
                assert isinstance(event, PromptProgress), "the prompt is at its end"
                n_decoded = event.n_decoded
                if n_decoded >= 48:
                    break
        await until_idle(engine)
        again = engine.generate(asked(PROMPT * 4, cache_prompt=True))
        assert await again.collect() == expected[0]
        assert again.usage is not None
        assert n_decoded <= again.usage.cached_tokens < again.usage.prompt_tokens
        assert await told(engine, asked(PROMPT * 4)) == expected


async def test_adapters_and_images_work(models: Models, servers: Servers) -> None:
    fields = {"adapters": (AdapterConfig(str(models("lora"))),), "projector": str(models("mmproj"))}
    prompts: list[Any] = [PROMPT, ["see ", picture(0), " and say"]]
    async with running(models("llama"), **fields) as engine:
        texts = [await engine.generate(prompt, temperature=0, max_tokens=16).collect() for prompt in prompts]
    async with running(models("llama"), *servers, **fields) as engine:
        assert texts == [await engine.generate(prompt, temperature=0, max_tokens=16).collect() for prompt in prompts]


# A server keeps the last graph of each device for the next token. It drops the graph when anything is freed.


async def test_an_adapter_is_tried_beside_a_stream(models: Models, servers: Servers) -> None:
    async with running(models("llama")) as engine:
        expected = await told(engine, asked(max_tokens=200))
    async with running(models("llama"), *servers) as engine, trio.open_nursery() as nursery:

        async def load() -> None:
            for name in itertools.count():
                await engine.load_adapter(models("lora"), name=f"a{name}")

        nursery.start_soon(load)
        await until(lambda: bool(engine.adapters))
        assert await told(engine, asked(max_tokens=200)) == expected
        nursery.cancel_scope.cancel()


async def test_several_engines_share_a_server(models: Models, servers: Servers) -> None:
    names = ("llama", "llama", "swa", "lfm2")
    expected = {}
    for name in {*names}:
        async with running(models(name)) as engine:
            expected[name] = await told(engine, asked(max_tokens=80))

    async def use(name: str, *, task_status: trio.TaskStatus[None]) -> None:
        async with running(models(name), servers[0]) as engine:
            task_status.started()
            for _ in range(2):
                assert await told(engine, asked(max_tokens=80)) == expected[name]

    async with trio.open_nursery() as nursery:
        for name in names:
            await nursery.start(use, name)


async def test_the_default_model_on_two_servers(servers: Servers) -> None:
    model = resolve_model(DEFAULT_MODEL.name)
    fields: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    async with running(model, *servers, kv_type="f16") as engine:
        assert engine.placement is not None
        assert engine.placement.n_device_layers == engine.placement.n_layers == 31
        assert "Paris" in await engine.generate("The capital of France is", **fields).collect()
