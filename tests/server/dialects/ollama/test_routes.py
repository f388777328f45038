"""The paths of Ollama's dialect, over real sockets."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import ollama
import pytest
import trio

from tests.server.client import WAYS, Answer, Leave, post, request, serving
from tests.server.dialects.ollama.malformed import malformed
from tests.server.fake_engine import DONE, FakeEngine, FakeGeneration
from trio_runner.errors import DecodeFailed, EngineBroken, EngineBusy, InvalidGrammar, PromptTooLong, RunnerError
from trio_runner.events import Event, PromptProgress
from trio_runner.info import Capabilities
from trio_runner.request import Chat, EmbedRequest
from trio_runner.server import event_body
from trio_runner.server.names import ModelNames

NAMES = ModelNames("fake", ("other:1b",))
USER = {"role": "user", "content": "x"}
GENERATE: dict[str, Any] = {"model": "fake", "prompt": "x"}
CHAT: dict[str, Any] = {"model": "fake", "messages": [USER]}
REQUESTS = [("/api/generate", GENERATE), ("/api/chat", CHAT)]


def timeless(body: bytes) -> bytes:
    """`body` without what differs each time: the time of day, and the durations that are measured here."""
    body = re.sub(rb'"created_at":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z"', b'"created_at":"?"', body)
    return re.sub(rb'"total_duration":\d+,"load_duration":\d+', b'"total_duration":1,"load_duration":0', body)


TAIL = (
    b'"done":true,"done_reason":"stop","total_duration":1,"load_duration":0,"prompt_eval_count":3,'
    b'"prompt_eval_duration":12900000,"eval_count":5,"eval_duration":250000000}\n'
)


async def test_generate_streams_one_line_per_piece() -> None:
    engine = FakeEngine()
    start = b'{"model":"fake","created_at":"?","response":'
    async with serving(engine, names=NAMES) as server:
        client = await server.connect()
        await client.stream.send_all(post("/api/generate", {**GENERATE, "options": {"num_predict": 8}}))
        generation = await engine.asked()
        assert generation.request.prompt == Chat(messages=(USER,))
        assert (generation.request.max_tokens, generation.request.cache_prompt) == (8, True)
        generation.say(PromptProgress(1, 2, 0), " Paris")
        status, headers = await client.head()
        assert (status, headers["content-type"]) == (200, "application/x-ndjson")
        assert timeless(await client.chunk()) == start + b'" Paris","done":false}\n'
        generation.say(".", DONE)  # what arrives together leaves together
        assert timeless(await client.chunk()) == start + b'".","done":false}\n' + start + b'"",' + TAIL
        assert await client.chunk() == b""
        await generation.closed.wait()


async def test_chat_streams_messages() -> None:
    engine = FakeEngine()
    start = b'{"model":"FAKE:latest","created_at":"?","message":{"role":"assistant","content":'
    async with serving(engine, names=NAMES) as server:
        client = await server.connect()
        await client.stream.send_all(post("/api/chat", {**CHAT, "model": "FAKE:latest"}))
        generation = await engine.asked()
        generation.say("a", DONE)
        assert timeless((await client.answer()).body) == start + b'"a"},"done":false}\n' + start + b'""},' + TAIL


async def test_whole_answers() -> None:
    engine = FakeEngine()
    async with serving(engine, names=NAMES) as server:
        client = await server.connect()
        for path, fields in REQUESTS:
            await client.stream.send_all(post(path, {**fields, "stream": False}))
            generation = await engine.asked()
            generation.say("a", "b", DONE)
            answer = await client.answer()
            assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
            assert answer.body.count(b"\n") == 1
            assert answer.json.get("response", answer.json.get("message", {}).get("content")) == "ab"
            assert timeless(answer.body).endswith(TAIL)
            await generation.closed.wait()


async def test_errors_before_the_answer() -> None:
    engine = FakeEngine()
    cases = [
        (EngineBusy(retry_after=2), 503, "the queue is full"),
        (InvalidGrammar("no root"), 400, "options.grammar: no root"),
        (PromptTooLong(9, 5, param="messages"), 400, "messages has 9 tokens, but at most 5 fit"),
        (EngineBroken("the decode thread died"), 503, "the decode thread died"),
        (RunnerError("odd"), 500, "odd"),
    ]

    async def ready(at_most: float | None = None) -> None: ...

    engine.wait_ready = ready  # type: ignore[method-assign]
    async with serving(engine, names=NAMES) as server:
        client = await server.connect()
        for path, fields in REQUESTS:
            for error, status, text in cases:
                engine.refusal = error
                answer = await client.ask(post(path, fields))
                text = text.replace("messages", "messages" if path == "/api/chat" else "prompt")
                assert (answer.status, answer.json) == (status, {"error": text})
                assert answer.headers["content-type"] == "application/json"
                assert answer.headers.get("retry-after") == ("2" if isinstance(error, EngineBusy) else None)


@pytest.mark.parametrize("stream", [True, False])
async def test_errors_in_the_answer(stream: bool) -> None:
    engine = FakeEngine()
    async with serving(engine, names=NAMES) as server:
        client = await server.connect()
        for path, fields in REQUESTS:
            await client.stream.send_all(post(path, {**fields, "stream": stream}))
            generation = await engine.asked()
            generation.say("a")
            generation.fail(DecodeFailed("no space"))
            answer = await client.answer()
            assert answer.lines[-1] == {"error": "decode failed: no space"}
            assert (answer.status, len(answer.lines)) == ((200, 2) if stream else (500, 1))
            await generation.closed.wait()


async def test_a_silent_stream_says_that_it_is_there_without_an_empty_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_body, "KEEP_ALIVE_SECONDS", 0.001)
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(post("/api/chat", CHAT))
        generation = await engine.asked()
        assert (await client.head())[0] == 200
        assert await client.chunk() == b" "
        generation.say(DONE)
        rest = await client.chunks()
        assert rest.strip(b" ").count(b"\n") == 1
        assert rest.lstrip(b" ").startswith(b'{"model":')


async def test_a_client_reads_past_what_a_silent_stream_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_body, "KEEP_ALIVE_SECONDS", 0.001)
    n_waits = 0
    wait = FakeGeneration.__anext__

    async def counted(generation: FakeGeneration) -> Event:
        nonlocal n_waits
        n_waits += 1
        return await wait(generation)

    monkeypatch.setattr(FakeGeneration, "__anext__", counted)
    engine = FakeEngine()
    async with serving(engine) as server, ollama.AsyncClient(host=f"http://{server.host}:{server.port}") as client:

        async def write() -> None:
            generation = await engine.asked()
            for text in ("a", "b", "c"):
                before = n_waits
                while n_waits < before + 3:  # noqa: ASYNC110  # two of these waits have ended with a sign of life
                    await trio.sleep(0.001)
                generation.say(text)
            generation.say(DONE)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            parts: Any = await client.chat("m", [USER], stream=True)
            assert "".join([part.message.content async for part in parts]) == "abc"


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_its_generation(leave: Leave, stream: bool) -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        for path, fields in REQUESTS:
            for begun in (True, False):
                client = await server.connect()
                await client.stream.send_all(post(path, {**fields, "stream": stream, "model": ""}))
                generation = await engine.asked()
                await generation.started.wait()
                if begun:
                    generation.say("a")
                    if stream:
                        await client.head()
                        await client.chunk()
                await leave(client)
                await generation.closed.wait()


async def test_other_models_are_not_found() -> None:
    engine = FakeEngine()
    paths = ["generate", "chat", "embed", "embeddings", "show", "pull"]
    async with serving(engine, names=NAMES) as server:
        for path in paths:
            answer = await server.ask(post(f"/api/{path}", {"model": "llama3"}))
            assert answer.status == 404
            assert answer.json["error"].startswith("model 'llama3' not found: this server has 'fake' or 'other:1b'")
        for name in ("fake", "fake:latest", "Fake", "other:1b", "", None):
            assert (await server.ask(post("/api/show", {"model": name}))).status == 200
    async with serving(engine, names=ModelNames("fake", any_model=True)) as server:
        assert (await server.ask(post("/api/show", {"model": "llama3"}))).status == 200


async def test_requests_that_generate_nothing() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        for path in ("/api/generate", "/api/chat"):
            for fields, reason in (({}, "load"), ({"keep_alive": 0}, "unload")):
                answer = await server.ask(post(path, {**fields, "stream": True}))
                assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
                assert (answer.json["done"], answer.json["done_reason"]) == (True, reason)
        assert (await server.ask(post("/api/embed", {}))).json["embeddings"] == []
        assert (await server.ask(post("/api/embeddings", {}))).json == {"embedding": []}
        assert engine.generations == []


async def test_embeddings() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        answer = await server.ask(post("/api/embed", {"model": "m", "input": ["a", "b"]}))
        assert timeless(answer.body) == (
            b'{"model":"m","embeddings":[[0.1,-2.0,1e-07],[0.1,-2.0,1e-07]],'
            b'"total_duration":1,"load_duration":0,"prompt_eval_count":6}\n'
        )
        assert engine.calls[-2:] == [EmbedRequest(content=c, normalize=True, truncate=True) for c in "ab"]
        assert (await server.ask(post("/api/embeddings", {"prompt": "a"}))).body == b'{"embedding":[0.1,-2.0,1e-07]}\n'
        assert engine.calls[-1] == EmbedRequest(content="a")


async def test_what_the_model_is(tmp_path: Path) -> None:
    path = tmp_path / "fake.gguf"
    path.write_bytes(b"GGUF")
    async with serving(FakeEngine(), names=NAMES, model_path=path) as server:
        tags = (await server.ask(request("GET", "/api/tags"))).json["models"]
        assert [(tag["name"], tag["size"]) for tag in tags] == [("fake:latest", 4), ("other:1b", 4)]
        shown = (await server.ask(post("/api/show", {"name": "fake"}))).json
        assert shown["modelfile"].startswith("FROM fake.gguf\n")
        assert str(tmp_path) not in str(shown)
        running = (await server.ask(request("GET", "/api/ps"))).json["models"]
        assert [(one["name"], one["digest"]) for one in running] == [("fake:latest", tags[0]["digest"])]
        version = (await server.ask(request("GET", "/api/version"))).json["version"]
        assert (0, 6, 4) <= tuple(map(int, version.split("."))) < (0, 13, 4)
        for name in ("tags", "version", "ps"):
            head = await server.ask(request("HEAD", f"/api/{name}"))
            assert (head.status, head.headers["content-type"]) == (200, "application/json")


async def test_a_file_that_is_gone_is_not_missed(tmp_path: Path) -> None:
    async with serving(FakeEngine(), model_path=tmp_path / "gone.gguf") as server:
        assert (await server.ask(request("GET", "/api/tags"))).json["models"][0]["size"] == 1500


async def test_while_the_model_loads() -> None:
    engine = FakeEngine()
    engine.status, engine.admitting = "loading", trio.Event()
    async with serving(engine) as server:
        assert (await server.ask(request("GET", "/api/ps"))).json == {"models": []}
        assert (await server.ask(request("GET", "/api/version"))).status == 200
        assert (await server.ask(post("/api/pull", {"stream": False}))).json == {"status": "success"}
        answers: list[Answer] = []

        async def ask(raw: bytes) -> None:
            answers.append(await server.ask(raw))

        async with trio.open_nursery() as nursery:
            for raw in (post("/api/generate", {}), request("GET", "/api/tags"), post("/api/embed", {"input": "x"})):
                nursery.start_soon(ask, raw)
            await server.ask(request("GET", "/health"))
            assert answers == []
            engine.status = "ready"
            engine.admitting.set()
        assert [answer.status for answer in answers] == [200] * 3


async def test_pull_and_what_this_server_does_not_do() -> None:
    async with serving(FakeEngine(), names=NAMES) as server:
        answer = await server.ask(post("/api/pull", {"model": "fake"}))
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert answer.lines == [{"status": "pulling manifest"}, {"status": "success"}]
        assert (await server.ask(post("/api/pull", {"model": "x"}))).json["error"].endswith("It fetches no other.")
        for method, path, verb in (
            ("POST", "/api/push", "push"),
            ("POST", "/api/create", "create"),
            ("POST", "/api/copy", "copy"),
            ("DELETE", "/api/delete", "delete"),
            ("POST", "/api/blobs/sha256:abc", "create"),
        ):
            answer = await server.ask(request(method, path, b"{}"))
            assert answer.status == 501
            assert answer.json["error"].endswith(f"it cannot {verb} models")
        for method, path, status in (("GET", "/api", 404), ("GET", "/api/nowhere", 404), ("GET", "/api/chat", 405)):
            answer = await server.ask(request(method, path))
            assert (answer.status, list(answer.json)) == (status, ["error"])


async def test_a_context_above_the_served_one_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.capabilities = Capabilities(n_slots=1, n_ctx=64, max_rows=32)
    async with serving(engine) as server:
        for num_ctx in (64, 65, 66):
            client = await server.connect()
            with caplog.at_level(logging.WARNING):
                await client.stream.send_all(post("/api/chat", {**CHAT, "options": {"num_ctx": num_ctx}}))
                generation = await engine.asked()
                assert generation.request.max_tokens == 640
                generation.say(DONE)
                await client.answer()
    assert ["65 tokens" in record.message for record in caplog.records if "num_ctx" in record.message] == [True]


async def test_malformed_requests_change_nothing() -> None:
    engine = FakeEngine()
    async with serving(engine, deadline=60) as server:
        client = await server.connect()
        for path, body, name in malformed():
            raw = (
                request("POST", path, body)
                if body
                else b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n" % path.encode()
            )
            answer = await client.ask(raw)
            assert answer.status == 400, body[:80]
            assert name in answer.json["error"], body[:80]
        assert engine.generations == []
        assert set(map(str, engine.calls)) <= {"wait_ready"}


async def test_the_thinking_of_a_model() -> None:
    engine = FakeEngine()
    template = "{{ '<think>' }}{{ '</think>' }}"
    engine.info = dataclasses.replace(engine.info, chat_template=template)
    async with serving(engine) as server:
        for said, text in (("x", "<think>a</think>b"), ("x<think>\n", "a</think>b")):
            for think, expected in ((True, ("a", "b")), (False, (None, text)), (None, (None, text))):
                client = await server.connect()
                await client.stream.send_all(
                    post("/api/chat", {"messages": [{**USER, "content": said}], "think": think, "stream": False})
                )
                (await engine.asked()).say(text, DONE)
                message = (await client.answer()).json["message"]
                assert (message.get("thinking"), message["content"]) == expected
