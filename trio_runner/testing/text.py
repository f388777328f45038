"""What the toy answers: a hash of everything that a token depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trio_runner.core.prompt import Item, MediaRow
from trio_runner.events import SampledToken, TokenInfo

if TYPE_CHECKING:
    pass

N_VOCAB = 257
END = 256
"""The end token; every other token is the byte of its number."""
N_EMBD = 8

_ALPHABET = b"abcdefgh \xc3\xa9"


ToyAdapters: TypeAlias = Sequence[tuple[str, float]]
"""(path, scale)"""


def toy_cache_key(adapters: ToyAdapters = (), encoder_tokens: Sequence[int] = ()) -> str:
    """What the next token depends on besides the items: adapters, and what an encoder has read. "" for neither."""
    return f"{sorted(adapters)}{list(encoder_tokens)}" if adapters or encoder_tokens else ""


def named(item: Item) -> str:
    """A name of an item that no other item has."""
    return f"{item.media.key.hex()}:{item.row}" if isinstance(item, MediaRow) else str(item)


def toy_next(items: Sequence[Item], cache_key: str = "", *, ignore_eos: bool = False) -> int:
    """The token that follows `items`, all that a slot holds. `cache_key` is made by `toy_cache_key`."""
    digest = hashlib.blake2b((",".join(map(named, items)) + cache_key).encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "big")
    return END if number % 61 == 0 and not ignore_eos else _ALPHABET[number % len(_ALPHABET)]


def toy_continuation(
    prompt: Sequence[Item], n_tokens: int, cache_key: str = "", *, ignore_eos: bool = False
) -> list[int]:
    """The first `n_tokens` tokens after `prompt`, up to and including the end token, in an endless context."""
    items = list(prompt)
    tokens: list[int] = []
    while len(tokens) < n_tokens and tokens[-1:] != [END]:
        tokens.append(toy_next([*items, *tokens], cache_key, ignore_eos=ignore_eos))
    return tokens


def toy_text(prompt: str | Sequence[Item], n_tokens: int, cache_key: str = "") -> str:
    """The text that the toy generates after `prompt` in an endless context, with at most `n_tokens` tokens."""
    items: Sequence[Item] = list(prompt.encode()) if isinstance(prompt, str) else prompt
    tokens = toy_continuation(items, n_tokens, cache_key)
    return _whole_characters(bytes(token for token in tokens if token != END))


def _whole_characters(data: bytes) -> str:
    text = data.decode(errors="replace")
    return text[:-1] if data and data[-1] == 0xC3 else text


def toy_score(items: Sequence[Item], token: int, n_top: int = 0, cache_key: str = "") -> SampledToken:
    """How probable the toy finds `token` after `items`. All alternatives are the token that it would say."""
    digest = hashlib.blake2b((",".join(map(named, items)) + f" {token} {cache_key}").encode(), digest_size=2).digest()
    said = toy_next(items, cache_key)
    top = (TokenInfo(said, piece_of(said), -1.0),) * n_top
    return SampledToken(token, piece_of(token), -float(int.from_bytes(digest, "big")), top)


def piece_of(token: int) -> bytes:
    """The bytes of a token."""
    return b"" if token == END else bytes([token])


def toy_vector(items: Sequence[Item], cache_key: str = "") -> NDArray[np.float32]:
    """The embedding of a prompt, shape (8,)."""
    digest = hashlib.blake2b((",".join(map(named, items)) + cache_key).encode(), digest_size=N_EMBD).digest()
    return np.frombuffer(digest, np.uint8).astype(np.float32)
