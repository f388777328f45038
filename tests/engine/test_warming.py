"""Requests that only decode their prompt, and requests that share one prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.test_tiny_models import asked, running, tokens_of
from tests.engine.toys import Projector, Toy, items_of, picture, prompts
from trio_runner.core.ports import EncodedImage
from trio_runner.engine.generation import Generation
from trio_runner.events import Finished
from trio_runner.pixels import Pixels
from trio_runner.request import GenerateRequest
from trio_runner.testing import toy_text

PROMPT = "the story and the model and the answer of the user " * 3


async def finished(generation: Generation) -> Finished:
    """The last event, which must be the only one."""
    async with generation:
        (event,) = [event async for event in generation]
    assert isinstance(event, Finished)
    return event


async def test_the_prompt_is_in_the_cache_afterwards(toy: Toy) -> None:
    (prompt,) = prompts(1, 20)
    async with toy.engine() as engine:
        end = await finished(engine.generate(prompt, max_tokens=0))
        assert end.reason == "length"
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (len(prompt), 0)
        assert not toy.model.samplers
        generation = engine.generate(prompt, max_tokens=20)
        assert await generation.collect() == toy_text(prompt, 20)
        assert generation.usage is not None
        assert generation.usage.cached_tokens == len(prompt) - 1


async def test_conversations_and_images_can_be_warmed(toy: Toy) -> None:
    toy.info = {"chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}"}
    toy.projector = Projector()
    content = [{"type": "text", "text": "look: "}, {"type": "image", "image": picture(1)}]
    n_prompt = len(items_of(toy.projector, ["look: ", picture(1)]))
    async with toy.engine() as engine:
        chat = [{"role": "user", "content": content}]
        assert (await finished(engine.chat(chat, max_tokens=0))).usage.prompt_tokens == n_prompt
        generation = engine.generate(["look: ", picture(1)], max_tokens=5)
        await generation.collect()
        assert generation.usage is not None
        assert generation.usage.cached_tokens == n_prompt - 1


class BareProjector(Projector):
    """Puts no token behind an image, as some real ones do."""

    def image(self, pixels: Pixels) -> EncodedImage:
        image = super().image(pixels)
        return replace(image, items=image.items[:-1])


async def test_a_warmed_prompt_that_ends_with_an_image_is_not_cut_within_it(toy: Toy) -> None:
    toy.projector = BareProjector(causal=False)
    toy.capabilities = {"can_trim": False, "can_shift": False}
    items = items_of(toy.projector, ["look: ", picture(1)])
    async with toy.engine() as engine:
        assert (await finished(engine.generate(["look: ", picture(1)], max_tokens=0))).reason == "length"
        generation = engine.generate(["look: ", picture(1)], max_tokens=5)
        assert await generation.collect() == toy_text(items, 5)
        assert generation.usage is not None
        assert generation.usage.cached_tokens == len("look: <")


@pytest.mark.parametrize("name", ["llama", "mamba", "swa", "t5"])
async def test_a_warmed_prompt_of_a_real_model(tmp_path: Path, name: str) -> None:
    async with running(tmp_path, name) as engine:
        expected = await tokens_of(engine, PROMPT, cache_prompt=False)
        # Other prompts, so that only the warming can have left this one in the cache.
        for n in range(3):
            await engine.generate(asked(f"{n}", 1, cache_prompt=False)).collect()
        end = await finished(engine.generate(asked(PROMPT, 0, cache_prompt=False)))
        assert end.usage.completion_tokens == 0
        generation = engine.generate(asked(PROMPT, len(expected)))
        text = await generation.collect()
        assert text.encode() == b"".join(token.piece for token in expected)
        assert generation.usage is not None
        assert generation.usage.prompt_tokens - generation.usage.cached_tokens == 1 or name == "t5"


@pytest.mark.parametrize("cache_prompt", [True, False])
async def test_several_answers_to_one_prompt_decode_it_once(toy: Toy, cache_prompt: bool) -> None:
    (prompt,) = prompts(1, 20)
    request = GenerateRequest(prompt=prompt, max_tokens=20, share_prompt=True, cache_prompt=cache_prompt)
    async with toy.engine(slots=3) as engine:
        generations = [engine.generate(request) for _ in range(5)]
        for generation in generations:
            await generation.start()
        assert {await generation.collect() for generation in generations} == {toy_text(prompt, 20)}
        assert engine.statistics().scheduler.n_prompt_rows == len(prompt) + 4
