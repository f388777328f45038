"""The engine with a model on a device."""

from __future__ import annotations

from pathlib import Path

from tests.devices.again import again
from tests.engine import test_tiny_models
from tests.engine.test_tiny_models import PROMPT, asked, running
from tests.engine.toys import until, until_idle

models = test_tiny_models.models

test_who_stays = again(
    test_tiny_models.test_requests_that_stay_do_not_notice_those_that_go, "name,seed", [("llama", 0)]
)
test_an_embedding = test_tiny_models.test_embeddings_beside_full_slots


async def test_stop_and_shift(models: Path) -> None:
    async with running(models, "llama", slots=1, context_length=64) as engine:
        generation = engine.generate(asked("hello world", 100, shift=True))
        text = await generation.collect()
        assert generation.usage is not None
        assert generation.usage.completion_tokens == 100
        stop = text[70:74]
        end = text.index(stop)
        assert await engine.generate(asked("hello world", 100, shift=True, stop=(stop,))).collect() == text[:end]


async def test_a_cancelled_prompt_ends_at_once(models: Path) -> None:
    """The running batch is aborted, the next one does not begin, and the rows before stay in the cache."""
    prompt = PROMPT * 2
    async with running(models, "llama", slots=1, context_length=512) as engine:
        text = await engine.generate(asked(prompt, 8, cache_prompt=False)).collect()
        n_rows = engine.statistics().scheduler.n_prompt_rows
        generation = engine.generate(asked("hello" + prompt, 8))
        await generation.start()
        await until(lambda: engine.statistics().scheduler.n_prompt_rows > n_rows)
        generation.close()
        await until_idle(engine)
        done = engine.statistics().scheduler
        again = engine.generate(asked("hello" + prompt, 8))
        whole = await again.collect()
        assert again.usage is not None
        assert 0 < again.usage.cached_tokens < again.usage.prompt_tokens - 1
        assert done.n_prompt_rows - n_rows == again.usage.cached_tokens
        assert await engine.generate(asked("hello" + prompt, 8, cache_prompt=False)).collect() == whole
        assert await engine.generate(asked(prompt, 8)).collect() == text
