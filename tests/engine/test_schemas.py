"""JSON schemas in an engine: from a class to its value, beside other requests, and through whatever interrupts them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.engine.toys import Toy
from tests.placing import model_config
from tests.tiny_models import tiny_model
from trio_runner.engine.engine import Engine
from trio_runner.errors import InvalidGrammar, Unsupported
from trio_runner.events import Finished
from trio_runner.front_door import open_engine
from trio_runner.request import GenerateRequest
from trio_runner.sampling import SamplingParams

pytest.importorskip("llguidance", reason="llguidance is not installed")

DEADLINE = 60.0
FREE = SamplingParams(temperature=1, top_k=0, top_p=1, repeat_penalty=1, seed=3)


class City(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    population: int


LIST = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 20, "maxItems": 20}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@asynccontextmanager
async def running(models: Path, name: str = "llama", **options: object) -> AsyncIterator[Engine]:
    settings = {"threads": 1, "context_length": 512, "batch_size": 64, "kv_type": "f32"} | options
    with trio.fail_after(DEADLINE):
        async with open_engine(model_config(tiny_model(name, models)), **settings) as engine:  # type: ignore[arg-type]
            yield engine


def asked(schema: object, **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt="hello", sampling=replace(FREE, json_schema=json.dumps(schema)), **fields)


async def finished(engine: Engine, request: GenerateRequest | str = "hello", **options: Any) -> tuple[str, Finished]:
    """The whole text, and how it ended."""
    async with engine.generate(request, **options) as generation:
        events = [event async for event in generation]
    assert isinstance(events[-1], Finished)
    return "".join(event.text for event in events), events[-1]


@pytest.mark.parametrize("name", ["llama", "spm", "mamba", "t5"])
async def test_a_class_gives_a_value_of_it(models: Path, name: str) -> None:
    async with running(models, name) as engine:
        text, end = await finished(engine, json_schema=City, temperature=1, seed=6, top_k=0, max_tokens=400)
        if end.reason == "stop":
            msgspec.json.decode(text, type=City)
        short = await engine.generate("hello", json_schema={"enum": ["yes", "no"]}).collect()
        assert short in ('"yes"', '"no"')


async def test_a_value_that_was_cut_says_so(models: Path) -> None:
    async with running(models) as engine:
        text, end = await finished(engine, asked(LIST, max_tokens=5))
        assert end.reason == "length"
        with pytest.raises(ValueError, match="line 1"):
            json.loads(text)


async def test_a_stop_string_may_cut_the_last_token_too(models: Path) -> None:
    async with running(models) as engine:
        text, end = await finished(engine, asked({"const": "yes"}))
        assert (text, end.reason, end.stop) == ('"yes"', "stop", None)
        text, end = await finished(engine, asked({"const": "yes"}, stop=('s"',)))
        assert (text, end.reason, end.stop) == ('"ye', "stop", 's"')


async def test_a_preempted_request_goes_on_in_its_schema(models: Path) -> None:
    async with running(models, slots=1) as engine:
        whole = await engine.generate(asked(LIST, cache_prompt=False)).collect()
        async with engine.generate(asked(LIST, priority="background")) as background:
            pieces = [(await anext(background)).text for _ in range(5)]
            for _ in range(3):
                await engine.generate("the world", max_tokens=3).collect()
            pieces += [event.text async for event in background]
        assert "".join(pieces) == whole
        assert len(json.loads(whole)) == 20


async def test_neighbours_with_and_without_schemas_do_not_notice_each_other(models: Path) -> None:
    prompts = [
        asked(LIST),
        asked({"type": "boolean"}),
        GenerateRequest(prompt="the world", max_tokens=60, sampling=FREE),
    ]
    async with running(models, slots=3) as engine:
        alone = [await engine.generate(replace(request, cache_prompt=False)).collect() for request in prompts]
        together: dict[int, str] = {}

        async def collect(index: int) -> None:
            together[index] = await engine.generate(prompts[index]).collect()

        async with trio.open_nursery() as nursery:
            for index in range(len(prompts)):
                nursery.start_soon(collect, index)
        assert [together[index] for index in range(len(prompts))] == alone


async def test_a_schema_that_cannot_be_honoured_takes_no_slot(models: Path) -> None:
    async with running(models, slots=1) as engine, engine.generate("hello", max_tokens=400) as stream:
        await anext(stream)
        with pytest.raises(InvalidGrammar, match="uniqueItems"):
            await engine.generate("hello", json_schema={"type": "array", "uniqueItems": True}).collect()


async def test_the_toy_model_takes_no_schema(toy: Toy) -> None:
    async with toy.engine() as engine:
        with pytest.raises(Unsupported) as refused:
            await engine.generate("hello", json_schema={}).collect()
        assert refused.value.param == "json_schema"
