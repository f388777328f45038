"""What the application does whatever the dialect: bodies, bounds and guards."""

from __future__ import annotations

import threading

import pytest
import trio
import trio.testing

from tests.server.client import post, request, serving
from tests.server.fake_engine import DONE, FakeEngine
from trio_runner.server import intake
from trio_runner.server.dialects.runner import requests, responses


async def test_bodies_share_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is small enough, but all together are too much. A request returns its share however it ends."""
    monkeypatch.setattr(intake, "MAX_BYTES", 1000)
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"
    body = b'{"content":"a"}'.ljust(900)
    engine = FakeEngine()
    async with serving(engine) as server:
        first = await server.connect()
        await first.stream.send_all(head + body[:600])
        await trio.testing.wait_all_tasks_blocked(0.01)
        second = await server.connect()
        refusal = await second.ask(head + body[:600])
        assert (refusal.status, refusal.headers["retry-after"]) == (503, "1")
        assert refusal.body == b"too many requests with large bodies\n"
        # There is room for a small one beside the first, which can still be ended.
        assert (await server.ask(post("/tokenize", {"content": "b"}))).json == {"tokens": [98]}
        await first.stream.send_all(body[600:])
        assert (await first.answer()).json == {"tokens": [97]}

        gone = await server.connect()
        await gone.stream.send_all(head + body[:600])
        await trio.testing.wait_all_tasks_blocked(0.01)
        gone.reset()
        answer = await server.ask(head + body)
        while answer.status == 503:  # until the server has heard of the one that left
            answer = await server.ask(head + body)
        assert answer.json == {"tokens": [97]}


async def test_a_body_counts_until_its_answer_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_BYTES", 1000)
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(post("/completion", {"prompt": "x" * 900}))
        generation = await engine.asked()
        await client.head()
        assert (await server.ask(post("/tokenize", {"content": "x" * 200}))).status == 503
        generation.say(DONE)
        await client.chunks()
        answer = await server.ask(post("/tokenize", {"content": "x" * 200}))
        while answer.status == 503:
            answer = await server.ask(post("/tokenize", {"content": "x" * 200}))
        assert answer.status == 200


async def test_a_large_body_is_parsed_while_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = requests.tokenize
    answered = threading.Event()

    def parse_slowly(body: bytes) -> tuple[str, bool, bool]:
        if len(body) > 1 << 18:
            assert answered.wait(5), "nobody else was served"
        return parse(body)

    monkeypatch.setattr(requests, "tokenize", parse_slowly)
    async with serving(FakeEngine()) as server:
        large = await server.connect()
        await large.stream.send_all(post("/tokenize", {"content": "x" * (1 << 19)}))
        for _ in range(3):
            assert (await server.ask(request("GET", "/health"))).status == 200
            assert (await server.ask(post("/tokenize", {"content": "a"}))).json == {"tokens": [97]}
        answered.set()
        assert len((await large.answer()).json["tokens"]) == 1 << 19

        wrong = await server.ask(post("/tokenize", {"content": 1, "unknown": "x" * (1 << 19)}))
        assert (wrong.status, b"content must be a string" in wrong.body) == (400, True)


async def test_a_body_that_would_take_long_to_parse_is_refused() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        body = b'{"prompt":"x","unknown":[' + b"[]," * 2_700_000 + b"0]}"
        refusal = await server.ask(request("POST", "/completion", body))
        assert refusal.status == 400
        assert refusal.body == b"the body has 2700005 lists, objects and strings, but at most 65536 are allowed\n"
        assert not engine.calls


async def test_a_long_answer_is_written_while_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def write_slowly(text: str) -> bytes:
        assert answered.wait(5), "nobody else was served"
        return b"done"

    monkeypatch.setattr(responses, "content_line", write_slowly)
    monkeypatch.setattr(responses, "tokens_line", lambda tokens: write_slowly(""))
    async with serving(FakeEngine()) as server:
        for path, fields in (("/detokenize", {"tokens": [97] * 40_000}), ("/tokenize", {"content": "a" * 40_000})):
            answered.clear()
            large = await server.connect()
            await large.stream.send_all(post(path, fields))
            for _ in range(3):
                assert (await server.ask(request("GET", "/health"))).status == 200
            answered.set()
            assert (await large.answer()).body == b"done"


async def test_a_body_may_come_in_chunks_and_with_any_content_type() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Type: x/y\r\n\r\n"
        answer = await client.ask(head + b'7\r\n{"conte\r\n8\r\nnt":"a"}\r\n0\r\n\r\n')
        assert answer.body == b'{"tokens":[97]}\n'


async def test_a_body_that_is_too_large_is_refused() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        for size in (99999999999999, 9 << 20):
            answer = await server.ask(
                b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n{" % size
            )
            assert (answer.status, b"8388608 bytes" in answer.body) == (413, True)
        text = await server.ask(post("/completion", {"prompt": "x" * (5 << 20)}))
        assert (text.status, b"prompt has 5242880 bytes" in text.body) == (400, True)
        assert engine.calls == []


async def test_expect_100_continue() -> None:
    async with serving(FakeEngine()) as server:
        client = await server.connect()
        await client.stream.send_all(
            b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\nExpect: 100-continue\r\n\r\n"
        )
        assert (await client.head())[0] == 100
        assert (await client.ask(b'{"content":"a"}')).body == b'{"tokens":[97]}\n'


async def test_host_and_origin() -> None:
    engine = FakeEngine()
    page = "http://localhost:3000"
    async with serving(engine, allowed_hosts=["my.box"], allowed_origins=[page]) as server:
        tokenize = b'{"content":"a"}'
        for host, status in (("evil.example", 403), ("my.box:1", 200), ("127.0.0.1:8080", 200), ("", 403)):
            assert (await server.ask(request("POST", "/tokenize", tokenize, host=host))).status == status
        assert (await server.ask(request("POST", "/tokenize", tokenize, "Origin: null"))).status == 403
        answer = await server.ask(request("POST", "/tokenize", tokenize, f"Origin: {page}"))
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, page)
        assert "access-control-allow-origin" not in (await server.ask(request("POST", "/tokenize", tokenize))).headers
        preflight = "Access-Control-Request-Method: POST"
        assert (await server.ask(request("OPTIONS", "/x", b"", "Origin: http://a", preflight))).status == 403
        assert len(engine.calls) == 4


async def test_scripts_of_an_allowed_origin() -> None:
    async with serving(FakeEngine(), api_key="s3cret", allowed_origins=["app://-"]) as server:
        preflight = ["Origin: app://-", "Access-Control-Request-Method: POST"]
        answer = await server.ask(request("OPTIONS", "/completion", b"", *preflight))
        assert (answer.status, answer.headers["access-control-allow-methods"]) == (204, "DELETE, GET, HEAD, POST")
        assert answer.headers["access-control-allow-origin"] == "app://-"
        assert "access-control-allow-headers" not in answer.headers
        wanted = "Access-Control-Request-Headers: authorization,x-stainless-os,cookie"
        answer = await server.ask(request("OPTIONS", "/completion", b"", *preflight, wanted))
        assert answer.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
        # A script may read that it was refused, and when to come back.
        answer = await server.ask(request("POST", "/tokenize", b"{}", "Origin: app://-"))
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (401, "app://-")
        assert answer.headers["access-control-expose-headers"] == "retry-after, x-request-id, x-should-retry"
        answer = await server.ask(request("POST", "/tokenize", b"{}", "Origin: https://evil"))
        assert (answer.status, "access-control-allow-origin" in answer.headers) == (403, False)


async def test_a_wrong_origin_is_a_mistake_of_the_caller() -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="without a path"), flatten_subgroups=True):
        async with serving(FakeEngine(), allowed_origins=["http://localhost:3000/app"]):
            raise AssertionError("it serves")


async def test_the_front_page() -> None:
    async with serving(FakeEngine(), api_key="s3cret") as server:
        for accept in ((), ("Accept: */*",), ("Accept: application/json",), ("Accept: text/html;q=0, */*",)):
            answer = await server.ask(request("GET", "/", b"", *accept))
            assert (answer.status, answer.body) == (200, b"Ollama is running")
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        answer = await server.ask(request("HEAD", "/"))
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "17")
        answer = await server.ask(request("GET", "/", b"", "Accept: text/html,application/xhtml+xml,*/*;q=0.8"))
        assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert b'<a href="/docs">' in answer.body
        assert b'<a href="/health">' in answer.body
        assert (await server.ask(request("GET", "/", host="evil.example"))).status == 403
        assert (await server.ask(request("GET", "/", b"", "Origin: null"))).status == 403
        for method in ("POST", "DELETE"):
            answer = await server.ask(request(method, "/", b"", "X-Api-Key: s3cret"))
            assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


async def test_api_key() -> None:
    async with serving(FakeEngine(), api_key="s3cret") as server:
        tokenize = b'{"content":"a"}'
        answer = await server.ask(request("POST", "/tokenize", tokenize))
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert (await server.ask(request("POST", "/tokenize", tokenize, "Authorization: Bearer s3cret"))).status == 200
        assert (await server.ask(request("POST", "/tokenize", tokenize, "X-Api-Key: s3cret"))).status == 200
        assert (await server.ask(request("POST", "/tokenize", tokenize, "X-Api-Key: secret"))).status == 401
        assert (await server.ask(request("GET", "/health"))).status == 200
