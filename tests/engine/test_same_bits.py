"""Batch invariance on the CPU: the same request gives the same tokens, log-probabilities and embeddings, to the last
bit. Other requests, the prompt cache and the steps that its prompt is cut into make no difference.

tests/engine/company.py makes the schedules; `TRIO_RUNNER_TEST_EVENTS=1000` in the environment makes them longer. A
failure names the requests that differ, and `python -m tests.engine.play` finds the shortest schedule that does.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import trio

from tests.engine.company import Company
from tests.placing import model_config
from tests.tiny_models import tiny_model
from tests.tiny_wide import wide_model
from tests.weight_types import OTHER_TYPES, OUR_TYPES, convert
from trio_runner.config import AdapterConfig
from trio_runner.engine.engine import Engine
from trio_runner.events import SampledToken
from trio_runner.front_door import open_engine
from trio_runner.request import GenerateRequest
from trio_runner.sampling import SamplingParams

TYPES = (*OUR_TYPES, *OTHER_TYPES)
N_EVENTS = int(os.environ.get("TRIO_RUNNER_TEST_EVENTS", "60"))
"""Events of one schedule. All schedules of the suite have more than 2,000 together."""
DEADLINE = 60.0
PROMPT = "the story and the model and the answer of the user " * 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def converted(models: Path, name: str, kind: str) -> Path:
    """A model of tests/tiny_models.py with weights of another type."""
    path = models / f"{name}-{kind}.gguf"
    convert(tiny_model(name, models), path, kind)
    return path


def check(path: Path, *, seed: int, n_events: int = N_EVENTS, **options: object) -> Counter[str]:
    """Play a schedule, and compare everyone with their run alone. Returns what happened, by its name."""
    company = Company(path, seed=seed, **options)  # type: ignore[arg-type]
    company.play(n_events)
    assert company.differences() == []
    return company.counts


@pytest.mark.parametrize("kind", TYPES)
def test_weights_of_every_type(models: Path, kind: str) -> None:
    check(wide_model("wide", kind, models), seed=TYPES.index(kind))


@pytest.mark.parametrize("kind", TYPES)
def test_the_number_of_threads_changes_no_bit(models: Path, kind: str) -> None:
    """The runs alone have one thread, the company has two. Few steps, for on a busy machine threads wait for long."""
    check(wide_model("wide", kind, models), seed=TYPES.index(kind), n_events=max(N_EVENTS // 12, 5), threads=2)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "q4_K", "q6_K", "iq4_nl", "mxfp4", "f16", "f32", "iq3_s"])
def test_experts(models: Path, kind: str) -> None:
    """Each expert computes the rows that chose it, so what is beside a row changes with every batch."""
    check(wide_model("wide-moe", kind, models), seed=30)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "f16", "f32"])
@pytest.mark.parametrize("name", ["swa", "swa-short", "mrope", "gpt2"])
def test_other_kinds_of_attention(models: Path, name: str, kind: str) -> None:
    """A sliding window, positions of several components, and positions from a table."""
    check(converted(models, name, kind), seed=40, context_length=96 if name == "gpt2" else 160)


@pytest.mark.parametrize("kind", ["q8_0", "f32"])
@pytest.mark.parametrize("name", ["mamba", "lfm2"])
def test_recurrent_state(models: Path, name: str, kind: str) -> None:
    """Layers that compute a prompt row by row. Of those that compute it in pieces nothing is promised."""
    check(converted(models, name, kind), seed=45)


@pytest.mark.parametrize("kind", ["q4_0", "q4_K", "f16"])
def test_adapters(models: Path, kind: str) -> None:
    adapter = AdapterConfig(str(wide_model("wide-lora", "f32", models)))
    check(wide_model("wide", kind, models), seed=50, adapters=(adapter,))


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_other_types_of_kv_cache(models: Path, kv_type: str) -> None:
    """All other tests have f16, as an engine by default. More types than these are not promised: docs/behaviour.md."""
    check(wide_model("wide", "q4_0", models), seed=60, kv_type=kv_type)


def test_a_schedule_has_everything_in_it(models: Path) -> None:
    counts = check(wide_model("wide", "q4_0", models), seed=70, n_events=max(N_EVENTS, 150))
    happened = {what for what, n in counts.items() if n >= 3}
    assert happened >= {"cancel", "pause", "resume", "ABORTED", "copies", "cache hits", "preemptions"}, counts


def test_a_difference_is_found(models: Path) -> None:
    """The same schedule with other weights alone: everyone differs."""
    company = Company(wide_model("wide", "q4_0", models), seed=80)
    company.play(20)
    company.path = wide_model("wide", "q8_0", models)
    n_compared = sum(bool(told.tokens) for told in company.told.values())
    assert len(company.differences()) >= n_compared > 3


# ---- the engine ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def fresh_engine(path: Path, **options: object) -> AsyncIterator[Engine]:
    settings = {"threads": 1, "context_length": 256, "batch_size": 64} | options
    with trio.fail_after(DEADLINE):
        async with open_engine(model_config(path), **settings) as engine:  # type: ignore[arg-type]
            yield engine


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["bert", "bert-cls", "qwen-embed", "rerank", "llama"])
async def test_embeddings_and_scores(models: Path, name: str, kind: str) -> None:
    """A text alone in an engine of its own, and in a batch with others."""
    path = converted(models, name, kind)
    texts = [f"{'the model and the story ' * (n % 4)}the answer of {n} users" for n in range(12)]

    async def vectors(engine: Engine, chosen: list[str]) -> list[bytes]:
        found = await (engine.rerank("the story", chosen) if name == "rerank" else engine.embed(chosen))
        return [vector.tobytes() for vector in found]

    alone = {}
    for text in texts:
        async with fresh_engine(path) as engine:
            [alone[text]] = await vectors(engine, [text])
    assert len(set(alone.values())) == len(texts)
    async with fresh_engine(path, batch_size=256) as engine:
        for seed in range(3):
            chosen = Random(seed).choices(texts, k=20)
            assert await vectors(engine, chosen) == [alone[text] for text in chosen]


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "q4_K", "f16"])
async def test_streams_beside_clients_that_leave(models: Path, kind: str) -> None:
    """Three streams and clients that are cancelled at any moment, batches that are aborted while they run included."""
    path, chance = wide_model("wide", kind, models), Random(90)
    greedy = SamplingParams(temperature=0, repeat_penalty=1, logprobs=3)
    prompts = [f"{PROMPT[: 60 * n]} {word}" for n, word in enumerate(("hello", "world", "count"))]
    requests = [GenerateRequest(prompt=prompt, max_tokens=48, sampling=greedy) for prompt in prompts]
    alone, beside = [], []
    for request in requests:
        async with fresh_engine(path, batch_size=256) as engine:
            alone.append(await tokens_of(engine, request))

    async def leave(engine: Engine) -> None:
        start = chance.choice([PROMPT, PROMPT[::-1], *prompts])
        with trio.move_on_after(chance.random() * 0.02):
            await engine.generate(start[: chance.randrange(20, 250)], temperature=0).collect()

    async with fresh_engine(path, slots=4) as engine, trio.open_nursery() as nursery:

        async def stay(request: GenerateRequest) -> None:
            beside.append((requests.index(request), await tokens_of(engine, request)))

        for _ in range(10):
            for request in requests:
                nursery.start_soon(stay, request)
            for _ in range(4):
                await leave(engine)
    assert len(beside) == 30
    for index, tokens in beside:
        assert tokens == alone[index]


async def tokens_of(engine: Engine, request: GenerateRequest) -> list[SampledToken]:
    async with engine.generate(request) as generation:
        return [token async for event in generation for token in getattr(event, "tokens", ())]
