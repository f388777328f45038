"""What a generation says while it runs: values that cross from the decode thread to the reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "deadline", "error"]


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token and the natural logarithm of its probability before any sampler touched it."""

    token: int
    piece: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class SampledToken(TokenInfo):
    """A token that was chosen, with the most probable alternatives at that place, most probable first."""

    top: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a generation cost. Seconds count only the steps that carried rows of this sequence, not the waiting."""

    prompt_tokens: int = 0
    """Tokens of the prompt after truncation, those found in the prompt cache included."""
    cached_tokens: int = 0
    """Of those, tokens that were not decoded again."""
    completion_tokens: int = 0
    """Sampled tokens, the one that ended the generation included."""
    prompt_seconds: float = 0.0
    completion_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """`n_decoded` of the prompt's `n_prompt` tokens are in the KV cache, the `n_cached` found there included."""

    n_decoded: int
    n_prompt: int
    n_cached: int
    text: Literal[""] = ""


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More text; never empty, never half a character. `tokens` only when log-probabilities were asked for."""

    text: str
    tokens: tuple[SampledToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every generation that was not closed by its reader.

    `reason` is "stop" (end token or stop string), "length" (max_tokens, or a full context that may not shift),
    "deadline" (the request's own has passed), or "error", in which case `error` says why and iteration raises it.
    `stop` is the stop string that matched.
    """

    reason: FinishReason
    usage: Usage
    stop: str | None = None
    error: Exception | None = None
    tokens: tuple[SampledToken, ...] = ()
    """Chosen tokens that no TextPiece reported, such as the end token; only when log-probabilities were asked for."""
    text: Literal[""] = ""


Event: TypeAlias = PromptProgress | TextPiece | Finished


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vector of one embedding request; `vector` is whatever the context returned, copied."""

    vector: object
    usage: Usage
