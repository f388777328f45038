"""What a reader is told while a generation runs: values that cross from the decode thread to the reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "deadline", "error"]


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token, and the natural logarithm of its probability before any sampler changed it, or after all of them with
    `SamplingParams.post_sampling_probs`."""

    token: int
    piece: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class SampledToken(TokenInfo):
    """A token that was sampled. `top` has the most probable tokens at that place, most probable first."""

    top: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost. Seconds of the prompt and of the completion count only steps with rows of this request."""

    prompt_tokens: int = 0
    """Tokens of the prompt after truncation, those found in the prompt cache included."""
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the prompt cache, and not decoded again."""
    completion_tokens: int = 0
    """Tokens that were sampled, the one that ended the generation included."""
    prompt_seconds: float = 0.0
    completion_seconds: float = 0.0
    queue_seconds: float = 0.0
    """Seconds from when the request was prepared until its first rows began to be decoded, or until it ended."""


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """`n_decoded` of the prompt's `n_prompt` tokens are in the KV cache. `n_cached` of them were found there."""

    n_decoded: int
    n_prompt: int
    n_cached: int
    text: Literal[""] = ""


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More text: never empty, and never half a character."""

    text: str
    tokens: tuple[SampledToken, ...] = ()
    """The tokens that made it; empty unless the request asks for log-probabilities."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every generation that its reader did not close."""

    reason: FinishReason
    """"stop": an end token or a stop string. "length": `max_tokens` is reached, or the context is full and may not
    shift. "deadline": the deadline of the request has passed. "error": see `error`, which iteration raises."""
    usage: Usage
    stop: str | None = None
    """The stop string that was found."""
    error: Exception | None = None
    tokens: tuple[SampledToken, ...] = ()
    """Sampled tokens that no TextPiece reported, such as the end token; empty unless the request asks for
    log-probabilities."""
    text: Literal[""] = ""
    prompt_logprobs: tuple[SampledToken, ...] = ()
    """The tokens of the prompt but the first, in order, each with the probability that the model gave it. Only if the
    request asks for them with `prompt_logprobs`. If the request ended early, those that are known."""


Event: TypeAlias = PromptProgress | TextPiece | Finished


@dataclass(frozen=True, slots=True)
class Embedded:
    """The result of an embedding request."""

    vector: object
    """A NumPy array of float32, shape (`Capabilities.embedding_size`,), or shorter if the request asks for that."""
    usage: Usage
