"""Decoding, and the edits of the KV cache, on every kind of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.llama.running import GREEDY, Running, tokens_of
from tests.tiny_models import CHAIN_TEXT, GENERATIVE
from trio_runner.config import AdapterConfig
from trio_runner.core.batch import Chunk, DecodeOutcome
from trio_runner.core.limits import Limits
from trio_runner.core.memory import Copy, Slide, Trim
from trio_runner.errors import EngineClosed, LoadError, NativeError
from trio_runner.llama import default_threads

Models = Callable[[str], Path]


@pytest.fixture
def llama(models: Models) -> Running:
    return Running(models("llama"))


@pytest.mark.parametrize("prompt", ["hello", "anything at all <|im_end|>\n", " one"])
def test_chain_says_its_text_and_ends(models: Models, prompt: str) -> None:
    running = Running(models("chain"))
    result = running.generate(prompt, 30)
    text = b"".join(sampled.piece for sampled in result).decode()
    assert text == (CHAIN_TEXT.removeprefix(" one") if prompt == " one" else CHAIN_TEXT)
    assert result[-1].is_end
    assert result[-1].piece == b""
    assert [sampled.is_end for sampled in result[:-1]] == [False] * (len(result) - 1)


def test_a_character_may_be_spread_over_tokens(models: Models) -> None:
    pieces = [sampled.piece for sampled in Running(models("chain")).generate("hello", 30)]
    emoji = pieces[-6:-2]
    assert [len(piece) for piece in emoji] == [1, 1, 1, 1]
    assert b"".join(emoji).decode() == "\N{SLIGHTLY SMILING FACE}"


@pytest.mark.parametrize(
    ("name", "can_trim", "can_shift"),
    [
        ("llama", True, True),
        ("spm", True, True),
        ("swa", True, True),
        ("mrope", True, False),
        ("gpt2", True, False),
        ("mamba", False, False),
        ("lfm2", False, False),
    ],
)
def test_limits_tell_what_the_memory_can_do(models: Models, name: str, can_trim: bool, can_shift: bool) -> None:
    running = Running(models(name))
    assert running.limits == Limits(
        n_slots=2,
        n_spare_slots=2,
        n_embed_slots=2,
        n_ctx=96 if name == "gpt2" else 256,  # positions of its table
        max_rows=64,
        can_trim=can_trim,
        can_shift=can_shift,
        embeds_last_row=can_trim,
        n_vector=64,
    )
    assert running.context.length(0) == 0


@pytest.mark.parametrize(
    ("slots", "n_spare", "can_trim"), [(42, 42, True), (64, 0, True), (65, 65, False), (128, 0, False)]
)
def test_windows_leave_fewer_sequences(models: Models, slots: int, n_spare: int, can_trim: bool) -> None:
    limits = Running(models("swa"), slots=slots, context_length=16, batch_size=16).limits
    assert (limits.n_spare_slots, limits.can_trim) == (n_spare, can_trim)


@pytest.mark.parametrize("name", ["bert", "rerank"])
def test_limits_of_an_encoder(models: Models, name: str) -> None:
    limits = Running(models(name)).limits
    assert not limits.has_memory
    assert not limits.can_generate
    assert not limits.embeds_last_row
    assert limits.n_ctx == 64
    assert limits.ranks == (name == "rerank")
    assert limits.n_vector == (1 if name == "rerank" else 64)


@pytest.mark.parametrize("name", GENERATIVE)
def test_text_depends_on_the_prompt_and_on_nothing_else(models: Models, name: str) -> None:
    running = Running(models(name))
    first = tokens_of(running.generate("the model", 16))
    assert tokens_of(running.generate("a story", 16)) != first or name == "chain"
    assert tokens_of(running.generate("the model", 16)) == first
    assert tokens_of(running.generate("the model", 16, slot=1)) == first


@pytest.mark.parametrize("name", GENERATIVE)
def test_prompt_may_come_in_any_portions(models: Models, name: str) -> None:
    running = Running(models(name))
    tokens = running.tokens("the answer and the story of the model and the world " * 2)[:60]
    whole = tokens_of(running.generate(tokens))
    for rows in (1, 7):
        assert running.context.apply(Trim(0, 0))
        position = running.prefill(tokens[:-1], rows=rows)
        assert tokens_of(running.go_on(tokens[-1], position, 12)) == whole


@pytest.mark.parametrize("name", GENERATIVE)
def test_same_text_alone_and_in_company(models: Models, name: str) -> None:
    running = Running(models(name))
    prompts = [running.tokens("the model"), running.tokens("hello and a longer story")]
    alone = [tokens_of(running.generate(prompt)) for prompt in prompts]
    for slot in (0, 1):
        assert running.context.apply(Trim(slot, 0))
    samplers = {uid: running.sampler() for uid in (10, 11)}
    together: dict[int, list[int]] = {10: [], 11: []}
    chunks = [Chunk(10 + slot, slot, 0, tuple(prompt), output=True) for slot, prompt in enumerate(prompts)]
    for _ in range(12):
        result = running.step(*chunks, samplers=samplers)
        assert result.outcome is DecodeOutcome.OK
        for uid, sampled in result.sampled.items():
            together[uid].append(sampled.token)
        chunks = [Chunk(chunk.uid, chunk.slot, chunk.stop, (together[chunk.uid][-1],), output=True) for chunk in chunks]
    assert [together[10], together[11]] == alone


@pytest.mark.parametrize("name", ["llama", "spm", "swa", "mrope"])
def test_fork_goes_on_as_the_original_would(models: Models, name: str) -> None:
    running = Running(models(name))
    prefix, one, other = running.tokens("the story of the world"), running.tokens(" hello"), running.tokens(" answer")
    expected = tokens_of(running.generate(prefix + other))
    first = tokens_of(running.generate(prefix + one))
    assert running.context.apply(Trim(1, 0))
    assert running.context.apply(Copy(0, 1, len(prefix)))
    assert running.context.length(1) == len(prefix)
    position = running.prefill(other[:-1], slot=1, start=len(prefix))
    assert tokens_of(running.go_on(other[-1], position, 12, slot=1)) == expected
    # The original is as it was.
    assert running.context.apply(Trim(0, len(prefix)))
    position = running.prefill(one[:-1], start=len(prefix))
    assert tokens_of(running.go_on(one[-1], position, 12)) == first


@pytest.mark.parametrize("name", ["llama", "spm", "swa", "mrope"])
def test_trim_takes_back_to_an_earlier_position(models: Models, name: str) -> None:
    running = Running(models(name))
    tokens = running.tokens("the story of the world and more than a window of thirty-two tokens in this one prompt")
    first = tokens_of(running.generate(tokens, 20))
    assert running.context.length(0) == len(tokens) + 19
    assert running.context.apply(Trim(0, len(tokens) - 1))
    assert running.context.length(0) == len(tokens) - 1
    assert tokens_of(running.go_on(tokens[-1], len(tokens) - 1, 20)) == first


@pytest.mark.parametrize("name", ["llama", "swa", "mrope"])
def test_what_a_slot_holds_is_given_to_nobody_else(models: Models, name: str) -> None:
    """Not even cells that its window has passed: the slot may be taken back to where they are needed."""
    running = Running(models(name))
    tokens = running.tokens(TEXT)
    other = (running.tokens("hello and the answer of the model and the user and a count") * 4)[:60]
    cuts = (10, 35, 50)
    expected = [tokens_of(running.generate(tokens[: cut + 1], 8)) for cut in cuts]
    for cut, text in zip(cuts, expected, strict=True):
        for slot in (0, 1):
            assert running.context.apply(Trim(slot, 0))
        running.prefill(other[:20], slot=1)
        running.prefill(tokens, rows=7)
        # More than was there before: it goes around what the first one has.
        assert running.context.apply(Trim(1, 0))
        running.prefill(other, slot=1, rows=5)
        assert running.context.apply(Trim(2, 0))
        assert running.context.apply(Copy(0, 2, cut))
        assert running.context.apply(Trim(0, cut))
        for slot in (0, 2):
            assert tokens_of(running.go_on(tokens[cut], cut, 8, slot=slot)) == text


def test_recurrent_memory_can_only_be_forgotten_whole(models: Models) -> None:
    running = Running(models("mamba"))
    tokens = running.tokens("the story of the world")
    first = tokens_of(running.generate(tokens, 4))
    length = running.context.length(0)
    assert not running.context.apply(Trim(0, 3))
    assert running.context.length(0) == length
    assert running.context.apply(Trim(0, 0))
    assert running.context.length(0) == 0
    assert tokens_of(running.generate(tokens, 4)) == first
    with pytest.raises(NativeError):
        running.context.apply(Copy(0, 1, 2))
    assert running.context.apply(Copy(0, 1, running.context.length(0)))
    assert running.context.length(1) == running.context.length(0)


def test_slide_renumbers_what_is_left(models: Models) -> None:
    """With one layer, what a position holds depends on its token alone, so sliding must equal decoding again."""
    running = Running(models("single"))
    tokens = running.tokens("the story of the world and the model")
    keep, discard = 3, 5
    assert running.context.apply(Trim(0, 0))
    running.prefill(tokens[:-1])
    assert running.context.apply(Trim(0, keep, keep + discard))
    assert running.context.apply(Slide(0, keep + discard, len(tokens) - 1, -discard))
    assert running.context.length(0) == len(tokens) - 1 - discard
    slid = tokens_of(running.go_on(tokens[-1], len(tokens) - 1 - discard, 12))
    assert slid == tokens_of(running.generate(tokens[:keep] + tokens[keep + discard :]))


@pytest.mark.parametrize("name", ["llama", "spm", "swa"])
def test_sliding_everything_changes_nothing(models: Models, name: str) -> None:
    """Only how far apart positions are matters; with a sliding window, also to whoever shares the cells."""
    running = Running(models(name))
    tokens = running.tokens(TEXT)[:50]
    expected = tokens_of(running.generate(tokens, 8))
    for slot in (0, 1):
        assert running.context.apply(Trim(slot, 0))
    assert running.prefill(tokens[:-1], start=7) == 56
    assert running.context.apply(Slide(0, 7, 56, -7))
    assert running.context.length(0) == 49
    assert running.context.apply(Copy(0, 1, 49))
    for slot in (0, 1):
        assert tokens_of(running.go_on(tokens[-1], 49, 8, slot=slot)) == expected
        assert running.context.apply(Trim(slot, 40))
        position = running.prefill(tokens[40:-1], slot=slot, start=40)
        assert tokens_of(running.go_on(tokens[-1], position, 8, slot=slot)) == expected


def test_slide_survives_an_abort_of_the_step_that_carries_it_out(models: Models) -> None:
    running = Running(models("single"))
    tokens = running.tokens("the story of the world and the model")
    expected = tokens_of(running.generate(tokens[:3] + tokens[8:]))
    assert running.context.apply(Trim(0, 0))
    running.prefill(tokens[:-1])
    assert running.context.apply(Trim(0, 3, 8))
    assert running.context.apply(Slide(0, 8, len(tokens) - 1, -5))
    running.context.abort(1)
    chunk = Chunk(0, 0, len(tokens) - 6, tuple(tokens[-1:]), output=True)
    assert running.step(chunk, samplers={0: running.sampler()}, number=1).outcome is DecodeOutcome.ABORTED
    assert tokens_of(running.go_on(tokens[-1], len(tokens) - 6, 12)) == expected


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_batch_aborted_before_it_starts_changes_nothing(models: Models, name: str) -> None:
    running = Running(models(name))
    tokens = running.tokens("the story of the world")
    expected = tokens_of(running.generate(tokens))
    assert running.context.apply(Trim(0, 0))
    position = running.prefill(tokens[:-1])
    running.context.abort(7)
    chunk = Chunk(5, 0, position, (tokens[-1],), output=True)
    result = running.step(chunk, samplers={5: running.sampler()}, number=7)
    assert result.outcome is DecodeOutcome.ABORTED
    assert result.kept == {5: position}
    assert result.sampled == {}
    assert tokens_of(running.go_on(tokens[-1], position, 12)) == expected


def test_abort_touches_no_batch_of_another_number(llama: Running) -> None:
    def outcome(number: int) -> DecodeOutcome:
        assert llama.context.apply(Trim(0, 0))
        return llama.step(Chunk(0, 0, 0, (5,), output=False), number=number).outcome

    llama.context.abort(3)
    aborted, ok = DecodeOutcome.ABORTED, DecodeOutcome.OK
    assert [outcome(number) for number in (0, 2, 3, 4, 3)] == [ok, ok, aborted, ok, aborted]
    llama.context.abort(2**64 - 1)  # only the latest call counts
    assert [outcome(number) for number in (3, 2**64 - 1)] == [ok, aborted]
    llama.context.abort(0)
    assert [outcome(number) for number in (0, 2**64 - 1)] == [ok, ok]


@pytest.mark.parametrize("name", ["llama", "swa", "mamba"])
def test_abort_from_another_thread_keeps_what_it_says(models: Models, name: str) -> None:
    running = Running(models(name), slots=1, context_length=2048, batch_size=512)
    tokens = (running.tokens("the story of the world and the answer of the model ") * 60)[:512]
    expected = tokens_of(running.generate(tokens, 3))
    started = threading.Event()

    def abort() -> None:
        started.wait(10)
        running.context.abort(1)

    thread = threading.Thread(target=abort)
    thread.start()
    outcome, kept = DecodeOutcome.OK, 0
    while outcome is DecodeOutcome.OK:  # until what the other thread did is seen, in a step or before one
        assert running.context.apply(Trim(0, 0))
        started.set()
        result = running.step(Chunk(0, 0, 0, tuple(tokens), output=False), number=1)
        outcome, kept = result.outcome, result.kept.get(0, 0)
    thread.join()
    assert outcome is DecodeOutcome.ABORTED
    assert kept == running.context.length(0)
    assert kept in (0, 512)
    position = running.prefill(tokens[kept:-1], start=kept, rows=512)
    assert tokens_of(running.go_on(tokens[-1], position, 3)) == expected


def test_full_cache_changes_nothing(models: Models) -> None:
    running = Running(models("llama"), context_length=128)
    # The cache is one for all slots: 2 of 128 and a batch of 64 for the embeddings, rounded up by llama.cpp.
    assert running.prefill([5] * 512) == 512
    result = running.step(Chunk(1, 1, 0, (5,), output=False))
    assert result.outcome is DecodeOutcome.NO_KV_SPACE
    assert (running.context.length(0), running.context.length(1)) == (512, 0)
    assert running.context.apply(Trim(0, 0))
    assert running.step(Chunk(1, 1, 0, (5,), output=False)).outcome is DecodeOutcome.OK


def test_bad_batches_are_refused(llama: Running) -> None:
    expected = tokens_of(llama.generate("the model"))
    for chunk in (
        Chunk(0, 0, 0, tuple([5] * 65), output=False),
        Chunk(0, 0, -1, (5,), output=False),
        Chunk(0, 0, 768, (5,), output=False),
        Chunk(0, 6, 0, (5,), output=False),
        Chunk(0, -1, 0, (5,), output=False),
        Chunk(0, 0, 0, (llama.model.info.n_vocab,), output=False),
        Chunk(0, 0, 0, (-1,), output=False),
    ):
        result = llama.step(chunk)
        assert result.outcome is DecodeOutcome.INVALID, chunk
        assert result.message
    assert llama.step().outcome is DecodeOutcome.INVALID
    assert tokens_of(llama.generate("the model")) == expected


def embed(running: Running, *texts: str) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    for slot in range(len(texts)):
        assert running.context.apply(Trim(slot, 0))
    chunks = [Chunk(uid, uid, 0, tuple(running.tokens(text)), output=True) for uid, text in enumerate(texts)]
    result = running.step(*chunks, embeddings=True)
    assert result.outcome is DecodeOutcome.OK
    assert result.sampled == {}
    vectors = [result.vectors[uid] for uid in range(len(texts))]
    for vector in vectors:
        assert isinstance(vector, np.ndarray)
        assert vector.dtype == np.float32
        assert np.isfinite(vector).all()
    return vectors  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "n_floats"), [("bert", 64), ("llama", 64), ("mamba", 64), ("rerank", 1)])
def test_vector_is_the_same_alone_and_in_company(models: Models, name: str, n_floats: int) -> None:
    running = Running(models(name))
    (alone,) = embed(running, "the model")
    (other,) = embed(running, "hello world and the story")
    together = embed(running, "the model", "hello world and the story")
    assert alone.shape == (n_floats,)
    np.testing.assert_allclose(together[0], alone, atol=1e-5)
    np.testing.assert_allclose(together[1], other, atol=1e-5)
    assert not np.allclose(alone, other, atol=1e-3)


@pytest.mark.parametrize("pooling", ["none", "mean", "cls", "last"])
def test_every_pooling_gives_a_vector(models: Models, pooling: str) -> None:
    (vector,) = embed(Running(models("llama"), pooling=pooling), "the model")
    assert vector.shape == (64,)


def test_vectors_and_text_may_alternate(llama: Running) -> None:
    expected = tokens_of(llama.generate("the model"))
    (vector,) = embed(llama, "the model")
    assert tokens_of(llama.generate("the model")) == expected
    np.testing.assert_allclose(embed(llama, "the model")[0], vector, atol=1e-5)


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


LAST_ROW = ("llama", "single", "spm", "swa", "mrope")
TEXT = "the story of the world and more than a window of thirty-two tokens in this one text"


@pytest.mark.parametrize("pooling", ["last", "none"])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("name", LAST_ROW)
def test_vector_of_the_last_row_alone_is_that_of_the_text(models: Models, name: str, rows: int, pooling: str) -> None:
    running = Running(models(name), pooling=pooling)
    assert running.limits.embeds_last_row
    tokens = running.tokens(TEXT)[:60]
    lane = running.limits.first_embed_slot
    whole = running.step(Chunk(0, lane, 0, tuple(tokens), output=True), embeddings=True).vectors[0]
    assert running.context.apply(Trim(lane, 0))
    position = running.prefill(tokens[:-1], slot=lane, rows=rows)
    last = running.step(Chunk(0, lane, position, (tokens[-1],), output=True), embeddings=True).vectors[0]
    assert isinstance(whole, np.ndarray)
    assert isinstance(last, np.ndarray)
    assert cosine(whole, last) >= 0.9999
    np.testing.assert_allclose(last, whole, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vector_of_every_row_needs_the_whole_text(models: Models, pooling: str) -> None:
    assert not Running(models("llama"), pooling=pooling).limits.embeds_last_row


@pytest.mark.parametrize("name", LAST_ROW)
def test_embedding_beside_a_generation_changes_neither(models: Models, name: str) -> None:
    running = Running(models(name))
    prompt, text = running.tokens("hello and a story"), running.tokens(TEXT)[:60]
    lane = running.limits.first_embed_slot + 1
    expected = tokens_of(running.generate(prompt, 16))
    whole = running.step(Chunk(9, lane, 0, tuple(text), output=True), embeddings=True).vectors[9]
    assert isinstance(whole, np.ndarray)
    assert running.context.apply(Trim(lane, 0))
    assert running.context.apply(Trim(0, 0))

    sampler, pending, position, start = running.sampler(), tuple(prompt), 0, 0
    generated: list[int] = []
    vector: object = None
    while len(generated) < 16:
        chunks = [Chunk(1, 0, position, pending, output=True)]
        rows = tuple(text[start : min(start + 13, len(text) - 1)])
        if rows:
            chunks.append(Chunk(9, lane, start, rows, output=False))
            start += len(rows)
        elif vector is None:
            step = running.step(Chunk(9, lane, start, (text[-1],), output=True), embeddings=True)
            vector = step.vectors[9]
        result = running.step(*chunks, samplers={1: sampler})
        assert result.outcome is DecodeOutcome.OK
        position += len(pending)
        generated.append(result.sampled[1].token)
        pending = (generated[-1],)
    assert generated == expected
    assert isinstance(vector, np.ndarray)
    assert cosine(whole, vector) >= 0.9999


def test_full_slots_leave_room_for_embeddings(models: Models) -> None:
    running = Running(models("llama"))
    for slot in range(running.limits.n_slots):
        running.prefill([5] * running.limits.n_ctx, slot=slot)
    lane = running.limits.first_embed_slot
    chunk = Chunk(0, lane, 0, (5,) * running.limits.max_rows, output=True)
    assert running.step(chunk, embeddings=True).outcome is DecodeOutcome.OK


def test_encoder_refuses_to_generate(models: Models) -> None:
    running = Running(models("bert"))
    result = running.step(Chunk(0, 0, 0, (5, 6), output=False))
    assert result.outcome is DecodeOutcome.INVALID
    assert "embeddings only" in result.message


def test_adapter_changes_the_text_by_its_scale(models: Models) -> None:
    def text(*adapters: AdapterConfig) -> str:
        return Running(models("llama"), adapters=adapters).text(n_tokens=12)

    plain = text()
    assert text(AdapterConfig(str(models("lora")), 0.0)) == plain
    assert text(AdapterConfig(str(models("lora")), 1.0)) != plain
    with pytest.raises(LoadError, match="not an adapter"):
        text(AdapterConfig(str(models("llama"))))


def test_settings_that_the_model_does_not_allow_are_load_errors(models: Models) -> None:
    with pytest.raises(LoadError, match="no context"):
        Running(models("llama"), kv_type="q8_0", flash_attention="off")


@pytest.mark.parametrize(
    "settings",
    [{"kv_type": "q8_0"}, {"flash_attention": "on"}, {"flash_attention": "off"}, {"threads": 2}, {"batch_size": 1}],
)
def test_other_settings_run_too(models: Models, settings: dict[str, Any]) -> None:
    running = Running(models("chain"), **settings)
    tokens = running.tokens("hello")
    assert running.context.apply(Trim(0, 0))
    position = running.prefill(tokens[:-1], rows=1)
    pieces = [sampled.piece for sampled in running.go_on(tokens[-1], position, 3)]
    assert pieces == [b" one", b" two", b" three"]


def test_closing_is_idempotent_and_final(models: Models) -> None:
    running = Running(models("llama"))
    running.model.close()
    assert running.step(Chunk(0, 0, 0, (5,), output=False)).outcome is DecodeOutcome.OK  # the context keeps the model
    running.context.close()
    running.context.close()
    running.model.close()
    running.context.abort(1)
    with pytest.raises(EngineClosed):
        running.step(Chunk(0, 0, 0, (5,), output=False))
    with pytest.raises(EngineClosed):
        running.model.sampler(GREEDY, ())


def test_default_threads_leave_something() -> None:
    decoding, prefill = default_threads()
    assert 1 <= decoding <= prefill <= 512
    assert prefill == 1 or decoding < prefill
