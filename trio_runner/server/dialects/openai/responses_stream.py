"""Streams in OpenAI's dialect: events -> server-sent events (https://html.spec.whatwg.org/#server-sent-events). Pure.

There is one event for every piece of text. So everything before the text is written once for each choice, and only the
text itself is encoded again; msgspec writes all other events.

Rule 1: the role comes once, in the first event of a choice, because clients join the strings of all events.
Rule 2: the choices of a chat begin in the order of their numbers, all at once, before the first text.
Rule 3: the stream ends with `[DONE]`, or with an event that has an `error`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from trio_runner import events
from trio_runner.events import Event, Finished, SampledToken, TextPiece
from trio_runner.server.dialects.json_out import unbroken
from trio_runner.server.dialects.openai.logprobs import ChatLogprobs, TextOffsets, chat_logprobs
from trio_runner.server.dialects.openai.responses import (
    FINGERPRINT,
    FinishReason,
    Head,
    Usage,
    ending,
    error_body,
    total_usage,
)
from trio_runner.server.dialects.sampled_tokens import last_of_answer
from trio_runner.server.problems import problem

KEEP_ALIVE: Final = b": still there\n\n"
"""A comment, which means nothing in a stream."""
_DONE: Final = b"data: [DONE]\n\n"
_END: Final = b"}]}\n\n"


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an event adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a streamed answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str = FINGERPRINT


class Stream:
    """Writes the events of all choices of one answer. Subclasses say what is in a choice.

    `n` of the `n_choices` choices have the same prompt.
    """

    kind: str
    """The value of `object`."""
    before_text: bytes
    after_text: bytes
    """What stands around the JSON string of a piece of text, after the index and before the log-probabilities."""

    def __init__(self, head: Head, *, n_choices: int, n: int, include_usage: bool) -> None:
        self._n = n
        self._include_usage = include_usage
        self._usages: list[events.Usage | None] = [None] * n_choices
        self._n_open = n_choices
        fields = {"id": head.id, "object": self.kind, "created": head.created, "model": head.model}
        fields["system_fingerprint"] = FINGERPRINT
        self._head = b"data: " + _encoded(fields)[:-1]
        null = b',"usage":null' if include_usage else b""
        self._begin = [self._head + null + b',"choices":[{"index":%d,' % index for index in range(n_choices)]
        self._before = [begin + self.before_text for begin in self._begin]
        self._after = self.after_text + b',"logprobs":null,"finish_reason":null' + _END

    def event(self, arrived: tuple[int, Event]) -> bytes:
        """What an event of a choice adds to the stream."""
        index, event = arrived
        if type(event) is TextPiece:
            written = self._before[index] + _encoded(event.text)
            return written + (self._after if not event.tokens else self._with_tokens(index, event.tokens))
        if isinstance(event, Finished):
            return self._finish(index, event)
        return b""

    def failure(self, error: Exception) -> bytes:
        """The end of a stream that cannot go on. Its status is long sent."""
        return b"data: " + error_body(problem(error)) + b"\n\n"

    def _with_tokens(self, index: int, tokens: Sequence[SampledToken]) -> bytes:
        return self.after_text + b',"logprobs":' + self._logprobs(index, tokens) + b',"finish_reason":null' + _END

    def _finish(self, index: int, event: Finished) -> bytes:
        reason, stop = ending(event)
        tokens = tuple(last_of_answer(event))
        written = (
            self._begin[index]
            + self._empty()
            + b',"logprobs":'
            + (self._logprobs(index, tokens) if tokens else b"null")
            + b',"finish_reason":"%b","stop_reason":%b' % (reason.encode(), _encoded(stop))
            + _END
        )
        self._usages[index] = event.usage
        self._n_open -= 1
        return written if self._n_open else written + self._last()

    def _last(self) -> bytes:
        if not self._include_usage:
            return _DONE
        usage = total_usage([usage for usage in self._usages if usage is not None], self._n)
        return self._head + b',"choices":[],"usage":' + msgspec.json.encode(usage) + b"}\n\n" + _DONE

    def _empty(self) -> bytes:
        """A choice without text."""
        raise NotImplementedError

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> bytes:
        raise NotImplementedError


class ChatStream(Stream):
    """Of POST /v1/chat/completions."""

    kind = "chat.completion.chunk"
    before_text = b'"delta":{"content":'
    after_text = b"}"

    def opening(self) -> bytes:
        """The first event of each choice."""
        role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null' + _END
        return b"".join(begin + role for begin in self._begin)

    def _empty(self) -> bytes:
        return b'"delta":{}'

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> bytes:
        return _encoded(chat_logprobs(tokens))


class TextStream(Stream):
    """Of POST /v1/completions. `n_top` alternatives are reported with each token, if tokens are reported."""

    kind = "text_completion"
    before_text = b'"text":'
    after_text = b""

    def __init__(self, head: Head, *, n_top: int, **more: Any) -> None:
        super().__init__(head, **more)
        self._offsets = [TextOffsets(n_top) for _ in self._begin]

    def opening(self, echoes: Sequence[str] = ()) -> bytes:
        """The first event of each choice, with the text of its prompt in `echoes`, if any; else a comment."""
        if not echoes:
            return b": accepted\n\n"
        return b"".join(
            before + _encoded(echoes[index // self._n]) + self._after for index, before in enumerate(self._before)
        )

    def _empty(self) -> bytes:
        return b'"text":""'

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> bytes:
        return _encoded(self._offsets[index].logprobs(tokens))


def _encoded(value: Any) -> bytes:
    return unbroken(msgspec.json.encode(value))
