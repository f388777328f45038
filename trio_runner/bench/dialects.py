"""What goes over the wire: how a completion is asked of each kind of server, and how each answers. Pure.

runner   ours, and that of Ollama's Go runner: a JSON object per line
llama    llama-server's own /completion: server-sent events, or one JSON object
openai   /v1/completions: server-sent events, or one JSON object
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeAlias

DialectName: TypeAlias = Literal["runner", "llama", "openai"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A greedy completion that does not end before `max_tokens`, as far as the dialect can say so."""

    prompt: str
    max_tokens: int
    reuse: bool = False
    """Whether the server may use what it has in its cache for this prompt."""
    stream: bool = True
    n_top: int = 0
    """Most probable tokens to report at each position."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that was sampled: its bytes, and the log-probabilities of the best at its place, highest first."""

    piece: bytes
    top: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Total:
    """What the server says of the whole request at its end; None where it does not say."""

    prompt_tokens: int | None
    decoded_tokens: int | None
    """Tokens of the prompt that were not found in the cache."""
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Message:
    """One object of an answer. The last one has a `total`, or the `error` that ended it."""

    text: str = ""
    choices: tuple[Choice, ...] = ()
    total: Total | None = None
    error: str | None = None


class Lines:
    """Bytes to whole lines."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines

    def flush(self) -> list[bytes]:
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


class Decoder:
    """The bytes of a body to its messages, whether they are lines, events, or one object without a line end."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._lines = Lines()

    def push(self, data: bytes) -> list[Message]:
        return self._messages(self._lines.push(data))

    def flush(self) -> list[Message]:
        return self._messages(self._lines.flush())

    def _messages(self, lines: Sequence[bytes]) -> list[Message]:
        messages = []
        for line in lines:
            payload = line.strip().removeprefix(b"data:").strip()
            if payload.startswith(b"{"):  # else an empty line, a comment, an event's name, or [DONE]
                messages.append(self._dialect.message(json.loads(payload)))
        return messages


class Dialect(ABC):
    """`forbidden` are the tokens that would end a stream, `model` what the server calls its model."""

    name: ClassVar[DialectName]
    path: ClassVar[str]
    embedding_path: ClassVar[str] = "/embedding"

    def __init__(self, *, forbidden: Sequence[int] = (), model: str = "") -> None:
        self.forbidden = tuple(forbidden)
        self.model = model

    @abstractmethod
    def body(self, ask: Ask) -> dict[str, Any]:
        """The fields of the request to `path`."""

    @abstractmethod
    def message(self, fields: Mapping[str, Any]) -> Message:
        """One JSON object of the answer."""

    def embedding_body(self, text: str) -> dict[str, Any]:
        """The fields of the request to `embedding_path`."""
        return {"content": text}

    def decoder(self) -> Decoder:
        return Decoder(self)


class Runner(Dialect):
    name = "runner"
    path = "/completion"

    def body(self, ask: Ask) -> dict[str, Any]:
        return {
            "prompt": ask.prompt,
            "n_predict": ask.max_tokens,
            "temperature": 0,
            "repeat_penalty": 1,
            "cache_prompt": ask.reuse,
            "logit_bias": [[token, False] for token in self.forbidden],
            **({"logprobs": ask.n_top} if ask.n_top else {}),
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
    name = "llama"
    path = "/completion"

    def body(self, ask: Ask) -> dict[str, Any]:
        return {
            "prompt": ask.prompt,
            "n_predict": ask.max_tokens,
            "temperature": 0,
            # The cheapest chain that is greedy: its default one sorts 40 candidates first.
            "samplers": ["top_k"],
            "top_k": 1,
            "repeat_penalty": 1,
            "ignore_eos": True,
            "cache_prompt": ask.reuse,
            "stream": ask.stream,
            **({"n_probs": ask.n_top} if ask.n_top else {}),
        }

    def message(self, fields: Mapping[str, Any]) -> Message:
        if "error" in fields:
            return Message(error=_error_text(fields["error"]))
        total = _llama_total(fields.get("timings", {})) if fields.get("stop") else None
        return Message(fields.get("content", ""), _choices(fields.get("completion_probabilities")), total)


class OpenAI(Dialect):
    name = "openai"
    path = "/v1/completions"
    embedding_path = "/v1/embeddings"

    def body(self, ask: Ask) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": ask.stream,
            "ignore_eos": True,
            "cache_prompt": ask.reuse,  # llama-server's; others ignore it
            **({"stream_options": {"include_usage": True}} if ask.stream else {}),
            **({"logprobs": ask.n_top} if ask.n_top else {}),
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
        return Message(choices[0].get("text") or "", _openai_choices(choices[0].get("logprobs")), total)

    def embedding_body(self, text: str) -> dict[str, Any]:
        return {"model": self.model, "input": text}


DIALECTS: Final[dict[DialectName, type[Dialect]]] = {kind.name: kind for kind in (Runner, Llama, OpenAI)}


def _error_text(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, Mapping) else str(error)


def _llama_total(timings: Mapping[str, Any]) -> Total:
    decoded, cached = timings.get("prompt_n"), timings.get("cache_n")
    prompt = decoded + cached if decoded is not None and cached is not None else None
    return Total(prompt, decoded, timings.get("predicted_n"))


def _choices(entries: Sequence[Mapping[str, Any]] | None) -> tuple[Choice, ...]:
    return tuple(
        Choice(bytes(entry["bytes"]), _descending(item["logprob"] for item in entry.get("top_logprobs", ())))
        for entry in entries or ()
    )


def _openai_choices(logprobs: Mapping[str, Any] | None) -> tuple[Choice, ...]:
    if not logprobs:
        return ()
    if "content" in logprobs:  # llama-server answers in the words of the chat endpoint
        return _choices(logprobs["content"])
    tops = logprobs.get("top_logprobs") or [{}] * len(logprobs["tokens"])
    return tuple(
        Choice(token.encode(), _descending((top or {}).values()))
        for token, top in zip(logprobs["tokens"], tops, strict=False)
    )


def _descending(values: Any) -> tuple[float, ...]:
    return tuple(sorted(map(float, values), reverse=True))
