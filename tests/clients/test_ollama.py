"""The `ollama` client, as it is, against the default model over real sockets."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import ollama
import pydantic
import pytest
import trio

from tests.clients.served import CONTEXT, MODEL, SLOTS, Served
from tests.real.pictures import Shape, picture

GREEDY = {"temperature": 0, "num_predict": 8}
USER = {"role": "user", "content": "Hello"}
ENDLESS = {"num_predict": -1, "ignore_eos": True}
"""Ten contexts of tokens, which take minutes."""
LONG = "All work and no play makes Jack a dull boy. " * 80
"""Some nine hundred tokens, which take the server seconds."""


@pytest.fixture
def client(server: Served) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as client:
        yield client


@pytest.fixture
async def client_async(server: Served) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(host=server.url) as client:
        yield client


def test_chat(client: ollama.Client) -> None:
    answer = client.chat(MODEL, [USER], options=GREEDY)
    assert str(answer.message.content).startswith("Hello")
    assert (answer.model, answer.message.role, answer.done, answer.done_reason) == (MODEL, "assistant", True, "length")
    assert answer.eval_count == 8
    for number in (answer.prompt_eval_count, answer.prompt_eval_duration, answer.eval_duration, answer.total_duration):
        assert number is not None
        assert number > 0
    assert answer.created_at is not None
    assert abs(datetime.fromisoformat(answer.created_at) - datetime.now(UTC)).total_seconds() < 3600


def test_a_stream_says_what_a_whole_answer_says(client: ollama.Client) -> None:
    whole = client.chat(MODEL, [USER], options=GREEDY)
    parts = list(client.chat(MODEL, [USER], options=GREEDY, stream=True))
    assert len(parts) > 4
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert "".join(str(part.message.content) for part in parts) == whole.message.content
    assert parts[-1].prompt_eval_count == whole.prompt_eval_count  # tokens found in the cache count as well


def test_generate(client: ollama.Client) -> None:
    said = str(client.generate(MODEL, str(USER["content"]), options=GREEDY).response)
    assert said == client.chat(MODEL, [USER], options=GREEDY).message.content
    system = client.generate(MODEL, "Hello", system="You speak French.", options=GREEDY)
    assert system.response != client.generate(MODEL, "Hello", options=GREEDY).response
    raw = client.generate(MODEL, "The capital of France is", raw=True, options={"temperature": 0, "num_predict": 1})
    assert raw.response == " Paris"
    parts = client.generate(MODEL, "The capital of France is", raw=True, options=GREEDY, stream=True)
    assert "".join(str(part.response) for part in parts).startswith(" Paris")


def test_options(client: ollama.Client) -> None:
    def said(**options: Any) -> Any:
        return client.chat(MODEL, [USER], options={"num_predict": 6, **options})

    assert said(seed=3).message.content == said(seed=3).message.content
    assert said(temperature=0, stop=["help"], num_predict=40).done_reason == "stop"
    assert "help" not in said(temperature=0, stop=["help"], num_predict=40).message.content
    every = ollama.Options(
        num_ctx=2 * CONTEXT, num_batch=64, num_gpu=0, num_thread=2, num_keep=5, seed=1, num_predict=2, top_k=9,
        top_p=0.8, typical_p=0.9, repeat_last_n=8, temperature=0.5, repeat_penalty=1.2, presence_penalty=0.1,
        frequency_penalty=0.1, mirostat=0, mirostat_tau=4, mirostat_eta=0.2, penalize_newline=False, stop=["x y z"],
        numa=False, low_vram=False, f16_kv=True, use_mmap=True, embedding_only=False, tfs_z=0.9,
    )  # fmt: skip
    assert client.chat(MODEL, [USER], options=every).eval_count == 2


class City(pydantic.BaseModel):
    name: str
    population: int


def test_formats(client: ollama.Client) -> None:
    ask = [{"role": "user", "content": "Describe Paris as JSON."}]
    options = {"temperature": 0, "num_predict": 100}
    schema = City.model_json_schema()
    schema["properties"]["name"]["maxLength"] = 20
    schema["properties"]["population"]["maximum"] = 10**7
    answer = client.chat(MODEL, ask, format=schema, options=options)
    assert City.model_validate_json(str(answer.message.content)).population <= 10**7
    assert answer.done_reason == "stop"
    said = str(
        client.generate(MODEL, "A short JSON object:", format="json", options={**options, "num_predict": 2}).response
    )
    assert said.lstrip().startswith("{")
    with pytest.raises(ollama.ResponseError, match="format") as caught:
        client.chat(MODEL, ask, format={"type": "nothing"})
    assert caught.value.status_code == 400


def test_embeddings(client: ollama.Client) -> None:
    answer = client.embed(MODEL, ["The sky is blue.", "It rains."])
    first, second = answer.embeddings
    assert len(first) == len(second) == 576
    assert sum(x * x for x in first) == pytest.approx(1, abs=1e-3)
    assert answer.prompt_eval_count is not None
    assert client.embed(MODEL, "It rains.").embeddings[0] == pytest.approx(second, abs=1e-2)
    assert len(client.embed(MODEL, "x", dimensions=8).embeddings[0]) == 8
    assert len(client.embeddings(MODEL, "It rains.").embedding) == 576
    assert client.embed(MODEL, []).embeddings == []
    with pytest.raises(ollama.ResponseError, match="input has") as caught:
        client.embed(MODEL, LONG * 2, truncate=False)
    assert caught.value.status_code == 400


@pytest.mark.parametrize(("colour", "shape"), [("red", "circle"), ("green", "triangle")])
def test_images(client: ollama.Client, colour: str, shape: Shape, tmp_path: Path) -> None:
    image = picture(colour, shape, "white")
    file = tmp_path / "image.png"
    file.write_bytes(image)
    options = {"temperature": 0, "num_predict": 12}
    for given in (image, file, base64.b64encode(image).decode()):
        message = ollama.Message(role="user", content="\nDescribe the image.", images=[ollama.Image(value=given)])
        said = str(client.chat(MODEL, [message], options=options).message.content)
        assert colour in said
        assert shape in said
    said = str(client.generate(MODEL, "\nDescribe the image.", images=[image], options=options).response)
    assert (colour in said, shape in said) == (True, True)
    with pytest.raises(ollama.ResponseError, match="image") as caught:
        client.generate(MODEL, "x", images=[b"no image"])
    assert caught.value.status_code == 400


def test_log_probabilities(client: ollama.Client) -> None:
    answer = client.chat(MODEL, [USER], logprobs=True, top_logprobs=2, options=GREEDY)
    assert answer.logprobs is not None
    assert "".join(one.token for one in answer.logprobs) == answer.message.content
    assert all(len(one.top_logprobs or ()) == 2 and one.logprob <= 0 for one in answer.logprobs)


def test_what_the_model_is(client: ollama.Client) -> None:
    models = client.list().models
    assert [model.model for model in models] == [f"{MODEL}:latest", "gpt-4o:latest"]
    for name in ("gpt-4o", MODEL.lower(), f"{MODEL}:latest"):
        shown = client.show(name)
    assert shown.capabilities == ["completion", "vision"]
    assert shown.modelinfo is not None
    assert (shown.modelinfo["general.architecture"], shown.modelinfo["llama.context_length"]) == ("llama", CONTEXT)
    assert shown.details is not None
    assert (shown.details.parameter_size, shown.details.quantization_level) == ("134.52M", "Q4_1")
    assert (shown.parameters or "").split() == ["num_ctx", str(CONTEXT)]
    assert shown.modified_at == models[0].modified_at
    [running] = client.ps().models
    assert (running.digest, running.context_length, running.size_vram) == (models[0].digest, CONTEXT, 0)
    assert running.size is not None
    assert running.size > 90_000_000


def test_loading_and_unloading(client: ollama.Client) -> None:
    assert client.generate(MODEL).done_reason == "load"
    assert client.chat(MODEL, []).done_reason == "load"
    assert client.generate(MODEL, keep_alive=0).done_reason == "unload"
    assert client.chat(MODEL, [USER], keep_alive="5m", options=GREEDY).done
    assert len(client.ps().models) == 1  # it stays: one server has one model
    assert client.pull(MODEL).status == "success"
    assert [part.status for part in client.pull(MODEL, stream=True)][-1] == "success"


def ask_without_truncating(client: ollama.Client) -> None:
    """The client's own methods cannot say `truncate`."""
    body = {"messages": [{"role": "user", "content": LONG * 2}], "truncate": False}
    untyped: Any = client
    untyped._request_raw("POST", "/api/chat", json=body)


def a_tool(city: str) -> str:
    """Tell the weather.

    Args:
      city: Where.
    """
    return city


def test_errors(client: ollama.Client) -> None:
    cases: list[tuple[int, str, Any]] = [
        (404, "model 'llama3' not found", lambda: client.chat("llama3", [USER])),
        (404, "model 'llama3' not found", lambda: list(client.chat("llama3", [USER], stream=True))),
        (404, "model 'llama3' not found", lambda: client.show("llama3")),
        (404, "fetches no other", lambda: client.pull("llama3")),
        (400, "options.temperature", lambda: client.chat(MODEL, [USER], options={"temperature": 1e9})),
        (400, "options.top_k", lambda: client.chat(MODEL, [USER], options={"top_k": "many"})),
        (400, "tools", lambda: client.chat(MODEL, [USER], tools=[a_tool])),
        (400, "think", lambda: client.chat(MODEL, [USER], think=True)),
        (400, "template", lambda: client.generate(MODEL, "x", template="{{ .Prompt }}")),
        (400, "context", lambda: client.generate(MODEL, "x", context=[1, 2])),
        (400, "suffix", lambda: client.generate(MODEL, "x", suffix="y")),
        (400, "tokens", lambda: ask_without_truncating(client)),
        (501, "cannot delete", lambda: client.delete(MODEL)),
        (501, "cannot copy", lambda: client.copy(MODEL, "other")),
        (501, "cannot create", lambda: client.create("other", from_=MODEL)),
        (501, "cannot push", lambda: client.push(MODEL)),
    ]
    for status, text, call in cases:
        with pytest.raises(ollama.ResponseError, match=text) as caught:
            call()
        assert caught.value.status_code == status
        assert caught.value.error != ""


def test_a_long_conversation_loses_its_oldest_messages(client: ollama.Client) -> None:
    whole = client.chat(MODEL, [USER], options=GREEDY)
    said = [{"role": "user", "content": LONG * 2}, {"role": "assistant", "content": LONG * 2}, USER]
    answer = client.chat(MODEL, said, options=GREEDY)
    assert (answer.message, answer.prompt_eval_count) == (whole.message, whole.prompt_eval_count)


async def test_async(client_async: ollama.AsyncClient, client: ollama.Client) -> None:
    whole = await client_async.chat(MODEL, [USER], options=GREEDY)
    parts = [part async for part in await client_async.chat(MODEL, [USER], options=GREEDY, stream=True)]
    assert "".join(str(part.message.content) for part in parts) == whole.message.content
    assert (await client_async.generate(MODEL, "Hi", options=GREEDY)).eval_count == 8
    assert len((await client_async.embed(MODEL, "x")).embeddings[0]) == 576
    with pytest.raises(ollama.ResponseError) as caught:
        await client_async.show("llama3")
    assert caught.value.status_code == 404


async def until(server: Served, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    return await trio.to_thread.run_sync(server.wait_until, condition, "it is as expected", abandon_on_cancel=True)


def is_idle(statistics: dict[str, Any]) -> bool:
    return bool(statistics["running"] == statistics["waiting"] == 0)


async def test_a_stream_that_is_closed_frees_its_slot(server: Served, client: ollama.Client) -> None:
    def read_a_little() -> None:
        stream: Any = client.chat(MODEL, [USER], options=ENDLESS, stream=True)
        assert not next(stream).done
        stream.close()

    before = await until(server, is_idle)
    await trio.to_thread.run_sync(read_a_little)
    after = await until(server, is_idle)
    assert after["sampled"] - before["sampled"] < CONTEXT  # and not ten times that


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # httpx leaves a generator behind
async def test_an_async_stream_that_is_closed_frees_its_slot(server: Served, client_async: ollama.AsyncClient) -> None:
    before = await until(server, is_idle)
    answer: Any = await client_async.chat(MODEL, [USER], options=ENDLESS, stream=True)
    async with aclosing(answer) as stream:
        assert not (await anext(stream)).done
    after = await until(server, is_idle)
    assert after["sampled"] - before["sampled"] < CONTEXT


async def test_a_request_that_is_cancelled_in_prefill_frees_its_slot(
    server: Served, client_async: ollama.AsyncClient
) -> None:
    before = await until(server, is_idle)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: client_async.generate(MODEL, LONG, options=ENDLESS))
        await until(server, lambda now: now["running"] == 1)
        nursery.cancel_scope.cancel()
    after = await until(server, is_idle)
    assert after["sampled"] == before["sampled"]


async def test_a_request_that_is_cancelled_in_the_queue_leaves_it(
    server: Served, client_async: ollama.AsyncClient
) -> None:
    await until(server, is_idle)

    async def ask(words: str, scope: trio.CancelScope) -> None:
        with scope:
            await client_async.generate(MODEL, words, options=ENDLESS)

    running, waiting = trio.CancelScope(), trio.CancelScope()
    async with trio.open_nursery() as nursery:
        for index in range(SLOTS):
            nursery.start_soon(ask, f"{index}", running if index == 0 else trio.CancelScope())
        await until(server, lambda now: now["running"] == SLOTS)
        nursery.start_soon(ask, "one more", waiting)
        await until(server, lambda now: now["waiting"] == 1)
        waiting.cancel()
        now = await until(server, lambda now: now["waiting"] == 0)
        assert now["running"] == SLOTS
        running.cancel()
        await until(server, lambda now: now["running"] == SLOTS - 1)
        nursery.cancel_scope.cancel()
    await until(server, is_idle)


def test_json_lines_as_other_clients_read_them(server: Served) -> None:
    """Zed and others decode each line on its own, and want these fields in every one."""
    body = {"model": MODEL, "messages": [USER], "options": GREEDY}
    answer = httpx.post(f"{server.url}/api/chat", json=body, timeout=60)
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.removesuffix("\n").split("\n")]
    for line in lines:
        assert isinstance(line["message"]["content"], str)
        assert {type(line[name]) for name in ("model", "created_at")} == {str}
        assert isinstance(line["done"], bool)
