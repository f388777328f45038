"""Prompts have the exact number of tokens, and differ."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from trio_runner.bench.prompts import Prompts

COUNTERS: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "bytes": len,
    "pairs of bytes": lambda text: (len(text) + 1) // 2,
    "words after a begin token": lambda text: 1 + len(text.split()),
    "syllables": lambda text: sum(1 + len(word) // 4 for word in text.split()),
}


def prompts(name: str, seed: int = 1) -> Prompts:
    async def count(text: str) -> int:
        return COUNTERS[name](text)

    return Prompts(Random(seed), count)


@pytest.mark.parametrize("name", list(COUNTERS))
@pytest.mark.parametrize("n_tokens", [2, 16, 333])
async def test_the_number_of_tokens_is_exact(name: str, n_tokens: int) -> None:
    made = prompts(name)
    texts = [await made.make(n_tokens) for _ in range(3)]
    assert [COUNTERS[name](text) for text in texts] == [n_tokens] * 3


async def test_prompts_differ_and_can_be_repeated() -> None:
    made, again = prompts("words"), prompts("words")
    texts = [await made.make(50) for _ in range(3)]
    assert len(set(texts)) == 3
    assert [await again.make(50) for _ in range(3)] == texts


@pytest.mark.parametrize("name", list(COUNTERS))
async def test_a_prefix_is_shared(name: str) -> None:
    made = prompts(name)
    prefix = await made.make(40)
    texts = [await made.make(60, prefix=prefix) for _ in range(2)]
    assert all(text.startswith(prefix) and COUNTERS[name](text) == 60 for text in texts)
    assert texts[0] != texts[1]


async def test_a_prefix_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="its beginning has 5"):
        await prompts("words").make(4, prefix="one two three four five")


async def test_a_vocabulary_without_short_tokens_is_refused() -> None:
    async def count(text: str) -> int:
        return 3 * len(text.split())

    with pytest.raises(ValueError, match="stuck at 6"):
        await Prompts(Random(1), count).make(7)


async def test_without_a_tokenizer_a_word_is_a_token() -> None:
    made = Prompts(Random(1), None)
    prefix = await made.make(5)
    assert len(prefix.split()) == 5
    assert len((await made.make(9, prefix=prefix)).split()) == 9
