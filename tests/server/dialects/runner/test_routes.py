"""The paths of the runner's dialect, over real sockets."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.server.client import post, request, serving
from tests.server.dialects.runner.malformed import malformed
from tests.server.fake_engine import DONE, FakeEngine
from trio_runner.errors import EngineBroken, EngineBusy, EngineClosed, EngineLoading, InvalidGrammar, LoadError
from trio_runner.events import PromptProgress
from trio_runner.info import EngineStatistics, SchedulerStatistics
from trio_runner.request import EmbedRequest, RerankRequest

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
        (EngineLoading("the model is still loading", retry_after=2), 503, b"the model is still loading\n"),
        (EngineBusy(retry_after=2), 503, b"Failed to load cache: no available cache slots\n"),
        (InvalidGrammar("no root"), 400, b"Failed to create new sequence: grammar: no root\n"),
        (EngineClosed("the engine is shutting down"), 503, b"the engine is shutting down\n"),
        (EngineBroken("the decode thread died"), 503, b"the decode thread died\n"),
        (LoadError("not a GGUF file", path="m"), 503, b"m: not a GGUF file\n"),
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
            assert (answer.status, answer.body) == (503, b"model.gguf: no such file\n")


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


@pytest.mark.parametrize("path", ["/health/", "/Health", "/embeddings", "/completion/x", "/%2e%2e", "/é?"])
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
        *[(path, "OPTIONS, POST") for path in ("/completion", "/embedding", "/tokenize", "/detokenize", "/rerank")],
        ("/props", "GET, HEAD, OPTIONS"),
        ("/statistics", "GET, HEAD, OPTIONS"),
        ("/adapters", "GET, HEAD, OPTIONS, POST"),
        ("/adapters/x", "DELETE, OPTIONS"),
    ],
)
async def test_other_methods_are_not_allowed(path: str, allowed: str, tmp_path: Path) -> None:
    engine = FakeEngine()
    async with serving(engine, adapter_dir=tmp_path) as server:
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "FOO"} - {*allowed.split(", ")}:
            answer = await server.ask(request(method, path))
            assert (answer.status, answer.body, answer.headers["allow"]) == (405, b"Method Not Allowed\n", allowed)
        options = await server.ask(request("OPTIONS", path))
        assert sorted(options.headers["allow"].split(", ")) == allowed.split(", ")
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
