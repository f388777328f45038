"""Completions in llama-server's dialect: events -> bytes. Pure.

A whole answer is one object. A stream is server-sent events, one for each piece of text and a last one with what the
whole cost; no `[DONE]` follows. The fields are those of llama-server (tools/server/server-task.cpp of llama.cpp), in
its order. Those that this server does not know are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import msgspec
from msgspec import UNSET, UnsetType

from trio_runner.events import Event, Finished, PromptProgress, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.server.dialects.json_out import unbroken, whole_characters
from trio_runner.server.dialects.llama_server.problem_words import Refusal, error_fields
from trio_runner.server.dialects.llama_server.requests import Report
from trio_runner.server.dialects.sampled_tokens import LOWEST, finite_logprob
from trio_runner.server.problems import problem

COMMENT: Final = b":\n\n"
"""What a stream sends to say that it is still there."""
PROBABILITY_BYTES: Final = 64
"""Bytes of one token with its probability, about."""
_NO_SLOT: Final = -1
"""Stands for the number of the slot, which is not told."""


# --- Types -----------------------------------------------------------------------------------------------------------


class Timings(msgspec.Struct):
    """What took how long: milliseconds, and tokens per second."""

    cache_n: int
    """Tokens of the prompt that were found in the cache."""
    prompt_n: int
    """Tokens of the prompt that were decoded."""
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class Progress(msgspec.Struct):
    """How much of the prompt is decoded."""

    total: int
    cache: int
    processed: int
    """Tokens that are in the cache now, `cache` of them from before."""
    time_ms: int
    """Milliseconds since the request was taken, waiting included."""


class Probability(msgspec.Struct, kw_only=True):
    """A token and its probability: `logprob` before the samplers, or `prob` after them."""

    id: int
    token: str
    bytes: tuple[int, ...]
    logprob: float | UnsetType = UNSET
    prob: float | UnsetType = UNSET


class TokenProbability(Probability, kw_only=True):
    """A sampled token, and the most probable tokens at its place."""

    top_logprobs: list[Probability] | UnsetType = UNSET
    top_probs: list[Probability] | UnsetType = UNSET


class CompletionPart(msgspec.Struct, kw_only=True):
    """A part of a stream."""

    index: int
    content: str
    tokens: list[int] | UnsetType = UNSET
    stop: bool = False
    id_slot: int = _NO_SLOT
    tokens_predicted: int | UnsetType = UNSET
    tokens_evaluated: int | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
    prompt_progress: Progress | UnsetType = UNSET
    completion_probabilities: list[TokenProbability] | UnsetType = UNSET


class CompletionResult(msgspec.Struct, kw_only=True):
    """A whole answer, or the last part of a stream. With `response_fields` it has only these."""

    index: int | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tokens: list[int] | UnsetType = UNSET
    id_slot: int | UnsetType = UNSET
    stop: bool | UnsetType = UNSET
    model: str | UnsetType = UNSET
    tokens_predicted: int | UnsetType = UNSET
    tokens_evaluated: int | UnsetType = UNSET
    generation_settings: Mapping[str, Any] | UnsetType = UNSET
    prompt: str | UnsetType = UNSET
    has_new_line: bool | UnsetType = UNSET
    truncated: bool | UnsetType = UNSET
    stop_type: str | UnsetType = UNSET
    stopping_word: str | UnsetType = UNSET
    tokens_cached: int | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
    completion_probabilities: list[TokenProbability] | UnsetType = UNSET


# --- Parts of both ---------------------------------------------------------------------------------------------------


def timings(usage: Usage) -> Timings:
    """The timings of what `usage` says. The first token belongs to the prompt, as in llama-server."""
    n_prompt, n_steps = usage.prompt_tokens - usage.cached_tokens, max(usage.completion_tokens - 1, 0)
    prompt_ms, predicted_ms = usage.prompt_seconds * 1000, usage.completion_seconds * 1000
    return Timings(
        cache_n=usage.cached_tokens,
        prompt_n=n_prompt,
        prompt_ms=prompt_ms,
        prompt_per_token_ms=_ratio(prompt_ms, n_prompt),
        prompt_per_second=_ratio(n_prompt * 1000, prompt_ms),
        predicted_n=usage.completion_tokens,
        predicted_ms=predicted_ms,
        predicted_per_token_ms=_ratio(predicted_ms, n_steps),
        predicted_per_second=_ratio(n_steps * 1000, predicted_ms),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def probabilities(tokens: Sequence[SampledToken], report: Report) -> list[TokenProbability]:
    """Each token with the best at its place."""
    if report.post_sampling_probs:
        return [
            TokenProbability(**_named(token), prob=_probability(token), top_probs=_best_probs(token.top))
            for token in tokens
        ]
    return [
        TokenProbability(
            **_named(token),
            logprob=_logprob(token),
            top_logprobs=[Probability(**_named(other), logprob=_logprob(other)) for other in token.top],
        )
        for token in tokens
    ]


def _best_probs(tokens: Sequence[TokenInfo]) -> list[Probability]:
    """Those that may be drawn at all: the samplers leave the others a probability of 0."""
    possible = (token for token in tokens if _probability(token) > 0)
    return [Probability(**_named(token), prob=_probability(token)) for token in possible]


def _named(token: TokenInfo) -> dict[str, Any]:
    text = token.piece.decode("utf-8", errors="ignore")
    return {"id": token.token, "token": text, "bytes": tuple(token.piece)}


def _logprob(token: TokenInfo) -> float:
    return finite_logprob(token.logprob)


def _probability(token: TokenInfo) -> float:
    return math.exp(token.logprob) if token.logprob > LOWEST else 0.0


def chosen(report: Report, result: CompletionResult) -> Any:
    """The fields of `result` that the request wants, by their paths; those that it does not have are left out."""
    if not report.response_fields:
        return result
    found: dict[str, Any] = {}
    for path in report.response_fields:
        value: Any = result
        for name in path.split("/"):
            value = _inside(value, name)
        if value is not UNSET:
            found[path] = value
    return found


def _inside(value: Any, name: str) -> Any:
    """The field `name` of an object; UNSET if it has none."""
    if isinstance(value, msgspec.Struct):
        return getattr(value, name) if name in value.__struct_fields__ else UNSET
    return value.get(name, UNSET) if isinstance(value, Mapping) else UNSET


# --- One completion --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class CompletionState:
    """What has been told of one completion so far."""

    index: int
    report: Report
    model: str
    prompt: str | None
    """The text of the prompt; None if it is not known."""
    max_tokens: int | None
    started: float
    n_prompt: int | None = None
    n_cached: int = 0
    n_tokens: int = 0
    first: float | None = None
    """When the first text came."""
    has_new_line: bool = False
    texts: list[str] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """About how many bytes the answer will have."""
        n_probabilities = len(self.tokens) * (1 + self.report.n_probs)
        return sum(map(len, self.texts)) + len(self.prompt or "") + PROBABILITY_BYTES * n_probabilities

    def take(self, event: Event, now: float) -> None:
        """Note an event that came at `now`, in seconds."""
        match event:
            case PromptProgress():
                self.n_prompt, self.n_cached = event.n_prompt, event.n_cached
            case TextPiece():
                self.first = now if self.first is None else self.first
                self.has_new_line = self.has_new_line or "\n" in event.text
                self.n_tokens += len(event.tokens)
                if not self.report.stream:
                    self.texts.append(event.text)
                    self.tokens += event.tokens
            case Finished():
                self.n_tokens += len(event.tokens)

    def part(self, content: str, tokens: Sequence[SampledToken], now: float) -> CompletionPart:
        """The part of a stream that has `content`."""
        part = CompletionPart(index=self.index, content=content)
        if self.n_prompt is not None:
            part.tokens_evaluated = self.n_prompt
        if self.report.needs_tokens:
            part.tokens = [token.token for token in tokens]
            part.tokens_predicted = self.n_tokens
        if self.report.n_probs > 0 and tokens:
            part.completion_probabilities = probabilities(tokens, self.report)
        if self.report.timings_per_token:
            part.timings = timings(self._usage(now))
        return part

    def progress(self, event: PromptProgress, now: float) -> CompletionPart:
        """The part of a stream that tells of the prompt."""
        part = self.part("", (), now)
        elapsed = round((now - self.started) * 1000)
        part.prompt_progress = Progress(event.n_prompt, event.n_cached, event.n_decoded, elapsed)
        return part

    def result(self, event: Finished) -> CompletionResult:
        """The whole answer, or the last part of a stream, which has no text."""
        usage, report = event.usage, self.report
        tokens = self.tokens if event.stop is not None else [*self.tokens, *event.tokens]
        result = CompletionResult(
            index=self.index,
            content="".join(self.texts),
            tokens=[token.token for token in tokens] if report.return_tokens and not report.stream else [],
            id_slot=_NO_SLOT,
            stop=True,
            model=whole_characters(self.model),
            tokens_predicted=usage.completion_tokens,
            tokens_evaluated=usage.prompt_tokens,
            generation_settings=report.settings,
            prompt=UNSET if self.prompt is None else self.prompt,
            has_new_line=self.has_new_line,
            truncated=self._ran_out_of_context(event),
            stop_type=_stop_type(event),
            stopping_word=event.stop or "",
            tokens_cached=usage.prompt_tokens + max(usage.completion_tokens - 1, 0),
            timings=timings(usage),
        )
        if report.n_probs > 0 and not report.stream:
            # Written one by one: there may be hundreds of thousands, and no other thread runs in one call of msgspec.
            entries = [msgspec.Raw(msgspec.json.encode(entry)) for entry in probabilities(tokens, report)]
            result.completion_probabilities = cast(list[TokenProbability], entries)
        return result

    def _ran_out_of_context(self, event: Finished) -> bool:
        reached = self.max_tokens is not None and event.usage.completion_tokens >= self.max_tokens
        return event.reason == "length" and not reached

    def _usage(self, now: float) -> Usage:
        """What it has cost so far, as far as it is seen from here."""
        first = now if self.first is None else self.first
        return Usage(self.n_prompt or 0, self.n_cached, self.n_tokens, first - self.started, now - first)


def _stop_type(event: Finished) -> str:
    if event.stop is not None:
        return "word"
    return "eos" if event.reason == "stop" else "limit"


# --- Answers ---------------------------------------------------------------------------------------------------------


class CompletionStream:
    """Writes the events of all completions of a request as server-sent events. `clock` gives seconds."""

    def __init__(self, states: Sequence[CompletionState], clock: Callable[[], float]) -> None:
        self._states = states
        self._clock = clock

    def event(self, numbered: tuple[int, Event]) -> bytes:
        index, event = numbered
        state, now = self._states[index], self._clock()
        state.take(event, now)
        match event:
            case PromptProgress():
                return _sent(state.progress(event, now)) if state.report.progress else b""
            case TextPiece(text=text, tokens=tokens):
                return _sent(state.part(text, tokens, now))
            case Finished(tokens=tokens):
                rest = _sent(state.part("", tokens, now)) if tokens and event.stop is None else b""
                return rest + _sent(chosen(state.report, state.result(event)))

    def failure(self, error: Exception) -> bytes:
        """The end of a stream that cannot go on."""
        return _sent(Refusal(error_fields(problem(error))))


def _sent(value: Any) -> bytes:
    return b"data: %b\n\n" % unbroken(msgspec.json.encode(value))


def whole_answer(results: Sequence[tuple[CompletionState, Finished]]) -> bytes:
    """The answer of a request that is no stream: one object, or an array of several."""
    answers = [chosen(state.report, state.result(finished)) for state, finished in results]
    return msgspec.json.encode(answers if len(answers) > 1 else answers[0])
