"""An embedding model gives the same vectors as its reference implementation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from tests.real.conftest import Service, serving
from tests.real.minilm import fetch_minilm
from tests.real.minilm_reference import SENTENCES, reference

ALIKE: Final = 0.9999
"""Least cosine with the reference. With weights of 16 bits, 0.999998 was measured."""


@pytest.fixture(scope="module")
def minilm() -> Path:
    return fetch_minilm()


@pytest.fixture
async def service(minilm: Path) -> AsyncIterator[Service]:
    async with serving(minilm, batch_size=512) as service:
        yield service


async def test_embeddings_one_by_one(service: Service) -> None:
    for sentence, expected in zip(SENTENCES, reference(), strict=True):
        [vector] = await service.engine.embed([sentence], normalize=True)
        assert vector @ expected >= ALIKE, sentence


async def test_embeddings_all_at_once(service: Service) -> None:
    vectors = await service.engine.embed(SENTENCES, normalize=True)
    cosines = (vectors * reference()).sum(axis=1)
    assert cosines.min() >= ALIKE, SENTENCES[cosines.argmin()]


async def test_embeddings_over_http(service: Service) -> None:
    for sentence, expected in zip(SENTENCES, reference(), strict=True):
        [answer] = await service.lines("/embedding", content=sentence)
        vector = np.array(answer["embedding"], np.float32)
        assert vector @ expected / np.linalg.norm(vector) >= ALIKE, sentence


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("cat", "kitten", "stock market"),
        ("How do I reset my password?", "I forgot my login and need a new one.", "How do I bake sourdough bread?"),
        ("The bank raised its interest rates.", "Borrowing money costs more now.", "We sat on the bank of the river."),
        ("It is raining heavily.", "There is a downpour outside.", "The sun is shining."),
    ],
)
async def test_texts_of_similar_meaning_are_nearer(service: Service, text: str, near: str, far: str) -> None:
    of_text, of_near, of_far = await service.engine.embed([text, near, far], normalize=True)
    assert of_text @ of_near > of_text @ of_far + 0.1
