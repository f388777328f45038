"""The paths of llama-server's dialect, over real sockets."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.engine.toys import Toy
from tests.server.client import post, request, serving
from tests.server.dialects.llama_server.events import parts
from tests.server.dialects.llama_server.malformed import malformed
from tests.server.fake_engine import FakeEngine
from trio_runner.errors import EngineBroken, EngineBusy, InvalidGrammar, LoadError, Unsupported
from trio_runner.events import Finished, PromptProgress, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.request import EmbedRequest, RerankRequest
from trio_runner.server.dialects.llama_server.requests import completion
from trio_runner.server.dialects.llama_server.responses import CompletionState, whole_answer
from trio_runner.server.dialects.llama_server.results import scaled
from trio_runner.server.names import ModelNames

DONE = Finished("stop", Usage(3, 1, 5, 0.0125, 0.25))
TIMINGS = (
    b'"timings":{"cache_n":1,"prompt_n":2,"prompt_ms":12.5,"prompt_per_token_ms":6.25,"prompt_per_second":160.0,'
    b'"predicted_n":5,"predicted_ms":250.0,"predicted_per_token_ms":62.5,"predicted_per_second":16.0}'
)
END = (
    b'"tokens":[],"id_slot":-1,"stop":true,"model":"model","tokens_predicted":5,"tokens_evaluated":3,'
    b'"prompt":"x","has_new_line":true,"truncated":false,"stop_type":"eos","stopping_word":"","tokens_cached":7,'
)


def without_settings(body: bytes) -> bytes:
    begin = body.index(b'"generation_settings":')
    end = body.index(b'"prompt":', begin)
    json.loads(body[begin + len(b'"generation_settings":') : end - 1])
    return body[:begin] + body[end:]


async def test_a_whole_completion() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(post("/llama/completion", {"prompt": "x", "n_predict": 8}))
        generation = await engine.asked()
        assert (generation.request.prompt, generation.request.max_tokens) == ("x", 8)
        generation.say(PromptProgress(3, 3, 1), "a", "\n", DONE)
        answer = await client.answer()
        assert answer.headers["content-type"] == "application/json"
        assert without_settings(answer.body) == b'{"index":0,"content":"a\\n",' + END + TIMINGS + b"}"
        await generation.closed.wait()


async def test_a_stream_of_events() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(post("/llama/completions", {"prompt": "x", "stream": True}))
        generation = await engine.asked()
        assert (
            await client.head()
            == (
                200,
                {**(await_headers := {"content-type": "text/event-stream", "transfer-encoding": "chunked"})},
            )
            or await_headers
        )
        assert await client.chunk() == b":\n\n"
        generation.say(PromptProgress(3, 3, 1), "a")
        part = b'data: {"index":0,"content":"%b","stop":false,"id_slot":-1,"tokens_evaluated":3}\n\n'
        assert await client.chunk() == part % b"a"
        generation.say("\n", "<é>", DONE)  # what arrives together leaves together
        chunk = await client.chunk()
        begin = part % b"\\n" + part % "<é>".encode()
        assert chunk.startswith(begin)
        assert without_settings(chunk.removeprefix(begin)) == (
            b'data: {"index":0,"content":"",' + END + TIMINGS + b"}\n\n"
        )
        assert await client.chunk() == b""
        await generation.closed.wait()


TOP = (TokenInfo(97, b"a", -0.5), TokenInfo(195, b"\xc3", float("-inf")))


@pytest.mark.parametrize(
    ("fields", "bytes_of_part"),
    [
        ({"n_probs": 2, "post_sampling_probs": True}, b'"prob":0.6065306597126334,"top_probs":[{"id":97,"token":"a",'
         b'"bytes":[97],"prob":0.6065306597126334}]'),
        ({"n_probs": 2}, b'"logprob":-0.5,"top_logprobs":[{"id":97,"token":"a","bytes":[97],"logprob":-0.5},'
         b'{"id":195,"token":"","bytes":[195],"logprob":-3.4028234663852886e38}]'),
    ],
)  # fmt: skip
async def test_probabilities(fields: dict[str, Any], bytes_of_part: bytes) -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        for stream in (True, False):
            await client.stream.send_all(post("/llama/completion", {"prompt": "x", "stream": stream, **fields}))
            generation = await engine.asked()
            assert generation.request.sampling.logprobs == 2
            generation.say(TextPiece("a", (SampledToken(97, b"a", -0.5, TOP),)), DONE)
            answer = await client.answer()
            assert b'"completion_probabilities":[{"id":97,"token":"a","bytes":[97],' + bytes_of_part in answer.body
            assert answer.body.count(b"completion_probabilities") == 1


async def test_the_fields_that_a_request_names() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        names = ["timings/prompt_n", "content", "timings/nothing", "nothing/x", "content/x", "stop", "prompt", ""]
        names += ["generation_settings/n_predict", "generation_settings/lora/x", "timings/__class__", "__class__"]
        await client.stream.send_all(post("/llama/completion", {"prompt": "x", "response_fields": names}))
        (await engine.asked()).say("a", DONE)
        assert (await client.answer()).body == (
            b'{"timings/prompt_n":2,"content":"a","stop":true,"prompt":"x","generation_settings/n_predict":-1}'
        )


@pytest.mark.parametrize("n_probs", [1, 10, 100])
async def test_the_size_of_an_answer_is_known_before_it_is_written(n_probs: int) -> None:
    """So that a long one is written on another thread."""
    token = SampledToken(97, b"a", -0.5, (TokenInfo(97, b"a", -0.5),) * n_probs)
    report = completion(json.dumps({"prompt": "x", "n_probs": n_probs}).encode()).report
    state = CompletionState(index=0, report=report, model="m", prompt="x", max_tokens=None, started=0.0)
    for _ in range(100):
        state.take(TextPiece("abc", (token,)), 0.0)
    answer = whole_answer([(state, DONE)])
    assert len(answer) / 2 < state.n_bytes < len(answer) * 2
    assert len(json.loads(answer)["completion_probabilities"]) == 100


async def test_progress_is_sent_only_when_it_is_asked_for() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        for asked in (False, True):
            fields = {"prompt": "x", "stream": True, "return_progress": asked, "response_fields": ["stop"]}
            await client.stream.send_all(post("/llama/completion", fields))
            generation = await engine.asked()
            generation.say(PromptProgress(2, 3, 1), DONE)
            answer = await client.answer()
            wanted = b'"prompt_progress":{"total":3,"cache":1,"processed":2,"time_ms":'
            assert (wanted in answer.body) == asked
            assert answer.body.endswith(b'data: {"stop":true}\n\n')


async def test_a_stream_without_comments() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(
            post("/llama/completion", {"prompt": "x", "stream": True, "sse_ping_interval": -1})
        )
        (await engine.asked()).say("a", DONE)
        assert (await client.answer()).body.startswith(b"data: ")


async def test_errors_before_the_stream() -> None:
    engine = FakeEngine()
    cases = [
        (EngineBusy("the queue is full", retry_after=2), 503, "unavailable_error", "the queue is full"),
        (InvalidGrammar("no root"), 400, "invalid_request_error", "grammar: no root"),
        (EngineBroken("the decode thread died"), 503, "unavailable_error", "the decode thread died"),
        (LoadError("not a GGUF file", path="m"), 503, "unavailable_error", "m: not a GGUF file"),
        (Unsupported("images", "no images", param="prompt"), 400, "not_supported_error", "prompt[0]: no images"),
        (KeyError("secret"), 500, "server_error", "internal error"),
    ]
    async with serving(engine) as server:
        client = await server.connect()
        for error, status, kind, text in cases:
            engine.refusal = error
            for stream in (True, False):
                answer = await client.ask(post("/llama/completion", {"prompt": ["x", "y"], "stream": stream}))
                assert answer.status == status
                assert answer.json == {"error": {"code": status, "message": text, "type": kind}}
                assert answer.headers["content-type"] == "application/json"
                assert answer.headers.get("retry-after") == ("2" if isinstance(error, EngineBusy) else None)
        for generation in engine.generations:
            await generation.closed.wait()


async def test_errors_in_the_stream_are_its_last_event() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        for error, text, code, kind in (
            (EngineBroken("it died"), "it died", 503, "unavailable_error"),
            (KeyError("secret"), "internal error", 500, "server_error"),
        ):
            for stream in (True, False):
                await client.stream.send_all(post("/llama/completion", {"prompt": "x", "stream": stream}))
                generation = await engine.asked()
                generation.say("a")
                generation.fail(error)
                answer = await client.answer()
                wanted = {"error": {"code": code, "message": text, "type": kind}}
                assert (parts(answer)[-1] if stream else answer.json) == wanted
                assert answer.status == (200 if stream else code)


async def test_a_wrong_model_is_not_found() -> None:
    engine = FakeEngine()
    async with serving(engine, names=ModelNames("one", ("two",))) as server:
        client = await server.connect()
        for path, fields in MODELS.items():
            answer = await client.ask(post(path, {**fields, "model": "three"}))
            assert (answer.status, answer.json["error"]["type"]) == (404, "not_found_error")
            assert "three" in answer.json["error"]["message"]
        assert engine.calls == []
        await client.stream.send_all(post("/llama/completion", {"prompt": "x", "model": "two"}))
        (await engine.asked()).say(DONE)
        assert (await client.answer()).json["model"] == "one"


MODELS: dict[str, dict[str, Any]] = {
    "/llama/completion": {"prompt": "x"},
    "/llama/embedding": {"content": "x"},
    "/llama/rerank": {"query": "x", "documents": ["y"]},
}


async def test_embeddings() -> None:
    engine = FakeEngine()
    engine.vector = np.array([3.0, -4.0], np.float32)
    async with serving(engine) as server:
        client = await server.connect()
        for path in ("/llama/embedding", "/llama/embeddings"):
            answer = await client.ask(post(path, {"content": "x"}))
            assert answer.body == b'[{"index":0,"embedding":[[0.6,-0.8]]}]'
        answer = await client.ask(post("/llama/embedding", {"input": ["x", [1, 2], [3, "y"]], "embd_normalize": -1}))
        assert [entry["index"] for entry in answer.json] == [0, 1, 2]
        assert answer.json[0]["embedding"] == [[3, -4]]
        contents: list[Any] = ["x", (1, 2), (3, *b"y")]
        assert [call for call in engine.calls[-3:] if isinstance(call, EmbedRequest)] == [
            EmbedRequest(content=content) for content in contents
        ]


@pytest.mark.parametrize(
    ("norm", "vector"),
    [(-1, [3, -4, 0]), (0, [24570, -32760, 0]), (1, [3 / 7, -4 / 7, 0]), (2, [0.6, -0.8, 0]), (1000, [0.75, -1, 0])],
)
def test_norms(norm: int, vector: list[float]) -> None:
    for scale in (1, 1e30, 1e-30):
        given = np.array([3 * scale, -4 * scale, 0], np.float32)
        wanted = np.array(vector) * (scale if norm < 0 else 1)
        np.testing.assert_allclose(scaled(given, norm), wanted, rtol=1e-5)
    np.testing.assert_array_equal(scaled(np.zeros(3, np.float32), norm), np.zeros(3))


async def test_rerank() -> None:
    engine = FakeEngine()
    engine.scores = [-0.5, 2, 0.25]
    async with serving(engine) as server:
        client = await server.connect()
        for path in ("/llama/rerank", "/llama/reranking"):
            answer = await client.ask(post(path, {"query": "q", "documents": ["a", "b", "c"], "top_n": 2}))
            assert answer.body == (
                b'{"model":"model","object":"list","results":[{"index":1,"relevance_score":2},'
                b'{"index":2,"relevance_score":0.25}]}'
            )
        answer = await client.ask(post("/llama/rerank", {"query": "q", "texts": ["a", "b", "c"], "return_text": True}))
        assert answer.body == (
            b'[{"index":1,"score":2,"text":"b"},{"index":2,"score":0.25,"text":"c"},{"index":0,"score":-0.5,"text":"a"}]'
        )
        assert engine.calls[0] == RerankRequest(query="q", documents=("a", "b", "c"))


async def test_tokens_and_text() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        assert (await client.ask(post("/llama/tokenize", {"content": "ab"}))).body == b'{"tokens":[97,98]}'
        mixed = {"content": ["a", 7, "b"], "add_special": True, "parse_special": False}
        assert (await client.ask(post("/llama/tokenize", mixed))).body == b'{"tokens":[97,7,98]}'
        assert engine.calls == [("ab", False, True), ("a", True, False), ("b", False, False)]
        assert (await client.ask(post("/llama/tokenize", {}))).body == b'{"tokens":[]}'
        assert (await client.ask(post("/llama/detokenize", {"tokens": [97, 60]}))).body == b'{"content":"a<"}'


async def test_pieces() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        answer = await server.ask(post("/llama/tokenize", {"content": "aé", "with_pieces": True}))
        assert answer.body == (b'{"tokens":[{"id":97,"piece":"a"},{"id":195,"piece":[195]},{"id":169,"piece":[169]}]}')


async def test_a_conversation_becomes_a_prompt() -> None:
    info: dict[str, object] = {"chat_template": TEMPLATE}
    toy = Toy()
    toy.info = info
    messages = [{"role": "user", "content": "Hi"}]
    async with toy.engine(slots=1) as engine, serving(engine) as server:
        client = await server.connect()
        answer = await client.ask(post("/llama/apply-template", {"messages": messages}))
        assert answer.body == b'{"prompt":"user:Hi|0|>"}'
        fields = {"messages": messages, "add_generation_prompt": False, "tools": [{}], "chat_template_kwargs": {"x": 7}}
        assert (await client.ask(post("/llama/apply-template", fields))).json["prompt"] == "user:Hi|1|7"
        refused = await client.ask(post("/llama/apply-template", {"messages": [{"role": "nobody"}]}))
        assert (refused.status, refused.json["error"]["code"]) == (400, 400)
        assert "messages" in refused.json["error"]["message"]


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}{{ tools|length if tools else 0 }}|{{ x }}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.parametrize("path", ["/llama/slots/0?action=save", "/llama/lora-adapters", "/llama/props"])
async def test_what_cannot_be_changed_is_refused(path: str) -> None:
    async with serving(FakeEngine()) as server:
        answer = await server.ask(post(path, [{"id": 0, "scale": 0.5}]))
        assert (answer.status, answer.json["error"]["type"]) == (400, "not_supported_error")
        assert path.partition("?")[0] in answer.json["error"]["message"]


async def test_health() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        assert (await server.ask(request("GET", "/llama/health"))).body == b'{"status":"ok"}'
        for status, text in (("loading", "Loading model"), ("broken", "the server takes no more requests")):
            engine.status = status
            answer = await server.ask(request("GET", "/llama/health"))
            assert answer.status == 503
            assert answer.json["error"] == {"code": 503, "message": text, "type": "unavailable_error"}


async def test_other_paths_and_methods_are_worded_as_there() -> None:
    async with serving(FakeEngine(), api_key="k") as server:
        key = "Authorization: Bearer k"
        assert (await server.ask(request("GET", "/llama/health"))).status == 200  # as there, without a key
        answer = await server.ask(request("GET", "/llama/props"))
        assert (answer.status, answer.json["error"]["type"]) == (401, "authentication_error")
        for path in ("/llama", "/llama/", "/llama/nothing", "/llama/completion/x"):
            answer = await server.ask(request("POST", path, b"{}", key))
            assert answer.json == {"error": {"code": 404, "message": "404 page not found", "type": "not_found_error"}}
        answer = await server.ask(request("GET", "/llama/completion", b"", key))
        assert (answer.status, answer.json["error"]["code"], answer.headers["allow"]) == (405, 405, "OPTIONS, POST")


async def test_malformed_requests_change_nothing() -> None:
    engine = FakeEngine()
    cases = list(malformed())
    assert len(cases) >= 150
    async with serving(engine, deadline=60) as server:
        client = await server.connect()
        for path, body, name in cases:
            answer = await client.ask(request("POST", path, body))
            assert 400 <= answer.status < 500, body[:80]
            assert answer.json["error"]["code"] == answer.status
            assert name in answer.json["error"]["message"], body[:80]
        assert engine.calls == []
        assert engine.generations == []
