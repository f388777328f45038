"""The paths, over real sockets."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.server.client import post, request, serving
from tests.server.fake_engine import DONE, FakeEngine, FakeGeneration
from tests.server.malformed import malformed
from trio_runner.errors import EngineBroken, EngineBusy, EngineClosed, InvalidGrammar, LoadError
from trio_runner.events import PromptProgress, SampledToken, TextPiece, TokenInfo
from trio_runner.info import EngineStatistics, SchedulerStatistics
from trio_runner.request import EmbedRequest, GenerateRequest, RerankRequest
from trio_runner.server import intake, runner_api
from trio_runner.server.body import EventBody

PIECE = b'"stop":false,"timings":{"predicted_n":0,"predicted_ms":0,"prompt_n":0,"prompt_ms":0}}\n'
END = (
    b'{"content":"","stop":true,'
    b'"timings":{"predicted_n":5,"predicted_ms":250,"prompt_n":3,"prompt_ms":12,"cache_n":1}}\n'
)


async def test_completion_streams_one_line_per_piece() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(post("/completion", {"prompt": "The capital of France is", "n_predict": 8}))
        generation = await engine.asked()
        assert (generation.request.prompt, generation.request.max_tokens) == ("The capital of France is", 8)
        status, headers = await client.head()
        assert (status, headers["content-type"]) == (200, "application/json")
        assert headers["transfer-encoding"] == "chunked"
        assert "server" not in headers
        generation.say(PromptProgress(1, 2, 0), " Paris")
        assert await client.chunk() == b'{"content":" Paris",' + PIECE
        generation.say(".", "\n", DONE)  # what arrives together leaves together
        assert await client.chunk() == b'{"content":".",' + PIECE + b'{"content":"\\n",' + PIECE + END
        assert await client.chunk() == b""
        await generation.closed.wait()


async def test_errors_before_the_stream_are_plain_text() -> None:
    engine = FakeEngine()
    cases = [
        (EngineBusy(retry_after=2), 503, b"Failed to load cache: no available cache slots\n"),
        (InvalidGrammar("no root"), 400, b"Failed to create new sequence: grammar: no root\n"),
        (EngineClosed("the engine is shutting down"), 503, b"the engine is shutting down\n"),
        (EngineBroken("the decode thread died"), 503, b"the decode thread died\n"),
        (LoadError("not a GGUF file", path="m"), 500, b"m: not a GGUF file\n"),
    ]
    async with serving(engine) as server:
        client = await server.connect()
        for path, fields in (("/completion", {"prompt": "x"}), ("/embedding", {"content": "x"})):
            for error, status, body in cases:
                engine.refusal = error
                answer = await client.ask(post(path, fields))
                assert (answer.status, answer.body) == (status, body)
                assert answer.headers["content-type"] == "text/plain; charset=utf-8"
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers.get("retry-after") == ("2" if isinstance(error, EngineBusy) else None)
        for generation in engine.generations:
            await generation.closed.wait()


async def test_errors_in_the_stream_are_its_last_line() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        for error, text in ((EngineBroken("it died"), "it died"), (KeyError("secret"), "internal error")):
            await client.stream.send_all(post("/completion", {"prompt": "x"}))
            generation = await engine.asked()
            generation.say("a")
            generation.fail(error)
            answer = await client.answer()
            assert [line.get("content") for line in answer.lines] == ["a", ""]
            assert answer.lines[-1]["error"] == text
            assert answer.lines[-1]["stop"] is True


async def test_what_is_not_on_its_way_has_not_been_read() -> None:
    """For a reader that takes a little now and then is not one that has stalled."""
    generation = FakeGeneration(FakeEngine(), GenerateRequest(prompt="x"))
    generation.say(*(TextPiece("word " * 1000) for _ in range(60)))
    body = EventBody(generation, runner_api.CompletionLines())  # type: ignore[arg-type]
    n_written = 0
    while n_written < 60:
        n_written += (await anext(body)).count(b'"stop":')
        assert n_written + len(generation._events) == 60


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
        assert lines == [runner_api.CompletionLines().event(piece) for piece in pieces]
        assert (b"it died" in last) == (error is not None)
        await generation.closed.wait()


async def test_embedding() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        answer = await client.ask(post("/embedding", {"content": "x"}))
        assert answer.body == b'{"embedding":[0.1,-2.0,1e-07]}\n'
        assert answer.headers["content-type"] == "application/json"
        answer = await client.ask(post("/embedding", {"content": ["x", "y"], "dimensions": 3}))
        assert answer.body == b'{"embeddings":[[0.1,-2.0,1e-07],[0.1,-2.0,1e-07]]}\n'
        assert answer.headers["content-type"] == "application/json"
        assert engine.calls[1:] == [EmbedRequest(content=text, dimensions=3) for text in "xy"]
        engine.vector[1] = float("nan")
        for content in ("x", ["x"]):
            answer = await client.ask(post("/embedding", {"content": content}))
            assert (answer.status, answer.headers["content-type"]) == (500, "text/plain; charset=utf-8")


async def test_rerank() -> None:
    engine = FakeEngine()
    engine.scores = [-0.5, 2, 0.25]
    async with serving(engine) as server:
        client = await server.connect()
        answer = await client.ask(post("/rerank", {"query": "q", "documents": ["a", "b", "c"], "top_n": 2}))
        assert answer.body == (b'{"results":[{"index":1,"relevance_score":2},{"index":2,"relevance_score":0.25}]}\n')
        assert answer.headers["content-type"] == "application/json"
        assert engine.calls == [RerankRequest(query="q", documents=("a", "b", "c"))]
        engine.scores[1] = float("inf")
        answer = await client.ask(post("/rerank", {"query": "q", "documents": ["a", "b", "c"]}))
        assert (answer.status, answer.body) == (500, b"a score is not finite\n")


async def test_adapters(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with serving(engine, adapter_dir=tmp_path) as server:
        client = await server.connect()
        answer = await client.ask(request("GET", "/adapters"))
        assert answer.body == b'{"adapters":[{"name":"one","file":"one.gguf","scale":0.5}]}\n'
        assert answer.headers["content-type"] == "application/json"
        answer = await client.ask(post("/adapters", {"file": "a.gguf", "name": "b", "scale": 2}))
        assert answer.body == b'{"name":"b","file":"a.gguf","scale":2}\n'
        assert engine.calls[-2:] == ["wait_ready", (tmp_path / "a.gguf", "b", 2.0)]
        answer = await client.ask(request("DELETE", "/adapters/b%20"))
        assert answer.body == b'{"name":"b ","file":"x.gguf","scale":1}\n'
        assert engine.calls[-2:] == ["wait_ready", "b "]
        engine.load_error = LoadError(f"no such file: {tmp_path}/a.gguf", path=str(tmp_path / "a.gguf"))
        answer = await client.ask(post("/adapters", {"file": "a.gguf"}))
        assert (answer.status, answer.body) == (422, b"file: a.gguf: no such file: a.gguf\n")
        engine.refusal = LoadError("no such file", path="model.gguf")
        for raw in (
            post("/adapters", {"file": "a.gguf"}),
            request("GET", "/adapters"),
            request("DELETE", "/adapters/b"),
        ):
            answer = await client.ask(raw)
            assert (answer.status, answer.body) == (500, b"model.gguf: no such file\n")


async def test_tokenize_and_detokenize() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        assert (await client.ask(post("/tokenize", {"content": "ab"}))).body == b'{"tokens":[97,98]}\n'
        assert (await client.ask(post("/detokenize", {"tokens": [97, 60]}))).body == b'{"content":"a\\u003c"}\n'
        assert engine.calls == [("ab", False, True), (97, 60)]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "FOO", "get"])
async def test_health_by_any_method(method: str) -> None:
    async with serving(FakeEngine()) as server:
        answer = await server.ask(request(method, "/health"))
        assert (answer.status, answer.body) == (200, b'{"status":"ok","progress":1}\n')


async def test_health_by_head() -> None:
    async with serving(FakeEngine()) as server:
        client = await server.connect()
        assert (await client.ask(request("HEAD", "/health"))).status == 200
        assert (await client.ask(request("GET", "/health?x=%ff"))).json["status"] == "ok"


@pytest.mark.parametrize("path", ["/", "/health/", "/Health", "/embeddings", "/completion/x", "/%2e%2e", "/é?"])
async def test_other_paths_are_not_found(path: str) -> None:
    async with serving(FakeEngine()) as server:
        for method in ("GET", "POST", "HEAD", "OPTIONS"):
            raw = request(method, path.replace("é", "%C3%A9"))
            answer = await server.ask(raw)
            assert answer.status == 404
            assert answer.body == (b"" if method == "HEAD" else b"404 page not found\n")
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        *[(path, "POST") for path in ("/completion", "/embedding", "/tokenize", "/detokenize", "/rerank")],
        ("/props", "GET"),
        ("/statistics", "GET"),
        ("/adapters", "GET, POST"),
        ("/adapters/x", "DELETE"),
    ],
)
async def test_other_methods_are_not_allowed(path: str, allowed: str, tmp_path: Path) -> None:
    engine = FakeEngine()
    async with serving(engine, adapter_dir=tmp_path) as server:
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "FOO"} - {*allowed.split(", ")}:
            answer = await server.ask(request(method, path))
            assert (answer.status, answer.body, answer.headers["allow"]) == (405, b"Method Not Allowed\n", allowed)
        assert (await server.ask(request("OPTIONS", path))).headers["allow"].split(", ") != []
        assert engine.calls == []


async def test_statistics() -> None:
    engine = FakeEngine()
    engine.snapshot = EngineStatistics(
        "ready",
        4,
        9,
        SchedulerStatistics(3, 2, 1, 5, 700, n_batches=80, n_aborted=6, n_prompt_rows=900, n_sampled=60),
        images_encoded=8,
        images_found=30,
        image_bytes=5000,
    )
    async with serving(engine) as server:
        answer = await server.ask(request("GET", "/statistics"))
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert answer.body == (
            b'{"status":"ok","slots":4,"running":2,"waiting":3,"paused":1,"preempted":5,"cached_tokens":700,'
            b'"generations":9,"batches":80,"aborted":6,"prompt_rows":900,"sampled":60,'
            b'"images_encoded":8,"images_found":30,"image_bytes":5000}\n'
        )
    async with serving(engine, api_key="s3cret") as server:
        assert (await server.ask(request("GET", "/statistics"))).status == 401


async def test_bodies_share_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is small enough, all together are too much; what one held it gives back, however it ends."""
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
    parse = runner_api.tokenize
    answered = threading.Event()

    def parse_slowly(body: bytes) -> tuple[str, bool, bool]:
        if len(body) > 1 << 18:
            assert answered.wait(5), "nobody else was served"
        return parse(body)

    monkeypatch.setattr(runner_api, "tokenize", parse_slowly)
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


async def test_what_would_take_long_to_parse_is_refused() -> None:
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

    monkeypatch.setattr(runner_api, "content_line", write_slowly)
    monkeypatch.setattr(runner_api, "tokens_line", lambda tokens: write_slowly(""))
    async with serving(FakeEngine()) as server:
        for path, fields in (("/detokenize", {"tokens": [97] * 40_000}), ("/tokenize", {"content": "a" * 40_000})):
            answered.clear()
            large = await server.connect()
            await large.stream.send_all(post(path, fields))
            for _ in range(3):
                assert (await server.ask(request("GET", "/health"))).status == 200
            answered.set()
            assert (await large.answer()).body == b"done"


async def test_malformed_requests_change_nothing(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with serving(engine, deadline=60, adapter_dir=tmp_path) as server:
        client = await server.connect()
        for path, body, name in malformed():
            answer = await client.ask(request("POST", path, body) if body else EMPTY_POST % path.encode())
            assert answer.status in (400, 422), body[:80]
            assert name in answer.body.decode(), body[:80]
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert engine.calls == []
        assert engine.generations == []


EMPTY_POST = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"


async def test_a_body_may_come_in_chunks_and_with_any_content_type() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Type: x/y\r\n\r\n"
        answer = await client.ask(head + b'7\r\n{"conte\r\n8\r\nnt":"a"}\r\n0\r\n\r\n')
        assert answer.body == b'{"tokens":[97]}\n'


async def test_a_body_that_is_too_large() -> None:
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


async def test_health_while_everything_waits(tmp_path: Path) -> None:
    """While the model loads, and with every kind of request waiting for it."""
    engine = FakeEngine()
    engine.status, engine.progress, engine.admitting = "loading", 0.25, trio.Event()
    engine.scores = [1.0]
    async with serving(engine, adapter_dir=tmp_path) as server:
        waiting = [
            post("/completion", {"prompt": "x"}),
            post("/embedding", {"content": "x"}),
            post("/embedding", {"content": ["x"]}),
            post("/rerank", {"query": "x", "documents": ["y"]}),
            post("/tokenize", {"content": "x"}),
            post("/detokenize", {"tokens": [97]}),
            request("GET", "/adapters"),
            post("/adapters", {"file": "x"}),
            request("DELETE", "/adapters/x"),
        ]
        clients = [await server.connect() for _ in waiting]
        for client, raw in zip(clients, waiting, strict=True):
            await client.stream.send_all(raw)
        generation = await engine.asked()
        for _ in range(5):
            with trio.fail_after(0.2):
                answer = await server.ask(request("GET", "/health"))
            assert answer.body == b'{"status":"loading model","progress":0.25}\n'
        engine.status, engine.progress = "ready", 1.0
        engine.admitting.set()
        generation.say(DONE)
        for client in clients:
            assert (await client.answer()).status == 200


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
        answer = await server.ask(request("OPTIONS", "/completion", b"", f"Origin: {page}", preflight))
        assert (answer.status, answer.headers["access-control-allow-methods"]) == (204, "DELETE, GET, POST")
        assert (await server.ask(request("OPTIONS", "/x", b"", "Origin: http://a", preflight))).status == 403
        assert len(engine.calls) == 4


async def test_api_key() -> None:
    async with serving(FakeEngine(), api_key="s3cret") as server:
        tokenize = b'{"content":"a"}'
        answer = await server.ask(request("POST", "/tokenize", tokenize))
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert (await server.ask(request("POST", "/tokenize", tokenize, "Authorization: Bearer s3cret"))).status == 200
        assert (await server.ask(request("GET", "/health"))).status == 200
