"""Servers are recognised at their URLs."""

from __future__ import annotations

import pytest

from tests.bench.fake_server import END_TOKEN, fake_server
from trio_runner.bench.dialects import DIALECTS, DialectName, Runner
from trio_runner.bench.server import Unavailable, meet, parse_url


@pytest.mark.parametrize("dialect", list(DIALECTS))
async def test_a_server_is_recognised(dialect: DialectName) -> None:
    async with fake_server(dialect, slots=3) as (_, known):
        server = await meet(known.url)
    assert server.dialect.name == dialect
    assert server.slots == (4 if dialect == "openai" else 3)
    assert server.tokenizes == (dialect != "openai")
    assert server.dialect.model == ("fake" if dialect == "openai" else "")
    assert server.address == known.address
    if isinstance(server.dialect, Runner):
        assert server.dialect.forbidden == (1, END_TOKEN)


async def test_a_url_without_a_server_is_unavailable() -> None:
    async with fake_server("runner") as (_, server):
        pass
    with pytest.raises(Unavailable, match="refused"):
        await meet(server.url)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080"),
        ("127.0.0.1:8080", "127.0.0.1:8080"),
        ("http://localhost/", "localhost:80"),
        ("http://[::1]:99", "[::1]:99"),
    ],
)
def test_urls_are_parsed(url: str, text: str) -> None:
    assert str(parse_url(url)) == text


@pytest.mark.parametrize("url", ["https://127.0.0.1", "http://", "http://127.0.0.1:x", "http://127.0.0.1/v1", ""])
def test_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"HOST|[Pp]ort"):
        parse_url(url)
