"""The paths of OpenAI's dialect, over real sockets."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio

from tests.engine.toys import Toy
from tests.server.client import WAYS, Leave, post, request, serving, until
from tests.server.dialects.openai.malformed import CHAT, EMBEDDINGS, RIGHT, TEXT, malformed
from tests.server.fake_engine import DONE, FakeEngine, endless
from trio_runner.errors import (
    EngineBroken,
    EngineBusy,
    EngineClosed,
    InvalidGrammar,
    PromptTooLong,
    RunnerError,
    Unsupported,
)
from trio_runner.events import Finished, PromptProgress, Usage
from trio_runner.front_door import open_engine
from trio_runner.request import Chat
from trio_runner.server import event_body
from trio_runner.server.dialects.openai.responses import FINGERPRINT
from trio_runner.server.names import ModelNames
from trio_runner.testing import ToyLoader, toy_text

NAMES = ModelNames("smol", aliases=("gpt-4o",))
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 5,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


def asking(path: str, **fields: Any) -> bytes:
    return post(path, RIGHT[path] | fields)


def data(stream: bytes) -> list[Any]:
    """The data of each event of a whole stream, which must end as it should."""
    *events, done, rest = stream.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(event.removeprefix(b"data: ")) for event in events if not event.startswith(b":")]


async def test_a_streamed_chat() -> None:
    engine = FakeEngine()
    async with serving(engine, names=NAMES) as server:
        client = await server.connect()
        begun = int(time.time())
        await client.stream.send_all(asking(CHAT, model="GPT-4o", stream=True, max_tokens=8))
        generation = await engine.asked()
        assert generation.request.prompt == Chat(messages=({"role": "user", "content": "x"},))
        assert generation.request.max_tokens == 8
        status, headers = await client.head()  # before there is any text
        assert (status, headers["content-type"], headers["transfer-encoding"]) == (200, "text/event-stream", "chunked")
        assert headers["cache-control"] == "no-cache"
        assert headers["x-request-id"].startswith("req_")
        first = await client.chunk()
        head = json.loads(first.removeprefix(b"data: "))
        assert begun <= head["created"] <= time.time()
        assert re.fullmatch("chatcmpl-[0-9a-f]{32}", head["id"])
        prefix = (
            f'data: {{"id":"{head["id"]}","object":"chat.completion.chunk","created":{head["created"]},'
            f'"model":"GPT-4o","system_fingerprint":"{FINGERPRINT}","choices":[{{"index":0,'
        ).encode()
        rest = b',"logprobs":null,"finish_reason":null}]}\n\n'
        assert first == prefix + b'"delta":{"role":"assistant","content":""}' + rest
        generation.say(PromptProgress(1, 2, 0), " Paris")
        assert await client.chunk() == prefix + b'"delta":{"content":" Paris"}' + rest
        generation.say(".", DONE)  # what arrives together leaves together
        end = b'"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}\n\ndata: [DONE]\n\n'
        assert await client.chunk() == prefix + b'"delta":{"content":"."}' + rest + prefix + end
        assert await client.chunk() == b""
        await generation.closed.wait()


async def test_a_streamed_completion_with_usage() -> None:
    engine = FakeEngine()
    async with serving(engine, names=NAMES) as server:
        client = await server.connect()
        await client.stream.send_all(asking(TEXT, stream=True, stream_options={"include_usage": True}))
        generation = await engine.asked()
        assert generation.request.prompt == "x"
        await client.head()
        assert await client.chunk() == b": accepted\n\n"
        generation.say("a", Finished("length", DONE.usage))
        piece, last, usage = data(await client.chunks())
        assert (piece["object"], piece["model"], piece["usage"]) == ("text_completion", "smol", None)
        assert piece["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]
        assert last["choices"][0]["finish_reason"] == "length"
        assert (usage["choices"], usage["usage"], usage["id"]) == ([], USAGE, piece["id"])


async def test_whole_answers() -> None:
    engine = FakeEngine()
    async with serving(engine, names=NAMES) as server:
        client = await server.connect()
        for path, kind in ((CHAT, "chat.completion"), (TEXT, "text_completion")):
            await client.stream.send_all(asking(path))
            generation = await engine.asked()
            generation.say("Par")
            await until(lambda generation=generation: not generation.unread)  # type: ignore[misc]
            generation.say("is", DONE)
            answer = await client.answer()
            assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
            assert answer.headers["x-request-id"].startswith("req_")
            assert (answer.json["object"], answer.json["model"], answer.json["usage"]) == (kind, "smol", USAGE)
            [choice] = answer.json["choices"]
            assert choice.get("text", choice.get("message", {}).get("content")) == "Paris"
            assert choice["finish_reason"] == "stop"
            await generation.closed.wait()


async def test_several_choices_are_several_generations() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(asking(CHAT, n=3, seed=5, stream=True))
        await client.head()
        generations = [await engine.asked() for _ in range(3)]
        assert [generation.request.sampling.seed for generation in generations] == [5, 6, 7]
        generations[2].say("c", DONE)
        generations[0].say("a", DONE)
        generations[1].say("b", DONE)
        events = data(await client.chunks())
        choices = [event["choices"][0] for event in events]
        assert [choice["index"] for choice in choices[:3]] == [0, 1, 2]
        texts = {choice["index"]: choice["delta"]["content"] for choice in choices[3:] if choice["delta"]}
        assert texts == {0: "a", 1: "b", 2: "c"}


async def test_echoes() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        for stream in (False, True):
            await client.stream.send_all(asking(TEXT, prompt=["ab", [99, 100]], echo=True, stream=stream))
            for text in ("1", "2"):
                (await engine.asked()).say(text, DONE)
            if stream:
                await client.head()
                texts = ["", ""]
                for event in data(await client.chunks()):
                    texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
            else:
                texts = [choice["text"] for choice in (await client.answer()).json["choices"]]
            assert texts == ["ab1", "cd2"]


async def test_a_stream_says_that_it_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_body, "KEEP_ALIVE_SECONDS", 0.01)
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(asking(CHAT, stream=True))
        generation = await engine.asked()
        await client.head()
        await client.chunk()
        assert await client.chunk() == b": still there\n\n"
        generation.say(DONE)


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "param", "code", "text"),
    [
        (EngineBusy(retry_after=2), 503, None, "server_busy", "the queue is full"),
        (InvalidGrammar("no root"), 400, "grammar", None, "grammar: no root"),
        (EngineClosed("the engine is shutting down"), 503, None, None, "the engine is shutting down"),
        (EngineBroken("the decode thread died"), 503, None, "engine_broken", "the decode thread died"),
        (Unsupported("chat", "there is none", param="messages"), 400, "messages", "unsupported", "messages: there is"),
        (
            PromptTooLong(9, 8, param="messages"),
            400,
            "messages",
            "context_length_exceeded",
            "8 tokens, but messages has 9",
        ),
        (KeyError("secret"), 500, None, None, "internal error"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, EMBEDDINGS])
async def test_errors_before_the_answer(
    path: str, error: Exception, status: int, param: str | None, code: str | None, text: str
) -> None:
    engine = FakeEngine()
    engine.refusal = error
    async with serving(engine) as server:
        answer = await server.ask(asking(path, **({"stream": True} if path != EMBEDDINGS else {})))
        assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
        refused = answer.json["error"]
        assert text in refused["message"] or (path == EMBEDDINGS and code == "context_length_exceeded")
        assert refused["code"] == code
        assert refused["param"] == param or (path == EMBEDDINGS and code == "context_length_exceeded")
        assert refused["type"] == ("server_error" if status >= 500 else "invalid_request_error")
        assert answer.headers.get("retry-after") == ("2" if isinstance(error, EngineBusy) else None)
        assert answer.headers.get("x-should-retry") == ("false" if status >= 500 and code != "server_busy" else None)
        for generation in engine.generations:
            await generation.closed.wait()


async def test_if_one_choice_cannot_start_none_is_left() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        engine.refusal = PromptTooLong(9, 8)
        answer = await server.ask(asking(TEXT, prompt=["a", "b"], n=2))
        assert (answer.status, answer.json["error"]["param"]) == (400, "prompt[0]")
        assert len(engine.generations) == 4
        for generation in engine.generations:
            await generation.closed.wait()


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_errors_in_the_answer(path: str) -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        for error, text in ((EngineBroken("it died"), "it died"), (KeyError("secret"), "internal error")):
            await client.stream.send_all(asking(path, stream=True))
            generation = await engine.asked()
            generation.say("a")
            generation.fail(error)
            events = (await client.answer()).body.split(b"\n\n")
            assert json.loads(events[-2].removeprefix(b"data: "))["error"]["message"] == text
            assert b"[DONE]" not in events
            await client.stream.send_all(asking(path))
            generation = await engine.asked()
            generation.say("a")
            generation.fail(error)
            answer = await client.answer()
            assert answer.status == (503 if isinstance(error, RunnerError) else 500)
            assert answer.json["error"]["message"] == text


async def test_another_model_is_not_found() -> None:
    engine = FakeEngine()
    async with serving(engine, names=NAMES) as server:
        for path in RIGHT:
            answer = await server.ask(asking(path, model="gpt-9"))
            assert (answer.status, answer.json["error"]["code"]) == (404, "model_not_found")
            assert answer.json["error"]["param"] == "model"
        assert engine.calls == []


async def test_the_server_refuses_in_the_words_of_the_dialect() -> None:
    async with serving(FakeEngine(), api_key="k") as server:
        key = "Authorization: Bearer k"
        for raw, status in (
            (request("GET", "/v1/models"), 401),
            (request("GET", "/v1/nowhere", b"", key), 404),
            (request("GET", CHAT, b"", key), 405),
            (request("GET", "/v1/models", b"", key, host="example.org"), 403),
        ):
            answer = await server.ask(raw)
            assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
            assert answer.json["error"]["type"] == "invalid_request_error"
            assert answer.headers["x-request-id"].startswith("req_")


async def test_malformed_requests_change_nothing() -> None:
    engine = FakeEngine()
    async with serving(engine, deadline=240) as server:
        client = await server.connect()
        for path, body, param in malformed():
            raw = request("POST", path, body) if body else request("POST", path, b"", "Content-Length: 0")
            answer = await client.ask(raw)
            assert answer.status == 400, body[:80]
            assert (answer.json["error"]["param"] or "") == param, body[:80]
        assert engine.calls == []


async def test_more_choices_than_there_will_ever_be_room_for() -> None:
    async with open_engine(ToyLoader(), slots=1, max_queue=2) as engine, serving(engine) as server:
        assert (await server.ask(asking(TEXT, n=3, max_tokens=2))).status == 200
        for fields, param in (
            ({"n": 4}, "n"),
            ({"prompt": ["a"] * 4}, "prompt"),
            ({"n": 3, "priority": "background"}, "n"),
        ):
            answer = await server.ask(asking(TEXT, **fields, max_tokens=2))
            assert (answer.status, answer.json["error"]["param"]) == (400, param)


# --- Leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("fields", [{"stream": True}, {}, {"n": 2}, {"n": 2, "stream": True}], ids=str)
async def test_a_client_that_leaves_closes_all_its_generations(leave: Leave, fields: dict[str, Any]) -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(asking(CHAT, **fields))
        generations = [await engine.asked() for _ in range(fields.get("n", 1))]
        for generation in generations:
            await generation.started.wait()
        generations[0].say("a")
        await leave(client)
        for generation in generations:
            await generation.closed.wait()


async def test_a_client_that_does_not_read_and_leaves() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(asking(CHAT, stream=True))
        generation = await engine.asked()
        endless(generation)
        await client.head()
        client.reset()
        await generation.closed.wait()


# --- Embeddings, models, and the toy ---------------------------------------------------------------------------------


async def test_embeddings() -> None:
    engine = FakeEngine()
    async with serving(engine, names=NAMES) as server:
        answer = await server.ask(asking(EMBEDDINGS, input=["a", "b"], dimensions=3))
        assert [entry["embedding"] for entry in answer.json["data"]] == [[0.1, -2.0, 1e-07]] * 2
        assert (answer.json["model"], answer.json["usage"]) == ("smol", {"prompt_tokens": 6, "total_tokens": 6})
        assert answer.headers["x-request-id"].startswith("req_")


async def test_models() -> None:
    engine = FakeEngine()
    async with serving(engine, names=NAMES) as server:
        listed = (await server.ask(request("GET", "/v1/models"))).json
        assert [entry["id"] for entry in listed["data"]] == ["smol", "gpt-4o"]
        assert [entry["context_length"] for entry in listed["data"]] == [engine.capabilities.n_ctx] * 2
        one = await server.ask(request("GET", "/v1/models/SMOL"))
        assert one.json == listed["data"][0] | {"id": "SMOL"}
        wrong = await server.ask(request("GET", "/v1/models/org/other%20one"))
        assert (wrong.status, wrong.json["error"]["code"]) == (404, "model_not_found")


async def test_models_are_listed_while_the_model_loads() -> None:
    with_events: list[Callable[[], bool]] = []

    def wait(progress: Callable[[float], None], cancelled: Callable[[], bool]) -> None:
        with_events.append(cancelled)
        while not cancelled():
            time.sleep(0.001)

    async with open_engine(ToyLoader(on_load=wait), wait=False) as engine, serving(engine, names=NAMES) as server:
        await until(lambda: with_events)
        listed = (await server.ask(request("GET", "/v1/models"))).json
        assert [set(entry) for entry in listed["data"]] == [{"id", "object", "created", "owned_by"}] * 2


async def test_the_text_is_the_one_that_the_engine_writes() -> None:
    async with open_engine(ToyLoader(), slots=2) as engine, serving(engine) as server:
        prompts = ["abc", "a longer prompt", "abc"]
        answer = (await server.ask(asking(TEXT, prompt=prompts, max_tokens=20, n=2))).json
        expected = [toy_text(prompt, 20) for prompt in prompts for _ in range(2)]
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
        streamed = data((await server.ask(asking(TEXT, prompt=prompts, max_tokens=20, stream=True))).body)
        texts = ["", "", ""]
        for event in streamed:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert texts == expected[::2]


async def test_the_middle_of_a_text(toy: Toy) -> None:
    toy.info = {"token_fim_pre": 1, "token_fim_suf": 2, "token_fim_mid": 3}
    async with toy.engine() as engine, serving(engine) as server:
        answer = (await server.ask(asking(TEXT, prompt="before", suffix="after", echo=True, max_tokens=9))).json
        assert answer["choices"][0]["text"] == "before" + toy_text("\1before\2after\3", 9)
        assert answer["usage"]["prompt_tokens"] == len("before") + len("after") + 3


async def test_a_model_that_cannot_fill_in_the_middle() -> None:
    async with open_engine(ToyLoader()) as engine, serving(engine) as server:
        answer = await server.ask(asking(TEXT, suffix="after"))
        assert (answer.status, answer.json["error"]["param"]) == (400, "suffix")
        assert (await server.ask(asking(TEXT, suffix="", max_tokens=1))).status == 200


async def test_no_tokens_only_warm_the_cache() -> None:
    async with open_engine(ToyLoader()) as engine, serving(engine) as server:
        answer = (await server.ask(asking(TEXT, prompt="a prompt", max_tokens=0))).json
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "length")
        assert answer["usage"]["completion_tokens"] == 0
        again = (await server.ask(asking(TEXT, prompt="a prompt", max_tokens=1))).json
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len("a prompt") - 1


async def test_a_deadline_is_a_length_that_says_so() -> None:
    def slowly(batch: object) -> None:
        time.sleep(0.005)

    async with open_engine(ToyLoader(on_decode=slowly)) as engine, serving(engine) as server:
        answer = (await server.ask(asking(TEXT, prompt="endless", deadline=0.05))).json
        assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"]) == ("length", "deadline")


async def test_a_full_context_ends_with_length() -> None:
    async with open_engine(ToyLoader(), context_length=64) as engine, serving(engine) as server:
        for prompt in map(str, range(100)):  # one whose text does not end by itself before
            choice = (await server.ask(asking(TEXT, prompt=prompt))).json["choices"][0]
            if choice["finish_reason"] == "length":
                break
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
        assert toy_text(prompt, 64).startswith(choice["text"])


async def test_an_answer_that_is_not_sent_costs_nothing_to_others() -> None:
    """A whole answer whose client is gone is dropped, and the next one is served."""
    engine = FakeEngine()
    async with serving(engine) as server:
        client = await server.connect()
        await client.stream.send_all(asking(CHAT))
        generation = await engine.asked()
        await client.stream.aclose()
        await generation.closed.wait()
        with trio.fail_after(5):
            other = await server.connect()
            await other.stream.send_all(asking(CHAT))
            (await engine.asked()).say("x", Finished("stop", Usage()))
            assert (await other.answer()).json["choices"][0]["message"]["content"] == "x"
