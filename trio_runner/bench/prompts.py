"""Prompts with an exact number of tokens, which differ from the first words on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random
from typing import Final

_NOUNS: Final = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education"
)
_WORDS: Final = _NOUNS.split()
"""Words so common that each is one token, with the space before it, in nearly every large vocabulary."""

_FILLERS: Final = (" a", " the", ".", "a", "!", " ", "0", "\n")
"""Texts for the last tokens, if a word has too many."""

Counter = Callable[[str], Awaitable[int]]
"""Returns the number of tokens that a server makes of a text."""


class Prompts:
    """Makes prompts. With the same `random`, servers with the same vocabulary get the same prompts."""

    def __init__(self, random: Random, count: Counter | None) -> None:
        """If `count` is None, a word counts as a token."""
        self._random = random
        self._count = count

    async def make(self, n_tokens: int, *, prefix: str = "") -> str:
        """Return a text of exactly `n_tokens` tokens that begins with `prefix`.

        Raises ValueError if the prefix is longer, or if no text fits exactly.
        """
        if self._count is None:
            return prefix + self._words(n_tokens - len(prefix.split()))
        n_prefix = await self._count(prefix) if prefix else 0
        words = [f" {self._random.choice(_WORDS)}" for _ in range(n_tokens - n_prefix)]
        while words and (n := await self._count(prefix + "".join(words))) > n_tokens:
            n_excess = (n - n_tokens) * len(words) // max(n - n_prefix, 1)
            del words[len(words) - max(n_excess, 1) :]
        return await self._fill(prefix + "".join(words), n_tokens, self._count)

    def _words(self, n_words: int) -> str:
        return "".join(f" {self._random.choice(_WORDS)}" for _ in range(n_words))

    async def _fill(self, text: str, n_tokens: int, count: Counter) -> str:
        """Append fillers to `text` until it has `n_tokens` tokens. Raises ValueError if that fails."""
        n = await count(text) if text else 0
        while n < n_tokens:
            for filler in _FILLERS:
                n_longer = await count(text + filler)
                if n < n_longer <= n_tokens:
                    text, n = text + filler, n_longer
                    break
            else:
                raise ValueError(f"no prompt of {n_tokens} tokens: stuck at {n}")
        if n > n_tokens:
            raise ValueError(f"no prompt of {n_tokens} tokens: its beginning has {n}")
        return text
