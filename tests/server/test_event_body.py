"""The body of a streamed answer: what it takes from its generation, and in which chunks."""

from __future__ import annotations

import pytest

from tests.server.client import post, serving
from tests.server.fake_engine import DONE, FakeEngine, FakeGeneration
from trio_runner.errors import EngineBroken
from trio_runner.events import SampledToken, TextPiece, TokenInfo
from trio_runner.request import GenerateRequest
from trio_runner.server.dialects.runner import responses
from trio_runner.server.event_body import EventBody


async def test_no_event_is_taken_before_it_can_be_sent() -> None:
    """Events that are taken count as read, and a client that reads a little now and then has not stalled."""
    generation = FakeGeneration(FakeEngine(), GenerateRequest(prompt="x"))
    generation.say(*(TextPiece("word " * 1000) for _ in range(60)))
    body = EventBody(generation, responses.CompletionLines())
    n_written = 0
    while n_written < 60:
        n_written += (await anext(body)).count(b'"stop":')
        assert n_written + len(generation.unread) == 60


@pytest.mark.parametrize("error", [None, EngineBroken("it died")])
async def test_a_long_backlog_leaves_in_small_chunks(error: EngineBroken | None) -> None:
    """All of it, in order, however it ends."""
    top = tuple(TokenInfo(token, b" word", -1.25) for token in range(100))
    pieces = [TextPiece(f" {i}", (SampledToken(i, b" word", -0.5, top),)) for i in range(60)]
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(post("/completion", {"prompt": "x", "logprobs": 100}))
        generation = await engine.asked()
        generation.say("first")
        await client.head()
        await client.chunk()
        if error is None:
            generation.say(*pieces, DONE)
        else:
            generation.say(*pieces)
            generation.fail(error)
        chunks = []
        while chunk := await client.chunk():
            chunks.append(chunk)
        assert max(map(len, chunks)) < 80_000
        assert all(len(chunk) > 1 << 16 for chunk in chunks[:-2])
        *lines, last = b"".join(chunks).splitlines(keepends=True)
        assert lines == [responses.CompletionLines().event(piece) for piece in pieces]
        assert (b"it died" in last) == (error is not None)
        await generation.closed.wait()


async def test_the_opening_is_sent_before_any_event() -> None:
    generation = FakeGeneration(FakeEngine(), GenerateRequest(prompt="x"))
    body = EventBody(generation, responses.CompletionLines(), opening=b": hello\n\n")
    assert await anext(body) == b": hello\n\n"
    generation.say("a")
    assert b'"content":"a"' in await anext(body)
