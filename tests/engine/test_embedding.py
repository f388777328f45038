"""Embeddings, alone and among generations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from tests.engine.special_tokens import SPECIALS, around
from tests.engine.toys import Gate, Toy, prompts, until, until_idle
from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.engine.engine import Engine
from trio_runner.errors import DecodeFailed, EngineBusy, InvalidRequest, PromptTooLong, Unsupported
from trio_runner.events import Embedded
from trio_runner.request import EmbedRequest, Priority
from trio_runner.testing import N_EMBD, Interruption, toy_text, toy_vector


async def test_embed_gives_one_row_per_text(toy: Toy) -> None:
    texts = ["one", "two", "three"]
    async with toy.engine() as engine:
        vectors = await engine.embed(texts)
    assert vectors.shape == (3, N_EMBD)
    assert vectors.dtype == np.float32
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_array_equal(vector, toy_vector(list(text.encode())))


async def test_normalised_embeddings(toy: Toy) -> None:
    async with toy.engine() as engine:
        plain, unit = await engine.embed(["one"]), await engine.embed(["one"], normalize=True)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain), rtol=1e-6)


async def test_no_texts_give_no_rows(toy: Toy) -> None:
    async with toy.engine(wait=False) as engine:
        vectors = await engine.embed([])
    assert vectors.shape == (0, N_EMBD)
    assert vectors.dtype == np.float32


@pytest.mark.parametrize("max_queue", [None, 0, 1, 100])
@pytest.mark.parametrize("slots", [1, 3])
async def test_many_texts_over_few_slots(toy: Toy, slots: int, max_queue: int | None) -> None:
    texts = [f"text {n}" for n in range(40)]
    async with toy.engine(slots=slots, max_queue=max_queue) as engine:
        vectors = await engine.embed(texts)
        np.testing.assert_array_equal(vectors, [toy_vector(list(text.encode())) for text in texts])
        assert engine.statistics().generations == 0


async def test_one_embedding_request(toy: Toy) -> None:
    async with toy.engine() as engine:
        embedded = await engine.embed_request(EmbedRequest(content="hello"))
        unit = await engine.embed_request(EmbedRequest(content=tuple(b"hello"), normalize=True))
    vector = np.asarray(embedded.vector)
    assert vector.shape == (N_EMBD,)
    assert vector.dtype == np.float32
    np.testing.assert_array_equal(vector, toy_vector(list(b"hello")))
    np.testing.assert_allclose(np.linalg.norm(np.asarray(unit.vector)), 1, rtol=1e-6)
    assert embedded.usage.prompt_tokens == 5
    assert embedded.usage.completion_tokens == 0


async def test_embeddings_and_generations_take_turns(toy: Toy) -> None:
    """A batch is either for tokens or for embeddings."""
    texts: dict[str, str] = {}
    requests = prompts(6, 60)

    async def read(engine: Engine, prompt: str) -> None:
        texts[prompt] = await engine.generate(prompt, max_tokens=60).collect()

    async with toy.engine(slots=3) as engine, trio.open_nursery() as nursery:
        for prompt in requests:
            nursery.start_soon(read, engine, prompt)
        for n in range(10):
            (vector,) = await engine.embed([f"text {n}"])
            np.testing.assert_array_equal(vector, toy_vector(list(f"text {n}".encode())))
    assert texts == {prompt: toy_text(prompt, 60) for prompt in requests}
    assert {batch.kind.embedding for batch in toy.context.batches} == {False, True}


async def test_a_generation_after_an_embedding_of_the_same_text(toy: Toy) -> None:
    async with toy.engine(slots=1) as engine:
        for _ in range(3):
            await engine.embed(["hello"])
            assert await engine.generate("hello", max_tokens=20).collect() == toy_text("hello", 20)


@pytest.mark.parametrize(
    ("texts", "error"),
    [(["one", "x" * 100], PromptTooLong), (["one", ""], InvalidRequest), (["one", 2], InvalidRequest)],
)
async def test_one_wrong_text_fails_the_list(toy: Toy, texts: list[str], error: type[Exception]) -> None:
    async with toy.engine(context_length=64) as engine:
        with pytest.raises(error) as caught:
            await engine.embed(texts)
        assert getattr(caught.value, "param", None) == "content"
        assert engine.statistics().generations == 0
        await until_idle(engine)


async def test_a_text_must_fit_into_one_batch(toy: Toy) -> None:
    async with toy.engine(batch_size=16) as engine:
        with pytest.raises(PromptTooLong):
            await engine.embed(["x" * 17])
        assert (await engine.embed(["x" * 16])).shape == (1, N_EMBD)


@pytest.mark.parametrize("texts", ["hello", b"hello"])
async def test_one_text_is_not_a_list_of_texts(toy: Toy, texts: Any) -> None:
    async with toy.engine() as engine:
        with pytest.raises(TypeError):
            await engine.embed(texts)


async def test_a_model_that_only_embeds(toy: Toy) -> None:
    toy.capabilities = {"can_generate": False, "has_memory": False}
    async with toy.engine() as engine:
        with pytest.raises(Unsupported):
            await engine.generate("hello").start()
        vectors = await engine.embed(["one", "two"])
        np.testing.assert_array_equal(vectors, [toy_vector(list(text)) for text in (b"one", b"two")])


async def test_an_embedding_whose_batch_fails(toy: Toy) -> None:
    def refuse(batch: Batch) -> Interruption | None:
        return Interruption(DecodeOutcome.INVALID) if batch.kind.embedding else None

    toy.on_decode = refuse
    async with toy.engine() as engine:
        with pytest.raises(DecodeFailed):
            await engine.embed(["one", "two"])
        with pytest.raises(DecodeFailed):
            await engine.embed_request(EmbedRequest(content="one"))
        assert engine.statistics().generations == 0
        assert await engine.generate("hello", max_tokens=20).collect() == toy_text("hello", 20)


async def test_embeddings_do_not_wait_for_slots(toy: Toy) -> None:
    """Every slot is taken, the queue is full, and no generation is about to end."""
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=1, max_queue=1, max_backlog=1000) as engine, trio.open_nursery() as nursery:
        generations = [engine.generate(prompt, max_tokens=40) for prompt in prompts(2, 40)]
        for generation in generations:
            await generation.start()
        gate.let(3)
        await gate.reached(4)
        with pytest.raises(EngineBusy):
            await engine.generate("one too many").start()

        vectors: list[Embedded] = []

        async def embed() -> None:
            vectors.append(await engine.embed_request(EmbedRequest(content="hello")))

        nursery.start_soon(embed)
        await until(lambda: engine.statistics().generations == 3)
        gate.let(2)  # the batch at the gate, and that of the embedding
        await until(lambda: bool(vectors))
        np.testing.assert_array_equal(vectors[0].vector, toy_vector(list(b"hello")))
        assert [batch.kind.embedding for batch in gate.batches[:5]] == [False] * 4 + [True]
        assert engine.statistics().generations == 2
        gate.open()
        for generation, prompt in zip(generations, prompts(2, 40), strict=True):
            assert await generation.collect() == toy_text(prompt, 40)


@pytest.mark.parametrize("n_lanes", [2, 7])
async def test_embeddings_have_a_queue_of_their_own(toy: Toy, n_lanes: int) -> None:
    toy.capabilities = {"n_embed_slots": n_lanes}
    gate = Gate(toy)
    toy.on_decode = gate
    async with toy.engine(slots=2, max_queue=1) as engine:
        async with trio.open_nursery() as nursery:
            for n in range(n_lanes + 1):
                nursery.start_soon(engine.embed_request, EmbedRequest(content=f"text {n}"))
            await until(lambda: engine.statistics().generations == n_lanes + 1)
            with pytest.raises(EngineBusy):
                await engine.embed_request(EmbedRequest(content="one too many"))
            generation = engine.generate("hello", max_tokens=20)
            await generation.start()
            gate.open()
        assert await generation.collect() == toy_text("hello", 20)


async def test_rows_before_the_last_one_share_the_batches_of_tokens(toy: Toy) -> None:
    toy.capabilities = {"embeds_last_row": True}
    (prompt,) = prompts(1, 60)
    texts = [f"a text of some length, number {n}" for n in range(6)]
    async with toy.engine(slots=2, batch_size=32) as engine, engine.generate(prompt, max_tokens=60) as generation:
        await anext(generation)
        np.testing.assert_array_equal(await engine.embed(texts), [toy_vector(list(text.encode())) for text in texts])
        await generation.collect()
    assert max(batch.n_rows for batch in toy.context.batches if batch.kind.embedding) <= 2


async def test_embeddings_push_nothing_out_of_the_prompt_cache(toy: Toy) -> None:
    (prompt,) = prompts(1, 30)
    async with toy.engine(slots=1) as engine:
        await engine.generate(prompt, max_tokens=30).collect()
        await engine.embed([f"text {n}" for n in range(20)])
        retry = engine.generate(prompt, max_tokens=30)
        assert await retry.collect() == toy_text(prompt, 30)
        assert retry.usage is not None
        assert retry.usage.cached_tokens == len(prompt) - 1


# -- a part of a vector, of a part of a text --------------------------------------------------------------------------


async def test_dimensions_are_cut_before_normalising(toy: Toy) -> None:
    whole = toy_vector(list(b"hello"))
    async with toy.engine() as engine:
        np.testing.assert_array_equal(await engine.embed(["hello"], dimensions=3), [whole[:3]])
        (unit,) = await engine.embed(["hello"], dimensions=3, normalize=True)
        np.testing.assert_allclose(unit, whole[:3] / np.linalg.norm(whole[:3]), rtol=1e-6)
        np.testing.assert_array_equal(await engine.embed(["hello"], dimensions=N_EMBD), [whole])
        embedded = await engine.embed_request(EmbedRequest(content="hello", dimensions=1))
        np.testing.assert_array_equal(embedded.vector, whole[:1])
        assert (await engine.embed([], dimensions=3)).shape == (0, 3)


@pytest.mark.parametrize("dimensions", [0, -1, N_EMBD + 1, 2**40, True])
async def test_dimensions_out_of_range_are_refused(toy: Toy, dimensions: int) -> None:
    async with toy.engine() as engine:
        with pytest.raises(InvalidRequest) as caught:
            await engine.embed(["hello"], dimensions=dimensions)
        assert caught.value.param == "dimensions"
        assert toy.context.batches == []


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("n_ctx", [3, 16, 40])
async def test_truncation_cuts_the_end_of_a_text(toy: Toy, special: str, n_ctx: int) -> None:
    """Special tokens at the end stay."""
    toy.info = SPECIALS[special]
    text = b"0123456789abcdefghijklmnopqrstuv"
    n_around = len(around(b"", special))
    async with toy.engine(batch_size=n_ctx) as engine:
        for n in (1, n_ctx - n_around, n_ctx - n_around + 1, len(text)):
            expected = toy_vector(around(text[: min(n, n_ctx - n_around)], special))
            np.testing.assert_array_equal(await engine.embed([text[:n].decode()], truncate=True), [expected])
        # Tokens are taken as they are, without special tokens at their end.
        embedded = await engine.embed_request(EmbedRequest(content=tuple(text), truncate=True))
        np.testing.assert_array_equal(embedded.vector, toy_vector(list(text[:n_ctx])))
        assert embedded.usage.prompt_tokens == min(n_ctx, len(text))


# -- longer than a batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3])
async def test_an_embedding_of_the_last_row_may_be_longer_than_a_batch(toy: Toy, slots: int) -> None:
    toy.capabilities = {"embeds_last_row": True}
    texts = [f"{n}{'x' * (7 * n % 60)}" for n in range(20)]
    async with toy.engine(slots=slots, batch_size=16, context_length=64) as engine:
        np.testing.assert_array_equal(await engine.embed(texts), [toy_vector(list(text.encode())) for text in texts])
        with pytest.raises(PromptTooLong) as caught:
            await engine.embed(["x" * 65])
        assert (caught.value.n_prompt, caught.value.n_ctx) == (65, 64)
        (vector,) = await engine.embed(["x" * 65], truncate=True)
        np.testing.assert_array_equal(vector, toy_vector([ord("x")] * 64))
        await until_idle(engine)


async def test_long_embeddings_take_turns_with_generations(toy: Toy) -> None:
    """They need the same slots. Background requests give theirs up, and lose nothing."""
    toy.capabilities = {"embeds_last_row": True}
    requests = prompts(4, 60)
    texts: dict[str, str] = {}

    async def read(engine: Engine, prompt: str, priority: Priority) -> None:
        texts[prompt] = await engine.generate(prompt, max_tokens=60, priority=priority).collect()

    async with toy.engine(slots=2, batch_size=16, context_length=128) as engine, trio.open_nursery() as nursery:
        for n, prompt in enumerate(requests):
            nursery.start_soon(read, engine, prompt, "background" if n % 2 else "interactive")
        for n in range(5):
            text = f"a text number {n} that is longer than one batch"
            expected = [toy_vector(list(content.encode())) for content in (text, "short")]
            np.testing.assert_array_equal(await engine.embed([text, "short"]), expected)
    assert texts == {prompt: toy_text(prompt, 60) for prompt in requests}


async def test_long_embeddings_give_way_to_generations(toy: Toy) -> None:
    """A hundred of them are in the queue, and a generation that comes later is the next to run."""
    toy.capabilities = {"embeds_last_row": True}
    toy.on_decode = gate = Gate(toy)
    texts = [f"a text number {n:03} that is longer than one batch" for n in range(100)]
    vectors: list[NDArray[np.float32]] = []
    async with toy.engine(slots=2, batch_size=16, context_length=64) as engine:

        async def embed() -> None:
            vectors.append(await engine.embed(texts))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(embed)
            await gate.reached(1)
            async with engine.generate("hello", max_tokens=1) as generation:
                gate.let(3)  # what runs now, perhaps a part of another text, and the prompt
                assert await generation.collect() == toy_text("hello", 1)
            assert not vectors
            gate.open()
        np.testing.assert_array_equal(vectors[0], [toy_vector(list(text.encode())) for text in texts])
        await until_idle(engine)


async def test_long_embeddings_leave_prompts_in_the_cache(toy: Toy) -> None:
    """All of them together push out one prompt at most."""
    toy.capabilities = {"embeds_last_row": True}
    (prompt,) = prompts(1, 20)
    async with toy.engine(slots=2, batch_size=16, context_length=64) as engine:
        for text in ("hello", prompt):
            await engine.generate(text, max_tokens=10).collect()
        for _ in range(3):
            await engine.embed(["x" * 60])
        retry = engine.generate(prompt, max_tokens=20)
        assert await retry.collect() == toy_text(prompt, 20)
        assert retry.usage is not None
        assert retry.usage.cached_tokens == len(prompt) - 1


async def test_a_long_embedding_can_be_cancelled(toy: Toy) -> None:
    toy.capabilities = {"embeds_last_row": True}
    toy.on_decode = gate = Gate(toy)
    async with toy.engine(slots=1, batch_size=16, context_length=64) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.embed, ["x" * 60])
            gate.let(2)
            await gate.reached(3)
            nursery.cancel_scope.cancel()
        gate.open()
        await until_idle(engine)
        assert len(gate.batches) == 3
        assert await engine.generate("hello", max_tokens=20).collect() == toy_text("hello", 20)
