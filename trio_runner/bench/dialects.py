"""The bytes of each kind of server: how a completion is requested, and how it is answered. Pure.

runner        our server and Ollama's Go runner: one JSON object per line
llama         llama-server's own /completion: server-sent events, or one JSON object
openai        /v1/completions: server-sent events, or one JSON object
openai-chat   /v1/chat/completions: the same, with the prompt as the message of a user
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeAlias

DialectName: TypeAlias = Literal["runner", "llama", "openai", "openai-chat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for a greedy completion that does not end before `max_tokens`, if the dialect can express that."""

    prompt: str
    max_tokens: int
    reuse: bool = False
    """Whether the server may use its prompt cache."""
    stream: bool = True
    n_top: int = 0
    """Most probable tokens that the answer reports at each position."""
    n_answers: int = 1
    """Answers to the prompt, all in one. At most `Dialect.max_answers`."""
    background: bool = False
    """Whether it may be made to wait for others. Only servers of ours know that."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A sampled token: its bytes, and the log-probabilities of the best tokens at its position, highest first.

    Numbers are as in the JSON of the answer, which has enough digits to tell any two of the server's numbers apart.
    """

    piece: bytes
    top: tuple[float, ...]
    logprob: float | None = None
    """The log-probability of the token itself."""
    token: int | None = None
    """Its number; None if the server does not tell."""
    answer: int = 0
    """Which of several answers it belongs to."""


@dataclass(frozen=True, slots=True)
class Total:
    """Counts of the whole request, from the end of the answer. None if the server does not report them."""

    prompt_tokens: int | None
    decoded_tokens: int | None
    """Tokens of the prompt that the server did not find in its cache."""
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Message:
    """One object of an answer. The last one has a `total`, or the `error` that ended the answer."""

    text: str = ""
    choices: tuple[Choice, ...] = ()
    total: Total | None = None
    error: str | None = None


class Lines:
    """Splits bytes into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` completes, without their line ends."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines

    def flush(self) -> list[bytes]:
        """Return the last line if it has no line end."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


class Decoder:
    """Turns the bytes of a body into messages: from lines, from events, or from one object without a line end."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._lines = Lines()

    def push(self, data: bytes) -> list[Message]:
        """Return the messages that `data` completes. Raises ValueError for what is not JSON."""
        return self._messages(self._lines.push(data))

    def flush(self) -> list[Message]:
        """Return the last message if it has no line end. Raises ValueError for what is not JSON."""
        return self._messages(self._lines.flush())

    def _messages(self, lines: Sequence[bytes]) -> list[Message]:
        messages = []
        for line in lines:
            payload = line.strip().removeprefix(b"data:").strip()
            if payload.startswith(b"{"):  # not an empty line, a comment, an event's name or [DONE]
                messages.append(self._dialect.message(json.loads(payload)))
        return messages


class Dialect(ABC):
    """How one kind of server is asked. `forbidden` are tokens that would end a stream, `model` is the model's name, and
    all paths begin with `base`."""

    name: ClassVar[DialectName]
    max_answers: ClassVar[int] = 1
    """Answers to one prompt that a request can ask for."""
    path: str
    embedding_path = "/embedding"

    def __init__(self, *, forbidden: Sequence[int] = (), model: str = "", base: str = "") -> None:
        self.forbidden = tuple(forbidden)
        self.model = model
        self.path = base + self.path
        self.embedding_path = base + self.embedding_path

    @abstractmethod
    def body(self, request: Request) -> dict[str, Any]:
        """The JSON fields of a request to `path`."""

    @abstractmethod
    def message(self, fields: Mapping[str, Any]) -> Message:
        """Read one JSON object of the answer."""

    def embedding_body(self, text: str) -> dict[str, Any]:
        """The JSON fields of a request to `embedding_path`."""
        return {"content": text}

    def decoder(self) -> Decoder:
        """A decoder for one answer."""
        return Decoder(self)


class Runner(Dialect):
    """Our server, and Ollama's Go runner."""

    name = "runner"
    path = "/completion"

    def body(self, request: Request) -> dict[str, Any]:
        return {
            "prompt": request.prompt,
            "n_predict": request.max_tokens,
            "temperature": 0,
            "repeat_penalty": 1,
            "cache_prompt": request.reuse,
            "logit_bias": [[token, False] for token in self.forbidden],
            **({"logprobs": request.n_top} if request.n_top else {}),
            **_priority(request),
        }

    def message(self, fields: Mapping[str, Any]) -> Message:
        if "error" in fields:
            return Message(error=str(fields["error"]))
        total = None
        if fields.get("stop"):
            timings = fields.get("timings", {})
            prompt, cached = timings.get("prompt_n"), timings.get("cache_n")
            decoded = prompt - cached if prompt is not None and cached is not None else None
            total = Total(prompt, decoded, timings.get("predicted_n"))
        return Message(fields.get("content", ""), _choices(fields.get("completion_probabilities")), total)


class Llama(Dialect):
    """llama-server's own endpoints."""

    name = "llama"
    max_answers = 4
    path = "/completion"

    def body(self, request: Request) -> dict[str, Any]:
        return {
            "prompt": request.prompt,
            "n_predict": request.max_tokens,
            "temperature": 0,
            # The cheapest greedy chain of samplers: the default one sorts 40 candidates first.
            "samplers": ["top_k"],
            "top_k": 1,
            "repeat_penalty": 1,
            "ignore_eos": True,
            "cache_prompt": request.reuse,
            "stream": request.stream,
            **({"n_probs": request.n_top} if request.n_top else {}),
            **({"n_cmpl": request.n_answers} if request.n_answers > 1 else {}),
            **_priority(request),
        }

    def message(self, fields: Mapping[str, Any]) -> Message:
        if "error" in fields:
            return Message(error=_error_text(fields["error"]))
        total = _llama_total(fields.get("timings", {})) if fields.get("stop") else None
        choices = _choices(fields.get("completion_probabilities"), fields.get("index", 0))
        return Message(fields.get("content", ""), choices, total)


class OpenAI(Dialect):
    """OpenAI's endpoints, as many servers have them."""

    name: ClassVar[DialectName] = "openai"
    max_answers = 4
    path = "/v1/completions"
    embedding_path = "/v1/embeddings"

    def body(self, request: Request) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": request.stream,
            "ignore_eos": True,
            "cache_prompt": request.reuse,  # a field of llama-server, which others ignore
            **({"stream_options": {"include_usage": True}} if request.stream else {}),
            **({"logprobs": request.n_top} if request.n_top else {}),
            **({"n": request.n_answers} if request.n_answers > 1 else {}),
            **_priority(request),
        }

    def message(self, fields: Mapping[str, Any]) -> Message:
        if "error" in fields:
            return Message(error=_error_text(fields["error"]))
        choices = fields.get("choices") or [{}]
        usage, timings = fields.get("usage"), fields.get("timings")
        total = None
        if timings and choices[0].get("finish_reason"):
            total = _llama_total(timings)
        elif usage:
            prompt = usage.get("prompt_tokens")
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            decoded = prompt - cached if prompt is not None and cached is not None else None
            total = Total(prompt, decoded, usage.get("completion_tokens"))
        sampled = _openai_choices(choices[0].get("logprobs"), choices[0].get("index", 0))
        return Message(choices[0].get("text") or "", sampled, total)

    def embedding_body(self, text: str) -> dict[str, Any]:
        return {"model": self.model, "input": text}


class OpenAIChat(OpenAI):
    """OpenAI's endpoint for conversations. The server puts its chat template around the prompt."""

    name = "openai-chat"
    path = "/v1/chat/completions"

    def body(self, request: Request) -> dict[str, Any]:
        fields = super().body(request)
        fields["messages"] = [{"role": "user", "content": fields.pop("prompt")}]
        if request.n_top:
            fields |= {"logprobs": True, "top_logprobs": request.n_top}
        return fields

    def message(self, fields: Mapping[str, Any]) -> Message:
        choices = [
            {**choice, "text": (choice.get("delta") or choice.get("message") or {}).get("content")}
            for choice in fields.get("choices") or ()
        ]
        return super().message({**fields, "choices": choices})


DIALECTS: Final[dict[DialectName, type[Dialect]]] = {kind.name: kind for kind in (Runner, Llama, OpenAI, OpenAIChat)}
OUR_BASES: Final[dict[DialectName, str]] = {"llama": "/llama"}
"""Where a server of ours has the paths of a dialect that it does not have at the root."""


def _error_text(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, Mapping) else str(error)


def _llama_total(timings: Mapping[str, Any]) -> Total:
    decoded, cached = timings.get("prompt_n"), timings.get("cache_n")
    prompt = decoded + cached if decoded is not None and cached is not None else None
    return Total(prompt, decoded, timings.get("predicted_n"))


def _priority(request: Request) -> dict[str, str]:
    return {"priority": "background"} if request.background else {}


def _choices(entries: Sequence[Mapping[str, Any]] | None, answer: int = 0) -> tuple[Choice, ...]:
    return tuple(
        Choice(
            bytes(entry["bytes"]),
            _descending(item["logprob"] for item in entry.get("top_logprobs", ())),
            entry.get("logprob"),
            entry.get("id"),
            answer,
        )
        for entry in entries or ()
    )


def _openai_choices(logprobs: Mapping[str, Any] | None, answer: int) -> tuple[Choice, ...]:
    if not logprobs:
        return ()
    if "content" in logprobs:  # llama-server answers with the fields of the chat endpoint
        return _choices(logprobs["content"], answer)
    nothing: list[Any] = [None] * len(logprobs["tokens"])
    tops, own = (logprobs.get(name) or nothing for name in ("top_logprobs", "token_logprobs"))
    return tuple(
        Choice(token.encode(), _descending((top or {}).values()), logprob, None, answer)
        for token, top, logprob in zip(logprobs["tokens"], tops, own, strict=False)
    )


def _descending(values: Any) -> tuple[float, ...]:
    return tuple(sorted(map(float, values), reverse=True))
