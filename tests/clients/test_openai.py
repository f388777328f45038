"""OpenAI's own client, unmodified, against the default model."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.clients.served import CONTEXT, DEADLINE, MODEL, QUEUE, SLOTS, Served
from tests.real.pictures import picture

FRANCE: Final = "The capital of France is"
QUESTION: Final[Any] = [{"role": "user", "content": "Count from one to ten."}]
GREEDY: Final[Any] = {"model": MODEL, "temperature": 0}
NO_END: Final = {"0": -100, "2": -100}
"""Biases that forbid the tokens that end a text of the default model."""
ENDLESS: Final[Any] = {"model": MODEL, "messages": QUESTION, "logit_bias": NO_END, "extra_body": {"shift": True}}
"""A request whose text would never end by itself."""
LONG: Final = "Once upon a time, in a village by the sea, there lived a fisherman who could not swim. " * 48
"""Some nine hundred tokens, which take the server seconds."""


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=60) as client:
        yield client


# --- Models ----------------------------------------------------------------------------------------------------------


def test_models(client: OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL, "gpt-4o"]
    assert client.models.retrieve("gpt-4o") == listed[1]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)


# --- Chats -----------------------------------------------------------------------------------------------------------


def test_a_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(messages=QUESTION, max_completion_tokens=8, **GREEDY)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.model == MODEL
    assert abs(answer.created - time.time()) < 60
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    again = client.chat.completions.create(messages=QUESTION, max_completion_tokens=8, **GREEDY)
    assert again.choices[0].message.content == choice.message.content
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1
    assert again.id != answer.id
    assert again._request_id != answer._request_id is not None


def test_a_streamed_chat(client: OpenAI) -> None:
    whole = client.chat.completions.create(messages=QUESTION, max_tokens=24, **GREEDY)
    stream = client.chat.completions.create(
        messages=QUESTION, max_tokens=24, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", *[None] * (len(chunks) - 1)]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * (len(chunks) - 1), "length"]
    assert {chunk.id for chunk in chunks} == {last.id}
    assert (last.choices, last.usage is not None) == ([], True)
    assert whole.usage is not None
    assert last.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_the_helper_that_puts_a_stream_together(client: OpenAI) -> None:
    with client.chat.completions.stream(messages=QUESTION, stop=" ", n=2, **GREEDY) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert [choice.message.role for choice in final.choices] == ["assistant", "assistant"]
    assert final.choices[0].message.content
    assert final.choices[0].message.content == final.choices[1].message.content  # both are greedy


def test_several_answers(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=12, n=3, seed=1)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    one = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=1)
    assert answer.usage is not None
    assert one.usage is not None
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens


def test_what_ends_a_text(client: OpenAI) -> None:
    whole = client.completions.create(prompt=FRANCE, max_tokens=24, **GREEDY).choices[0].text
    stop = whole[5:9]
    cut = client.completions.create(prompt=FRANCE, max_tokens=24, stop=[stop, "never"], **GREEDY).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert (cut.model_extra or {})["stop_reason"] == stop
    late = client.chat.completions.create(**ENDLESS | {"extra_body": {"deadline": 0.3, "shift": True}}).choices[0]
    assert (late.finish_reason, (late.model_extra or {})["stop_reason"]) == ("length", "deadline")


def test_log_probabilities(client: OpenAI) -> None:
    chat = client.chat.completions.create(messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=3, **GREEDY)
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert b"".join(bytes(token.bytes or []) for token in content).decode() == chat.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0
    text = client.completions.create(prompt=FRANCE, max_tokens=4, logprobs=2, **GREEDY).choices[0]
    assert text.logprobs is not None
    assert "".join(text.logprobs.tokens or []) == text.text
    assert [len(top) for top in text.logprobs.top_logprobs or []] == [2] * 4
    streamed = client.completions.create(prompt=FRANCE, max_tokens=4, logprobs=2, stream=True, **GREEDY)
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    offsets = [offset for part in parts for offset in part.text_offset or []]
    assert offsets == text.logprobs.text_offset
    assert offsets == [
        text.text.index(token, offset) for token, offset in zip(text.logprobs.tokens or [], offsets, strict=True)
    ]


def test_a_token_that_is_forbidden(client: OpenAI) -> None:
    first = client.completions.create(prompt=FRANCE, max_tokens=1, logprobs=0, **GREEDY)
    other = client.completions.create(prompt=FRANCE, max_tokens=1, logit_bias={"7042": -100}, **GREEDY)
    assert (first.choices[0].text, other.choices[0].text != " Paris") == (" Paris", True)


def test_fields_of_our_own(client: OpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1, "priority": "background", "cache_prompt": False}
    answer = client.chat.completions.create(
        model="gpt-4o",
        messages=[{"role": "developer", "content": "Be brief."}, *QUESTION],
        max_tokens=4,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        prediction={"type": "content", "content": "one"},
        extra_body=extra,
    )
    assert answer.choices[0].message.content
    assert answer.model == "gpt-4o"


# --- Schemas ---------------------------------------------------------------------------------------------------------


class Person(BaseModel):
    name: str
    age: int
    mood: Literal["happy", "sad"]


PERSON: Final[Any] = [{"role": "user", "content": "Anna is 30 years old and happy. Answer with JSON."}]


def test_a_schema(client: OpenAI) -> None:
    answer = client.chat.completions.parse(messages=PERSON, response_format=Person, max_tokens=100, **GREEDY)
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)
    with client.chat.completions.stream(messages=PERSON, response_format=Person, max_tokens=100, **GREEDY) as stream:
        streamed = stream.until_done().get_final_completion()
    assert streamed.choices[0].message.parsed == person


def test_an_answer_that_is_cut_says_so(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(messages=PERSON, response_format=Person, max_tokens=2, **GREEDY)


def test_any_object(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=PERSON, response_format={"type": "json_object"}, max_tokens=200, seed=1, **GREEDY
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
    else:
        assert (answer.choices[0].message.content or "").lstrip().startswith("{")


def test_a_schema_that_cannot_be_obeyed(client: OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=PERSON, response_format=schema, **GREEDY)
    assert caught.value.param == "response_format.json_schema.schema"


# --- Completions -----------------------------------------------------------------------------------------------------


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(prompt=FRANCE, max_tokens=4, **GREEDY)
    assert answer.choices[0].text.startswith(" Paris")
    streamed = client.completions.create(prompt=FRANCE, max_tokens=4, stream=True, echo=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in streamed) == FRANCE + answer.choices[0].text
    several = client.completions.create(prompt=["One, two,", FRANCE], max_tokens=4, n=2, **GREEDY)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[2].text == several.choices[3].text == answer.choices[0].text


def test_a_model_that_cannot_fill_in_the_middle(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="def f(", suffix="return x", **GREEDY)
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported")


def test_prompts_of_tokens(client: OpenAI) -> None:
    tokens = [504, 3575, 282, 4649, 314]
    answer = client.completions.create(prompt=tokens, max_tokens=4, echo=True, **GREEDY)
    assert answer.choices[0].text.startswith(FRANCE)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokens)


# --- Embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings(client: OpenAI) -> None:
    texts = ["The cat sat on the mat.", "A cat was sitting on a mat.", "Interest rates rose."]
    answer = client.embeddings.create(model=MODEL, input=texts)  # the client asks for base64 by itself
    vectors = np.array([entry.embedding for entry in answer.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert answer.usage.total_tokens > 10
    plain = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float", dimensions=8)
    np.testing.assert_allclose(np.linalg.norm(plain.data[0].embedding), 1, rtol=1e-5)
    assert len(plain.data[0].embedding) == 8
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model=MODEL, input=[[1, 2, 3]])


# --- Images ----------------------------------------------------------------------------------------------------------


def seen(url: str, **more: Any) -> Any:
    """A message that asks what is in an image."""
    parts = [
        {"type": "image_url", "image_url": {"url": url, **more}},
        {"type": "text", "text": "\nDescribe the image."},
    ]
    return [{"role": "user", "content": parts}]


def test_images(client: OpenAI) -> None:
    data = base64.b64encode(picture("red", "circle", "white")).decode()
    answer = client.chat.completions.create(
        messages=seen(f"data:image/png;base64,{data}", detail="low"), max_tokens=12, **GREEDY
    )
    assert "red circle" in (answer.choices[0].message.content or "")
    for url, text in (("https://example.org/x.png", "data URL"), (f"data:image/png;base64,{data[:40]}", "messages")):
        with pytest.raises(openai.BadRequestError, match=text) as caught:
            client.chat.completions.create(messages=seen(url), **GREEDY)
        assert (caught.value.param or "").startswith("messages[0].content[0]")


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_the_field(client: OpenAI) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"temperature": "hot"}, "temperature"),
        ({"n": 17}, "n"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"min_p": 7}}, "min_p"),
    ]
    for fields, param in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**({"messages": QUESTION, "model": MODEL} | fields))
        assert caught.value.param == param
        assert param in str(caught.value)


def test_a_prompt_that_is_too_long(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": LONG * 2}], **GREEDY)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert f"maximum context length is {CONTEXT} tokens" in str(caught.value)


def test_a_busy_server_is_asked_again(client: OpenAI, server: Served) -> None:
    """The client waits as long as Retry-After says, and then gets its answer."""
    crowd = client.chat.completions.create(stream=True, n=SLOTS + QUEUE, **ENDLESS)
    with pytest.raises(openai.InternalServerError) as caught:
        client.with_options(max_retries=0).chat.completions.create(messages=QUESTION, max_tokens=1, **GREEDY)
    assert caught.value.code == "server_busy"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    leaving = threading.Timer(0.3, crowd.close)
    leaving.start()
    answer = client.with_options(max_retries=5).chat.completions.create(messages=QUESTION, max_tokens=1, **GREEDY)
    leaving.join()
    assert answer.choices[0].finish_reason == "length"


# --- Leaving ---------------------------------------------------------------------------------------------------------
# None of these requests would end by itself. So if nothing is left of it soon, that is because its client left.


def test_leaving_in_mid_air(client: OpenAI, server: Served) -> None:
    for _ in range(3):
        stream = client.chat.completions.create(stream=True, **ENDLESS)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        assert server.statistics["running"] == 1
        stream.close()
        server.wait_until_idle()


def test_leaving_in_prefill(client: OpenAI, server: Served) -> None:
    before = server.statistics["prompt_rows"]
    stream = client.completions.create(model=MODEL, prompt=LONG, stream=True, extra_body={"cache_prompt": False})
    server.wait_until(lambda statistics: statistics["running"] == 1, "the prompt is being decoded")
    stream.close()
    server.wait_until_idle()
    assert server.statistics["prompt_rows"] - before < 880, "the whole prompt was decoded"


def test_leaving_while_queued(client: OpenAI, server: Served) -> None:
    crowd = client.chat.completions.create(stream=True, n=SLOTS, **ENDLESS)
    queued = client.chat.completions.create(stream=True, **ENDLESS)
    server.wait_until(lambda statistics: statistics["waiting"] == 1, "one request waits")
    queued.close()
    server.wait_until(lambda statistics: statistics["waiting"] == 0, "none waits")
    assert server.statistics["running"] == SLOTS
    crowd.close()
    server.wait_until_idle()


def test_giving_up_a_whole_answer(client: OpenAI, server: Served) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5, max_retries=0).chat.completions.create(**ENDLESS)
    server.wait_until_idle()


# --- The asynchronous client -----------------------------------------------------------------------------------------


def asynchronously(server: Served, use: Callable[[AsyncOpenAI], Any]) -> Any:
    async def main() -> Any:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=60) as client:
            return await use(client)

    return asyncio.run(main())


def test_many_streams_at_once(client: OpenAI, server: Served) -> None:
    expected = client.chat.completions.create(messages=QUESTION, max_tokens=12, **GREEDY).choices[0].message.content

    async def one(client: AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(messages=QUESTION, max_tokens=12, stream=True, **GREEDY)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def use(client: AsyncOpenAI) -> list[str]:
        return await asyncio.gather(*(one(client) for _ in range(SLOTS)))

    assert asynchronously(server, use) == [expected] * SLOTS


def test_a_task_that_is_cancelled_leaves(server: Served) -> None:
    async def use(client: AsyncOpenAI) -> None:
        for fields in ({"stream": True}, {}):
            task = asyncio.create_task(read(client, fields))
            await asyncio.to_thread(server.wait_until, lambda statistics: statistics["running"] == 1, "it runs")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(server.wait_until_idle)

    async def read(client: AsyncOpenAI, fields: dict[str, Any]) -> None:
        answer: Any = await client.chat.completions.create(**ENDLESS, **fields)
        async for _ in answer:
            pass

    asynchronously(server, use)


def test_an_asynchronous_schema_and_embedding(server: Served) -> None:
    async def use(client: AsyncOpenAI) -> None:
        answer = await client.chat.completions.parse(messages=PERSON, response_format=Person, max_tokens=100, **GREEDY)
        assert answer.choices[0].message.parsed is not None
        embedded = await client.embeddings.create(model=MODEL, input="x")
        assert len(embedded.data[0].embedding) > 100

    asynchronously(server, use)


# --- The documentation -----------------------------------------------------------------------------------------------


def test_the_three_lines_of_the_documentation(server: Served) -> None:
    page = (Path(__file__).parents[2] / "docs" / "openai.md").read_text(encoding="utf-8")
    lines = page.partition("```sh\n")[2].partition("```")[0].replace("http://127.0.0.1:8080", server.url)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euc", lines], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Paris")
