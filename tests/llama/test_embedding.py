"""Embeddings: alone, beside others, and beside generations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.llama.running import LONG_TEXT, Running, tokens_of
from trio_runner.core.batch import Chunk, DecodeOutcome
from trio_runner.core.memory import Trim

Models = Callable[[str], Path]


@pytest.fixture
def llama(models: Models) -> Running:
    return Running(models("llama"))


def embed(running: Running, *texts: str) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    for slot in range(len(texts)):
        assert running.context.apply(Trim(slot, 0))
    chunks = [Chunk(uid, uid, 0, tuple(running.tokens(text)), output=True) for uid, text in enumerate(texts)]
    result = running.step(*chunks, embeddings=True)
    assert result.outcome is DecodeOutcome.OK
    assert result.sampled == {}
    vectors = [result.embeddings[uid] for uid in range(len(texts))]
    for vector in vectors:
        assert isinstance(vector, np.ndarray)
        assert vector.dtype == np.float32
        assert np.isfinite(vector).all()
    return vectors  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "n_floats"), [("bert", 64), ("llama", 64), ("mamba", 64), ("rerank", 1)])
def test_an_embedding_is_the_same_alone_and_beside_others(models: Models, name: str, n_floats: int) -> None:
    running = Running(models(name))
    (alone,) = embed(running, "the model")
    (other,) = embed(running, "hello world and the story")
    together = embed(running, "the model", "hello world and the story")
    assert alone.shape == (n_floats,)
    np.testing.assert_array_equal(together[0], alone)
    np.testing.assert_array_equal(together[1], other)
    assert not np.allclose(alone, other, atol=1e-3)


@pytest.mark.parametrize("pooling", ["none", "mean", "cls", "last"])
def test_every_pooling_gives_an_embedding(models: Models, pooling: str) -> None:
    (vector,) = embed(Running(models("llama"), pooling=pooling), "the model")
    assert vector.shape == (64,)


def test_embeddings_and_text_may_alternate(llama: Running) -> None:
    expected = tokens_of(llama.generate("the model"))
    (vector,) = embed(llama, "the model")
    assert tokens_of(llama.generate("the model")) == expected
    np.testing.assert_array_equal(embed(llama, "the model")[0], vector)


@pytest.mark.parametrize("name", ["llama", "single", "swa", "mrope", "mamba", "lfm2", "gpt2"])
def test_rows_without_output_may_follow_an_embedding(models: Models, name: str) -> None:
    """Upstream's allocator confused the two graphs of LFM2, and the process ended."""
    running = Running(models(name))
    tokens = running.tokens(LONG_TEXT)[:40]
    expected = tokens_of(running.generate(tokens, 4))
    for n_rows in (1, 7, 40):
        lane = running.capabilities.first_embed_slot
        assert running.context.apply(Trim(lane, 0))
        running.step(Chunk(0, lane, 0, tuple(tokens[:n_rows]), output=True), embeddings=True)
        assert running.context.apply(Trim(0, 0))
        running.prefill(tokens[:n_rows])
        assert tokens_of(running.generate(tokens, 4)) == expected


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


LAST_ROW = ("llama", "single", "spm", "swa", "mrope")


@pytest.mark.parametrize("pooling", ["last", "none"])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("name", LAST_ROW)
def test_the_last_row_alone_gives_the_embedding_of_the_text(models: Models, name: str, rows: int, pooling: str) -> None:
    running = Running(models(name), pooling=pooling)
    assert running.capabilities.embeds_last_row
    tokens = running.tokens(LONG_TEXT)[:60]
    lane = running.capabilities.first_embed_slot
    whole = running.step(Chunk(0, lane, 0, tuple(tokens), output=True), embeddings=True).embeddings[0]
    assert running.context.apply(Trim(lane, 0))
    position = running.prefill(tokens[:-1], slot=lane, rows=rows)
    last = running.step(Chunk(0, lane, position, (tokens[-1],), output=True), embeddings=True).embeddings[0]
    assert isinstance(whole, np.ndarray)
    assert isinstance(last, np.ndarray)
    assert cosine(whole, last) >= 0.9999
    np.testing.assert_allclose(last, whole, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_poolings_of_all_rows_need_the_whole_text(models: Models, pooling: str) -> None:
    assert not Running(models("llama"), pooling=pooling).capabilities.embeds_last_row


@pytest.mark.parametrize("name", LAST_ROW)
def test_an_embedding_beside_a_generation_changes_neither(models: Models, name: str) -> None:
    running = Running(models(name))
    prompt, text = running.tokens("hello and a story"), running.tokens(LONG_TEXT)[:60]
    lane = running.capabilities.first_embed_slot + 1
    expected = tokens_of(running.generate(prompt, 16))
    whole = running.step(Chunk(9, lane, 0, tuple(text), output=True), embeddings=True).embeddings[9]
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
            vector = step.embeddings[9]
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
    for slot in range(running.capabilities.n_slots):
        running.prefill([5] * running.capabilities.n_ctx, slot=slot)
    lane = running.capabilities.first_embed_slot
    chunk = Chunk(0, lane, 0, (5,) * running.capabilities.max_rows, output=True)
    assert running.step(chunk, embeddings=True).outcome is DecodeOutcome.OK
