"""Answers in llama-server's dialect that are no completions: results -> bytes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from trio_runner.errors import RunnerError
from trio_runner.events import Embedded
from trio_runner.info import AdapterInfo, Capabilities, EngineStatistics, ModelInfo
from trio_runner.server.dialects.json_out import float32, float32_list, long_list, whole_characters
from trio_runner.server.dialects.llama_server.prompts import MARKER
from trio_runner.server.dialects.llama_server.requests import default_settings
from trio_runner.server.dialects.llama_server.text_requests import Ranking
from trio_runner.version import __version__

_LARGEST: Final = 32760.0
"""The largest element of an embedding that is scaled by its largest element."""


# --- Types -----------------------------------------------------------------------------------------------------------


class EmbeddingEntry(msgspec.Struct):
    """The embedding of one text: a list with one list of numbers."""

    index: int
    embedding: list[list[float]]


class Ranked(msgspec.Struct):
    """The score of one document."""

    index: int
    relevance_score: float | UnsetType = UNSET
    score: float | UnsetType = UNSET
    text: str | UnsetType = UNSET


class RankedDocuments(msgspec.Struct):
    """The best documents, best first."""

    model: str
    object: str
    results: list[Ranked]


class Tokens(msgspec.Struct):
    """Tokens; with pieces, each with its text, or with its bytes if they are no text."""

    tokens: list[int | dict[str, Any]]


class Content(msgspec.Struct):
    """A text."""

    content: str


class Prompt(msgspec.Struct):
    """A conversation as text."""

    prompt: str


class Adapter(msgspec.Struct):
    """A LoRA adapter. Requests choose it by its id."""

    id: int
    path: str
    """The file's name, without its directory."""
    scale: float


class SlotState(msgspec.Struct):
    """One slot. Which request is in which is not told, only how many are busy."""

    id: int
    n_ctx: int
    speculative: bool
    is_processing: bool


class Modalities(msgspec.Struct):
    """What a prompt may have besides text."""

    vision: bool
    audio: bool = False
    video: bool = False


class Props(msgspec.Struct):
    """What the server is."""

    default_generation_settings: Mapping[str, Any]
    total_slots: int
    model_alias: str
    model_path: str
    """The name of the model: where its file is, is not told."""
    modalities: Modalities
    chat_template: str
    bos_token: str
    eos_token: str
    media_marker: str = MARKER
    endpoint_slots: bool = True
    endpoint_props: bool = False
    endpoint_metrics: bool = True
    build_info: str = f"trio-runner-{__version__}"
    is_sleeping: bool = False


class Health(msgspec.Struct):
    """The server is ready."""

    status: str = "ok"


# --- Answers ---------------------------------------------------------------------------------------------------------


def embeddings(embedded: Sequence[Embedded], norm: int) -> bytes:
    """The answer of /embedding. Raises `RunnerError` if a value is not finite."""
    vectors = [scaled(np.asarray(one.vector, np.float32), norm) for one in embedded]
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise RunnerError("the embedding contains a value that is not finite")
    return msgspec.json.encode(
        [{"index": index, "embedding": [float32_list(vector)]} for index, vector in enumerate(vectors)]
    )


def scaled(vector: NDArray[np.float32], norm: int) -> NDArray[np.float32]:
    """`vector` with a norm of 1; see `embd_normalize`. One of zeros stays as it is."""
    values = np.abs(vector.astype(np.float64))
    largest = values.max(initial=0.0)
    if norm < 0 or largest == 0:
        return vector
    if norm == 0:
        length = float(largest / _LARGEST)
    else:  # the values are scaled before and after the power, so that nothing overflows
        length = float(largest * np.sum((values / largest) ** norm) ** (1 / norm))
    return np.asarray(vector / length, np.float32)


def ranking(scores: Sequence[float], asked: Ranking, model: str) -> bytes:
    """The answer of /rerank: the best documents, the best first. Raises `RunnerError` if a score is not finite."""
    if not np.isfinite(scores).all():
        raise RunnerError("a score is not finite")
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: asked.top_n]
    name = "score" if asked.is_plain else "relevance_score"
    results: list[dict[str, Any]] = [{"index": index, name: float32(scores[index])} for index in best]
    if asked.returns_texts:
        for result in results:
            result["text"] = asked.request.documents[result["index"]]
    if asked.is_plain:
        return msgspec.json.encode(results)
    return msgspec.json.encode({"model": asked.model or whole_characters(model), "object": "list", "results": results})


def tokens(numbers: Sequence[int]) -> bytes:
    """The answer of /tokenize."""
    return msgspec.json.encode({"tokens": long_list(numbers)})


def tokens_with_pieces(numbers: Sequence[int], pieces: Sequence[bytes]) -> bytes:
    """The same with the text of each token, or with its bytes if they are no text."""
    entries = [{"id": number, "piece": _piece(piece)} for number, piece in zip(numbers, pieces, strict=True)]
    return msgspec.json.encode({"tokens": entries})


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def prompt(text: str) -> bytes:
    """The answer of /apply-template."""
    return msgspec.json.encode(Prompt(whole_characters(text)))


def content(text: str) -> bytes:
    """The answer of /detokenize."""
    return msgspec.json.encode(Content(whole_characters(text)))


def adapters(loaded: Sequence[AdapterInfo]) -> bytes:
    """The answer of GET /lora-adapters."""
    return msgspec.json.encode(
        [
            Adapter(index, whole_characters(info.path.replace("\\", "/").rpartition("/")[2]), info.scale)
            for index, info in enumerate(loaded)
        ]
    )


def slots(statistics: EngineStatistics, capabilities: Capabilities) -> bytes:
    """The answer of GET /slots."""
    n_busy = statistics.busy
    return msgspec.json.encode(
        [SlotState(number, capabilities.n_ctx, False, number < n_busy) for number in range(capabilities.n_slots)]
    )


def props(info: ModelInfo, capabilities: Capabilities, name: str, *, sees: bool) -> bytes:
    """The answer of GET /props, for a model called `name`. With `sees`, prompts may have images."""
    return msgspec.json.encode(
        Props(
            default_generation_settings={"params": default_settings(), "n_ctx": capabilities.n_ctx},
            total_slots=capabilities.n_slots,
            model_alias=whole_characters(name),
            model_path=whole_characters(name),
            modalities=Modalities(vision=sees),
            chat_template=whole_characters(info.chat_template or ""),
            bos_token=whole_characters(info.bos_text),
            eos_token=whole_characters(info.eos_text),
        )
    )


def health() -> bytes:
    """The answer of GET /health once the model is loaded."""
    return msgspec.json.encode(Health())
