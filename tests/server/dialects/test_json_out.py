"""JSON that the server sends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.client import post, serving
from tests.server.fake_engine import FakeEngine
from trio_runner.events import Finished, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.server.dialects.json_out import unbroken

BREAKS = "a\u0085b\u2028c\u2029d\n\r\x0b\x0c\x1c\x1d\x1e"


def test_no_character_ends_a_line() -> None:
    encoded = unbroken(json.dumps(BREAKS, ensure_ascii=False).encode())
    assert json.loads(encoded) == BREAKS
    assert len(encoded.decode().splitlines()) == 1
    assert unbroken("é€😀".encode()) == "é€😀".encode()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "x", "stream": True, "logprobs": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True, "logprobs": True}),
        ("/api/generate", {"prompt": "x", "logprobs": True, "top_logprobs": 1}),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}),
        ("/llama/completion", {"prompt": "x", "stream": True, "n_probs": 1}),
    ],
)
async def test_clients_that_split_a_stream_at_every_line_break_read_it(path: str, fields: dict[str, Any]) -> None:
    """As httpx does, and with it Ollama's client for Python."""
    piece = BREAKS.encode()
    tokens = (SampledToken(1, piece, -1.0, (TokenInfo(1, piece, -1.0),)),)
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(post(path, fields))
        generation = await engine.asked()
        generation.say(TextPiece(BREAKS, tokens), Finished("stop", Usage(), stop=BREAKS, tokens=tokens))
        body = (await client.answer()).body.decode()
    lines = [line.removeprefix("data: ") for line in body.splitlines()]
    parts = [json.loads(line) for line in lines if line and not line.startswith(":") and line != "[DONE]"]
    assert json.dumps(BREAKS) in json.dumps(parts)
