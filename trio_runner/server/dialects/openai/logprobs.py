"""Log-probabilities in OpenAI's dialect, which has two forms for them. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Final

import msgspec

from trio_runner.events import SampledToken, TokenInfo
from trio_runner.server.dialects.sampled_tokens import finite_logprob

LOWEST: Final = -9999.0
"""What stands for the logarithm of almost nothing: JSON has no infinity, and this is OpenAI's number."""


class Alternative(msgspec.Struct, frozen=True):
    """A token, and the natural logarithm of its probability before any sampler changed it."""

    token: str
    """Bytes that are no character are U+FFFD here."""
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token of the answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]
    """The most probable tokens at this place, most probable first."""


class ChatLogprobs(msgspec.Struct, frozen=True):
    """The form of POST /v1/chat/completions."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """The form of POST /v1/completions: lists with one element for each token."""

    tokens: list[str]
    """A token that is no whole characters is written as `bytes:\\xe4`."""
    token_logprobs: list[float | None]
    """The first token of a prompt has none."""
    top_logprobs: list[dict[str, float] | None] | None
    """The most probable tokens at each place, and the token itself."""
    text_offset: list[int]
    """Where in the answer each token begins, in characters."""


def finite(logprob: float) -> float:
    """`logprob`, or what stands for it if it is below all bounds or no number."""
    return finite_logprob(logprob, LOWEST)


def chat_logprobs(tokens: Sequence[SampledToken]) -> ChatLogprobs:
    """Those of `tokens`, in the form of chats."""
    return ChatLogprobs([_token(token) for token in tokens])


def _token(token: SampledToken) -> TokenLogprob:
    top = [Alternative(_text(other), finite(other.logprob), list(other.piece)) for other in token.top]
    return TokenLogprob(_text(token), finite(token.logprob), list(token.piece), top)


def _text(token: TokenInfo) -> str:
    return token.piece.decode(errors="replace")


class TextOffsets:
    """Writes the tokens of one answer in the form of completions, and counts the characters before each of them.
    `n_top` alternatives are reported with each."""

    def __init__(self, n_top: int) -> None:
        self._n_top = n_top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._n_characters = 0

    def logprobs(self, tokens: Sequence[SampledToken], *, first: bytes = b"") -> TextLogprobs:
        """Those of `tokens`, which follow the tokens of the last call. `first` is a token before them that has none."""
        before = [first] if first else []
        offsets = []
        for piece in (*before, *(token.piece for token in tokens)):
            offsets.append(self._n_characters)
            self._n_characters += len(self._decoder.decode(piece))
        nothing: list[None] = [None] * len(before)
        return TextLogprobs(
            [*map(_name, before), *(_name(token.piece) for token in tokens)],
            [*nothing, *(finite(token.logprob) for token in tokens)],
            [*nothing, *(_named(token) for token in tokens)] if self._n_top else None,
            offsets,
        )


def _named(token: SampledToken) -> dict[str, float]:
    return {_name(one.piece): finite(one.logprob) for one in (*token.top, token)}


def _name(piece: bytes) -> str:
    """A text that no other token has: it is the name of a field."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def first_of_prompt(text: str, tokens: Sequence[SampledToken]) -> bytes:
    """What a prompt with this text has before `tokens`, which are all of its tokens but the first: the first one, or
    nothing if that is a token such as BOS, which stands for no text."""
    whole, n_rest = text.encode(errors="replace"), sum(len(token.piece) for token in tokens)
    return whole[: max(len(whole) - n_rest, 0)]
