"""Log-probabilities of the tokens of a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.test_tiny_models import PROMPT, asked, running, tokens_of
from tests.engine.toys import Gate, Projector, Toy, items_of, picture, prompts, until
from trio_runner.core.batch import MAX_SCORED_ROWS
from trio_runner.engine.engine import Engine
from trio_runner.errors import Unsupported
from trio_runner.events import Finished, SampledToken
from trio_runner.image_source import ImageSource
from trio_runner.request import GenerateRequest
from trio_runner.testing import toy_score, toy_text


async def finished(engine: Engine, request: GenerateRequest) -> Finished:
    async with engine.generate(request) as generation:
        *_, last = [event async for event in generation]
    assert isinstance(last, Finished)
    return last


def expected(prompt: str, n_top: int) -> tuple[SampledToken, ...]:
    data = prompt.encode()
    return tuple(toy_score(data[:index], data[index], n_top) for index in range(1, len(data)))


@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("n_top", [0, 3])
async def test_every_token_but_the_first_has_one(toy: Toy, max_tokens: int, n_top: int) -> None:
    prompt = "a prompt that is longer than what one batch may score, however small the vocabulary of the toy is"
    assert len(prompt) > MAX_SCORED_ROWS
    async with toy.engine() as engine:
        for _ in range(2):  # the second time, the prompt is in the cache
            request = GenerateRequest(prompt=prompt, max_tokens=max_tokens, prompt_logprobs=n_top)
            last = await finished(engine, request)
            assert last.prompt_logprobs == expected(prompt, n_top)
            assert last.usage.cached_tokens == 0
        generation = engine.generate(prompt, max_tokens=5)
        assert await generation.collect() == toy_text(prompt, 5)
        assert generation.usage is not None
        assert generation.usage.cached_tokens == len(prompt) - 1


async def test_nothing_is_reported_without_asking(toy: Toy) -> None:
    async with toy.engine() as engine:
        assert (await finished(engine, GenerateRequest(prompt="hello", max_tokens=3))).prompt_logprobs == ()
    assert not any(batch.kind.scored for batch in toy.context.batches)


async def test_streams_go_on_beside_it(toy: Toy) -> None:
    (stream_prompt,) = prompts(1, 40)
    scored = "a prompt " * 40
    async with toy.engine(slots=2) as engine:
        stream = engine.generate(stream_prompt, max_tokens=40)
        await stream.start()
        last = await finished(engine, GenerateRequest(prompt=scored, max_tokens=0, prompt_logprobs=0))
        assert last.prompt_logprobs == expected(scored, 0)
        assert await stream.collect() == toy_text(stream_prompt, 40)


async def test_rows_whose_batch_was_aborted_are_scored_again(toy: Toy) -> None:
    """Rows that an aborted batch has left in the cache have no logits any more."""
    toy.on_decode = gate = Gate(toy, n_kept=50)
    scored = "a prompt that is scored"
    async with toy.engine(slots=3) as engine:
        first = engine.generate("hello", max_tokens=1)
        await first.start()
        await gate.reached(1)
        cancelled = engine.generate("x" * 40, max_tokens=1, prompt_logprobs=0)
        await cancelled.start()
        async with engine.generate(scored, max_tokens=0, prompt_logprobs=1) as generation:
            gate.let(1)
            await gate.reached(2)
            assert [len(chunk.items) for chunk in gate.batches[1].chunks] == [40, len(scored)]
            cancelled.close()
            await until(lambda: gate.n_aborted == 1)
            gate.open()
            (last,) = [event async for event in generation]
    assert isinstance(last, Finished)
    assert last.prompt_logprobs == expected(scored, 1)


async def test_rows_of_images_have_none_but_tell_of_the_token_after_them(toy: Toy) -> None:
    toy.projector = Projector()
    parts: list[str | ImageSource] = ["see ", picture(1), " and ", picture(2)]
    items = items_of(toy.projector, parts)
    async with toy.engine() as engine:
        last = await finished(engine, GenerateRequest(prompt=tuple(parts), max_tokens=2, prompt_logprobs=0))
    assert last.prompt_logprobs == tuple(
        toy_score(items[:index], item) for index, item in enumerate(items) if index and isinstance(item, int)
    )


@pytest.mark.parametrize("name", ["llama", "spm", "swa", "mrope", "gpt2", "mamba", "lfm2"])
async def test_they_are_those_that_the_tokens_had_when_they_were_sampled(tmp_path: Path, name: str) -> None:
    async with running(tmp_path, name, context_length=256) as engine:
        prompt = await engine.tokenize(PROMPT[:60])
        sampled = await tokens_of(engine, PROMPT[:60])
        whole = (*prompt, *(token.token for token in sampled))
        request = GenerateRequest(prompt=whole, max_tokens=0, prompt_logprobs=2)
        scores = (await finished(engine, request)).prompt_logprobs
        assert [score.token for score in scores] == list(whole[1:])
        assert list(scores[-len(sampled) :]) == sampled
        # The prompt that was scored is in the cache like any other.
        generation = engine.generate(asked(PROMPT[:60], 1))
        await generation.collect()
        assert generation.usage is not None
        assert generation.usage.cached_tokens == len(prompt) - 1 or name in ("mamba", "lfm2")


async def test_the_tokens_that_an_encoder_reads_have_none(tmp_path: Path) -> None:
    async with running(tmp_path, "t5") as engine:
        with pytest.raises(Unsupported) as caught:
            await engine.generate("hello", prompt_logprobs=0).start()
    assert caught.value.param == "prompt_logprobs"
