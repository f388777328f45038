"""Answers in Ollama's dialect: events and results -> bytes. Pure, but for the clock.

Each answer, and each part of a stream, is one line of JSON. Clients read every line of a stream as JSON, so none of
them is empty. They decode strictly: a field has the same type in every line, and durations are integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

from msgspec import UNSET, Struct, UnsetType

from trio_runner.events import Embedded, Event, Finished, PromptProgress, SampledToken, TextPiece, TokenInfo
from trio_runner.server.dialects.json_out import finite_vector, float32_list, line, whole_characters
from trio_runner.server.dialects.ollama.requests import Idle
from trio_runner.server.dialects.ollama.thinking import ThinkingSplitter
from trio_runner.server.dialects.ollama.times import Stopwatch, nanoseconds
from trio_runner.server.dialects.sampled_tokens import finite_logprob, last_of_answer
from trio_runner.server.problems import Answer, Problem, problem_text

# --- Types -----------------------------------------------------------------------------------------------------------


class Refusal(Struct):
    """An error: a whole answer, or the last line of a stream that cannot go on."""

    error: str


class TokenLogprob(Struct, kw_only=True):
    """A token, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(TokenLogprob, kw_only=True, omit_defaults=True):
    """A sampled token, and the most probable tokens at its place."""

    top_logprobs: list[TokenLogprob] = []


class GenerateLine(Struct, kw_only=True, omit_defaults=True):
    """A line of the answer of /api/generate, or the whole answer. The last line has the counts and the durations, which
    are in nanoseconds."""

    model: str
    created_at: str
    response: str
    thinking: str = ""
    done: bool
    done_reason: str | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    logprobs: list[Logprob] | UnsetType = UNSET


class Message(Struct, kw_only=True, omit_defaults=True):
    """What the model said."""

    role: str
    content: str
    thinking: str = ""


class ChatLine(Struct, kw_only=True, omit_defaults=True):
    """A line of the answer of /api/chat, or the whole answer. The last line has the counts and the durations, which are
    in nanoseconds."""

    model: str
    created_at: str
    message: Message
    done: bool
    done_reason: str | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    logprobs: list[Logprob] | UnsetType = UNSET


class EmbedAnswer(Struct, kw_only=True):
    """The answer of /api/embed. Durations are in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class EmbeddingAnswer(Struct, kw_only=True):
    """The answer of /api/embeddings."""

    embedding: list[float]


class Progress(Struct, kw_only=True):
    """A line of the answer of /api/pull, or the whole answer."""

    status: str


class Version(Struct, kw_only=True):
    """The answer of /api/version."""

    version: str


# --- Refusals --------------------------------------------------------------------------------------------------------


def refusal(problem: Problem) -> Answer:
    """The answer to a request that is refused. Ollama has no 422: what its model cannot do is a 400."""
    headers = {"Content-Type": "application/json", **problem.headers}
    status = 400 if problem.status == 422 else problem.status
    return Answer(status, headers, line(Refusal(whole_characters(problem.text))))


# --- Generated answers -----------------------------------------------------------------------------------------------


class GenerateLines:
    """Writes the events of one generation as the lines of its answer, in the form of /api/generate.

    With a `splitter`, the thinking is told apart from the answer.
    """

    def __init__(self, model: str, watch: Stopwatch, splitter: ThinkingSplitter | None = None) -> None:
        self._model = model
        self._watch = watch
        self._splitter = splitter

    def event(self, event: Event) -> bytes:
        match event:
            case PromptProgress():
                return b""
            case TextPiece(text=text, tokens=tokens):
                thinking, rest = self._splitter.add(text) if self._splitter else ("", text)
                return self._piece(thinking, rest, tokens)
            case Finished():
                thinking, rest = self._splitter.finish() if self._splitter else ("", "")
                return self._piece(thinking, rest, tuple(last_of_answer(event))) + self._line(
                    "", "", **self._ending(event)
                )

    def failure(self, error: Exception) -> bytes:
        """The last line of an answer that cannot go on. Its status is long sent, so the error comes in the body."""
        return line(Refusal(problem_text(error)))

    def whole(self, events: Sequence[Event]) -> bytes:
        """The answer that is no stream, from all events."""
        finished = events[-1]
        assert isinstance(finished, Finished)
        text = "".join(event.text for event in events)
        tokens = [token for event in events if isinstance(event, TextPiece) for token in event.tokens]
        tokens += last_of_answer(finished)
        thinking, rest = "", text
        if self._splitter:
            thinking, rest = (a + b for a, b in zip(self._splitter.add(text), self._splitter.finish(), strict=True))
        return self._line(thinking, rest, **self._ending(finished), **_logprobs(tokens))

    def idle(self, idle: Idle) -> bytes:
        """The answer to a request that generates nothing."""
        return self._line("", "", done=True, done_reason=idle)

    def _piece(self, thinking: str, text: str, tokens: Sequence[SampledToken]) -> bytes:
        if not (thinking or text or tokens):
            return b""
        return self._line(thinking, text, done=False, **_logprobs(tokens))

    def _ending(self, finished: Finished) -> dict[str, Any]:
        usage = finished.usage
        return {
            "done": True,
            "done_reason": finished.reason,
            "total_duration": self._watch.elapsed(),
            "load_duration": self._watch.load_duration,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": nanoseconds(usage.prompt_seconds),
            "eval_count": usage.completion_tokens,
            "eval_duration": nanoseconds(usage.completion_seconds),
        }

    def _line(self, thinking: str, text: str, **more: Any) -> bytes:
        return line(
            GenerateLine(model=self._model, created_at=self._watch.now(), response=text, thinking=thinking, **more)
        )


class ChatLines(GenerateLines):
    """The same in the form of /api/chat."""

    def _line(self, thinking: str, text: str, **more: Any) -> bytes:
        message = Message(role="assistant", content=text, thinking=thinking)
        return line(ChatLine(model=self._model, created_at=self._watch.now(), message=message, **more))


def _logprobs(tokens: Sequence[SampledToken]) -> dict[str, Any]:
    if not tokens:
        return {}
    found = [
        Logprob(**_token(token), top_logprobs=[TokenLogprob(**_token(one)) for one in token.top]) for token in tokens
    ]
    return {"logprobs": found}


def _token(info: TokenInfo) -> dict[str, Any]:
    return {
        "token": info.piece.decode("utf-8", errors="replace"),
        "logprob": finite_logprob(info.logprob),
        "bytes": list(info.piece),
    }


# --- Other answers ---------------------------------------------------------------------------------------------------


def embed_line(model: str, embedded: Sequence[Embedded], watch: Stopwatch) -> bytes:
    """The answer of /api/embed. Raises `RunnerError` if a value is not finite."""
    return line(
        EmbedAnswer(
            model=model,
            embeddings=[_elements(one) for one in embedded],
            total_duration=watch.elapsed(),
            load_duration=watch.load_duration,
            prompt_eval_count=sum(one.usage.prompt_tokens for one in embedded),
        )
    )


def embedding_line(embedded: Sequence[Embedded]) -> bytes:
    """The answer of /api/embeddings, to a text or to none. Raises `RunnerError` if a value is not finite."""
    return line(EmbeddingAnswer(embedding=_elements(embedded[0]) if embedded else []))


def _elements(embedded: Embedded) -> list[float]:
    # Encoded already, in as few digits as name each element.
    return cast("list[float]", float32_list(finite_vector(embedded)))


PULLED: Final = (Progress(status="pulling manifest"), Progress(status="success"))
"""What a client is told that pulls the model that there is."""


def pulled_lines() -> bytes:
    """The answer of /api/pull, line by line."""
    return b"".join(map(line, PULLED))


def pulled_line() -> bytes:
    """The same as a whole answer."""
    return line(PULLED[-1])


def version_line(version: str) -> bytes:
    """The answer of /api/version."""
    return line(Version(version=version))
