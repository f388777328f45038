"""The answers of the runner's dialect as types, for /openapi.json. `responses.py` writes them. Pure.

The lines of a stream are put together by hand, and numbers are written as float32. So nothing is encoded from these
types; requests that are drawn from the document show in the tests that the answers fit them.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType


class Timings(msgspec.Struct):
    """What took how long. In all lines but the last one, everything is 0."""

    predicted_n: int
    """Tokens that were sampled, the end token included."""
    predicted_ms: int
    prompt_n: int
    """Tokens of the prompt, those found in the cache included."""
    prompt_ms: int
    cache_n: int | UnsetType = UNSET
    """Tokens of the prompt that were found in the cache."""


class Alternative(msgspec.Struct):
    """A token and the natural logarithm of its probability, before any sampler changed it."""

    id: int
    token: str
    bytes: list[int]
    logprob: float


class Probability(Alternative):
    """A token that was sampled, and the most probable tokens at its place."""

    top_logprobs: list[Alternative]


class CompletionLine(msgspec.Struct):
    """One line of a stream. The last one has `stop`."""

    content: str
    stop: bool
    timings: Timings
    stopped_limit: bool | UnsetType = UNSET
    stopped_deadline: bool | UnsetType = UNSET
    completion_probabilities: list[Probability] | UnsetType = UNSET
    error: str | UnsetType = UNSET
    """Why the generation failed; only in the last line."""


class Embedding(msgspec.Struct):
    """The answer for one text."""

    embedding: list[float]


class Embeddings(msgspec.Struct):
    """The answer for a list of texts."""

    embeddings: list[list[float]]


class Score(msgspec.Struct):
    """A document and how well it answers the query."""

    index: int
    relevance_score: float


class Ranking(msgspec.Struct):
    """The best documents, the best one first."""

    results: list[Score]


class Tokens(msgspec.Struct):
    """The tokens of a text."""

    tokens: list[int]


class Content(msgspec.Struct):
    """The text of tokens."""

    content: str


class Adapter(msgspec.Struct):
    """A LoRA adapter that requests can choose."""

    name: str
    file: str
    scale: float


class Adapters(msgspec.Struct):
    """All of them."""

    adapters: list[Adapter]


class Health(msgspec.Struct):
    """What the engine is doing."""

    status: str
    """`loading model`, `ok` or `server error`."""
    progress: float
    """How much of the model is loaded, from 0 to 1."""
    error: str | UnsetType = UNSET


class Model(msgspec.Struct):
    """Facts about the model."""

    name: str
    architecture: str
    description: str
    parameters: int
    bytes: int


class Properties(msgspec.Struct):
    """What does not change while the engine lives."""

    model: Model
    slots: int
    context_length: int
    placement: dict[str, Any] | UnsetType = UNSET
    """Which devices hold what."""


class Statistics(msgspec.Struct):
    """How full the engine is, and counters that only rise while it lives."""

    status: str
    slots: int
    running: int
    waiting: int
    paused: int
    preempted: int
    cached_tokens: int
    generations: int
    batches: int
    aborted: int
    prompt_rows: int
    sampled: int
    images_encoded: int
    images_found: int
    image_bytes: int
