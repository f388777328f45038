"""Servers are recognised at their URLs."""

from __future__ import annotations

import pytest

from tests.bench.fake_server import END_TOKEN, fake_server
from tests.engine.toys import Toy, prompts
from tests.server.client import serving
from trio_runner.bench.dialects import DIALECTS, DialectName, Request, Runner, Total
from trio_runner.bench.server import Unavailable, meet, parse_url
from trio_runner.testing import toy_text


@pytest.mark.parametrize("dialect", list(DIALECTS))
async def test_a_server_is_recognised(dialect: DialectName) -> None:
    async with fake_server(dialect, slots=3) as (_, known):
        server = await meet(known.url)
    is_openai = dialect in ("openai", "openai-chat")
    assert server.dialect.name == ("openai" if is_openai else dialect)
    assert server.slots == (4 if is_openai else 3)
    assert server.tokenizes != is_openai
    assert server.dialect.model == ("fake" if is_openai else "")
    assert server.is_ours == (dialect == "runner")
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


PATHS: dict[DialectName, str] = {
    "runner": "/completion",
    "llama": "/llama/completion",
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}


@pytest.mark.parametrize(("dialect", "path"), PATHS.items())
async def test_our_server_is_asked_in_each_of_its_dialects(dialect: DialectName, path: str) -> None:
    """The real server answers each request to its end, and reports the same numbers of tokens."""
    toy = Toy()
    toy.info = {"chat_template": "{{ messages[0].content }}"}
    prompt = prompts(1, 40)[0]
    async with toy.engine(slots=2) as engine, serving(engine) as served:
        server = await meet(f"http://{served.host}:{served.port}", dialect, slots=2)
        assert server.is_ours
        assert server.dialect.path == path
        for stream in (True, False):
            found = await server.complete(Request(prompt=prompt, max_tokens=9, stream=stream, reuse=True))
            assert found.text == toy_text(prompt, 9)
            assert found.total == Total(len(prompt), 10 if stream else 1, 9)
        await server.quiet()
        held = await server.held()
        assert (len(held), {*held.values()}) == (3, {0})
