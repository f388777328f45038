"""Whole answers in OpenAI's dialect: events and results -> bytes. Pure.

The types are what https://platform.openai.com/docs/api-reference says, with fields of ours where that says nothing.
/openapi.json describes them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal
from uuid import uuid4

import msgspec

from trio_runner import events
from trio_runner.errors import PromptTooLong, RequestError, RunnerError
from trio_runner.events import Embedded, Event, Finished, SampledToken, TextPiece
from trio_runner.info import Capabilities, ModelInfo
from trio_runner.server.dialects.json_out import finite_vector, float32_list
from trio_runner.server.dialects.openai.logprobs import (
    ChatLogprobs,
    TextLogprobs,
    TextOffsets,
    chat_logprobs,
    first_of_prompt,
)
from trio_runner.server.dialects.places import renamed
from trio_runner.server.dialects.sampled_tokens import last_of_answer
from trio_runner.server.problems import Answer, Problem, problem
from trio_runner.version import __version__

FINGERPRINT: Final = f"trio-runner-{__version__}"
"""What computed an answer. OpenAI's clients compare it between answers that should be equal."""
OWNER: Final = "trio-runner"

FinishReason = Literal["stop", "length"]
FINISH: Final[dict[str, FinishReason]] = {"stop": "stop", "length": "length", "deadline": "length"}
"""OpenAI's word for each of ours: clients know no other. `stop_reason` says more."""


# --- Errors ----------------------------------------------------------------------------------------------------------


class Error(msgspec.Struct, frozen=True):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is no success, and the data of an event that ends a stream early."""

    error: Error


def error_body(refusal: Problem) -> bytes:
    """`refusal` as JSON."""
    kind: Literal["invalid_request_error", "server_error"]
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    code = refusal.code or ("invalid_api_key" if refusal.status == 401 else None)
    text = refusal.text.encode(errors="replace").decode()
    return msgspec.json.encode(ErrorBody(Error(text, kind, refusal.param, code)))


def error_answer(refusal: Problem) -> Answer:
    """`refusal` as an answer. OpenAI has one status for all that is wrong with a request."""
    headers = {"Content-Type": "application/json", "x-request-id": request_id(), **refusal.headers}
    if refusal.status >= 500 and "Retry-After" not in refusal.headers:
        headers["x-should-retry"] = "false"  # what is broken stays broken, and clients would ask twice more
    return Answer(400 if refusal.status == 422 else refusal.status, headers, error_body(refusal))


def not_taken(error: RunnerError, places: Mapping[str, str]) -> Problem:
    """The problem of a request that the engine did not take. `places` are the fields of the body in which parameters of
    the engine were given, where they have another name."""
    if isinstance(error, RequestError):
        error = renamed(error, places)
    refusal = problem(error)
    if isinstance(error, PromptTooLong):
        text = f"This model's maximum context length is {error.n_ctx} tokens, but {error.param} has {error.n_prompt}."
        return replace(refusal, text=text)
    return refusal


def answer_id(kind: str) -> str:
    """A name for one answer: `kind` and a number that no other has."""
    return f"{kind}-{uuid4().hex}"


def request_id() -> str:
    """A name for one answer, for logs."""
    return f"req_{uuid4().hex}"


# --- Generations -----------------------------------------------------------------------------------------------------


class PromptDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens."""

    cached_tokens: int
    """Those found in the prompt cache, and not decoded again."""


class CompletionDetails(msgspec.Struct, frozen=True):
    """Of the answer's tokens."""

    reasoning_tokens: int = 0
    """Always 0: reasoning is not told apart from the answer."""


class Usage(msgspec.Struct, frozen=True):
    """What a request cost. A prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails = CompletionDetails()


def total_usage(usages: Sequence[events.Usage], n: int) -> Usage:
    """The usage of all choices, of which each `n` have the same prompt. `cached_tokens` are those of the first."""
    firsts = usages[::n]
    prompt, completion = sum(u.prompt_tokens for u in firsts), sum(u.completion_tokens for u in usages)
    cached = sum(u.cached_tokens for u in firsts)
    return Usage(prompt, completion, prompt + completion, PromptDetails(cached))


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What the assistant said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | None
    """The stop string that was found, or "deadline"."""


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str = FINGERPRINT


class TextChoice(msgspec.Struct, frozen=True):
    """One answer, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    """The stop string that was found, or "deadline"."""


class TextCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer of POST /v1/completions, or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None
    system_fingerprint: str = FINGERPRINT


@dataclass(frozen=True, slots=True)
class Head:
    """What all parts of one answer begin with."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str

    def fields(self) -> dict[str, Any]:
        """The fields by name."""
        return {"id": self.id, "created": self.created, "model": self.model}


@dataclass(slots=True)
class Said:
    """What one generation has said so far."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    finished: Finished | None = None


class Gathered:
    """The events of all choices of one answer, until each has finished."""

    def __init__(self, n_choices: int) -> None:
        self.said = [Said() for _ in range(n_choices)]

    def push(self, index: int, event: Event) -> None:
        """Take an event of the choice with this index."""
        said = self.said[index]
        if isinstance(event, TextPiece):
            said.pieces.append(event.text)
            said.tokens += event.tokens
        elif isinstance(event, Finished):
            said.tokens += last_of_answer(event)
            said.finished = event

    @property
    def size(self) -> int:
        """How much there is to write: pieces of text, and tokens with their alternatives."""
        return sum(len(said.pieces) + sum(1 + len(token.top) for token in said.tokens) for said in self.said)

    def finished(self) -> list[Finished]:
        """The last event of each choice."""
        return [said.finished for said in self.said if said.finished is not None]


def ending(event: Finished) -> tuple[FinishReason, str | None]:
    """(finish_reason, stop_reason)"""
    return FINISH[event.reason], "deadline" if event.reason == "deadline" else event.stop


def chat_completion(head: Head, gathered: Gathered, *, n: int, logprobs: bool) -> bytes:
    """The whole answer of POST /v1/chat/completions."""
    choices = []
    for index, (said, finished) in enumerate(zip(gathered.said, gathered.finished(), strict=True)):
        details = chat_logprobs(said.tokens) if logprobs else None
        choices.append(ChatChoice(index, Message(content="".join(said.pieces)), details, *ending(finished)))
    usage = total_usage([finished.usage for finished in gathered.finished()], n)
    return msgspec.json.encode(ChatCompletion(**head.fields(), choices=choices, usage=usage))


def text_completion(head: Head, gathered: Gathered, *, n: int, n_top: int, echoes: Sequence[str]) -> bytes:
    """The whole answer of POST /v1/completions. `n_top` alternatives are reported with each token; below 0, nothing
    is. `echoes` are the texts that the choices of each prompt begin with; empty for none."""
    choices = []
    ends = gathered.finished()
    for index, (said, finished) in enumerate(zip(gathered.said, ends, strict=True)):
        echo = "".join(echoes[index // n : index // n + 1])
        details = None
        if n_top >= 0:
            of_prompt = ends[index - index % n].prompt_logprobs if echo else ()
            first = first_of_prompt(echo, of_prompt)
            details = TextOffsets(n_top).logprobs([*of_prompt, *said.tokens], first=first)
        text = "".join([echo, *said.pieces])
        choices.append(TextChoice(index, text, details, *ending(finished)))
    usage = total_usage([finished.usage for finished in gathered.finished()], n)
    return msgspec.json.encode(TextCompletion(**head.fields(), choices=choices, usage=usage))


# --- Embeddings ------------------------------------------------------------------------------------------------------


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """The embedding of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """What the embeddings cost."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def embeddings(results: Sequence[Embedded], model: str, *, as_base64: bool) -> bytes:
    """The answer of POST /v1/embeddings. Raises `RunnerError` if a value is not finite."""
    data = [Embedding(index=index, embedding=_elements(embedded, as_base64)) for index, embedded in enumerate(results)]
    n_tokens = sum(embedded.usage.prompt_tokens for embedded in results)
    return msgspec.json.encode(Embeddings(data=data, model=model, usage=EmbeddingUsage(n_tokens, n_tokens)))


def _elements(embedded: Embedded, as_base64: bool) -> Any:
    vector = finite_vector(embedded)
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else float32_list(vector)


# --- Models ----------------------------------------------------------------------------------------------------------


class Model(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model that can be asked for. What is not known while it loads is left out."""

    id: str
    created: int
    object: Literal["model"]
    owned_by: str
    context_length: int | None = None
    """Tokens of one prompt and its answer."""
    parameters: int | None = None
    bytes: int | None = None


class Models(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


def models(names: Sequence[str], created: int, loaded: tuple[ModelInfo, Capabilities] | None) -> bytes:
    """The answer of GET /v1/models. `created` is when the model was first served, in seconds since 1970."""
    return msgspec.json.encode(Models(data=[_model(name, created, loaded) for name in names]))


def model_answer(name: str, created: int, loaded: tuple[ModelInfo, Capabilities] | None) -> bytes:
    """The answer of GET /v1/models/NAME."""
    return msgspec.json.encode(_model(name, created, loaded))


def _model(name: str, created: int, loaded: tuple[ModelInfo, Capabilities] | None) -> Model:
    if loaded is None:
        return Model(name, created, "model", OWNER)
    info, capabilities = loaded
    return Model(name, created, "model", OWNER, capabilities.n_ctx, info.n_params, info.size)
