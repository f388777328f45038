"""Answers that begin with their prompt, and tell how probable it was."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.client import Server, post, serving
from trio_runner.events import SampledToken
from trio_runner.front_door import open_engine
from trio_runner.server.dialects.openai.logprobs import TextOffsets, first_of_prompt
from trio_runner.testing import ToyLoader, toy_score, toy_text

PROMPT = "abcd\u00e9f"


async def answer(server: Server, **fields: Any) -> Any:
    reply = await server.ask(post("/v1/completions", {"prompt": PROMPT, "temperature": 0, **fields}))
    assert reply.status == 200, reply.body
    return reply.json


@pytest.mark.parametrize("prompt", [PROMPT, list(PROMPT.encode())])
async def test_the_tokens_of_the_prompt_come_first(prompt: str | list[int]) -> None:
    async with open_engine(ToyLoader()) as engine, serving(engine) as server:
        told = await answer(server, prompt=prompt, max_tokens=2, echo=True, logprobs=1, n=2)
    tokens = list(PROMPT.encode())
    scores = [toy_score(tokens[:place], token, 1) for place, token in enumerate(tokens)][1:]
    for choice in told["choices"]:
        assert choice["text"] == PROMPT + toy_text(PROMPT, 2)
        logprobs = choice["logprobs"]
        assert len({len(column) for column in logprobs.values()}) == 1
        assert logprobs["tokens"][:7] == ["a", "b", "c", "d", "bytes:\\xc3", "bytes:\\xa9", "f"]
        assert logprobs["text_offset"][:7] == [0, 1, 2, 3, 4, 4, 5]
        assert logprobs["token_logprobs"][:7] == [None, *(max(score.logprob, -9999.0) for score in scores)]
        assert logprobs["top_logprobs"][0] is None
        assert len(logprobs["tokens"]) - 7 in (1, 2)


async def test_a_prompt_is_scored_without_an_answer() -> None:
    async with open_engine(ToyLoader()) as engine, serving(engine) as server:
        await answer(server, max_tokens=2)
        told = await answer(server, max_tokens=0, echo=True, logprobs=0)
        assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    (choice,) = told["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert len(choice["logprobs"]["tokens"]) == len(PROMPT.encode())
    assert choice["logprobs"]["top_logprobs"] is None


@pytest.mark.parametrize(
    ("pieces", "first"),
    [
        ([b"b", b"c"], b"a"),
        ([b"a", b"b", b"c"], b""),  # before them was BOS
        ([b" a", b"b", b"c"], b""),  # a tokenizer that puts a space before the text
    ],
)
def test_the_first_token_is_what_the_others_leave(pieces: list[bytes], first: bytes) -> None:
    tokens = [SampledToken(number, piece, -1.0) for number, piece in enumerate(pieces)]
    assert first_of_prompt("abc", tokens) == first
    written = TextOffsets(0).logprobs(tokens, first=first)
    assert written.tokens == [*([first.decode()] if first else []), *(piece.decode() for piece in pieces)]
    assert written.token_logprobs == [*([None] if first else []), *[-1.0] * len(pieces)]
