"""`langchain-ollama`, as it is, against the default model over real sockets."""

from __future__ import annotations

import asyncio
import base64
import gc
from collections.abc import Iterator
from typing import Any

import ollama
import pydantic
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM

from tests.clients.served import MODEL, Served
from tests.real.pictures import picture

GREEDY: dict[str, Any] = {"temperature": 0, "num_predict": 8}


@pytest.fixture
def model(server: Served) -> Iterator[ChatOllama]:
    model = ChatOllama(model=MODEL, base_url=server.url, validate_model_on_init=True, **GREEDY)
    with model._client:
        yield model


def test_chat(model: ChatOllama) -> None:
    answer = model.invoke("Hello")
    assert str(answer.content).startswith("Hello")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 8
    assert answer.usage_metadata["input_tokens"] > 8
    assert answer.response_metadata["done_reason"] == "length"
    said = [SystemMessage("You speak French."), HumanMessage("Hello"), AIMessage("Bonjour"), HumanMessage("Hello")]
    assert model.invoke(said).content != answer.content


def test_streams(model: ChatOllama) -> None:
    chunks = list(model.stream("Hello"))
    assert len(chunks) > 4
    assert "".join(str(chunk.content) for chunk in chunks) == model.invoke("Hello").content


def test_async(model: ChatOllama) -> None:
    async def ask() -> tuple[str, str]:
        async with model._async_client:
            whole = await model.ainvoke("Hello")
            return str(whole.content), "".join([str(chunk.content) async for chunk in model.astream("Hello")])

    whole, streamed = asyncio.run(ask())
    assert whole == streamed == model.invoke("Hello").content


class Mood(pydantic.BaseModel):
    mood: str = pydantic.Field(max_length=12)
    strength: int = pydantic.Field(ge=0, le=9)


@pytest.mark.parametrize("schema", [Mood, Mood.model_json_schema()], ids=["class", "schema"])
def test_structured_output(model: ChatOllama, schema: Any) -> None:
    answer = model.with_structured_output(schema).invoke("I am so glad!", options={"temperature": 0, "num_predict": 60})
    assert Mood.model_validate(answer).strength <= 9


def test_log_probabilities(model: ChatOllama) -> None:
    answer = model.invoke("Hello", logprobs=True, top_logprobs=2)
    found = answer.response_metadata["logprobs"]
    assert "".join(one["token"] for one in found) == answer.content
    assert len(found[0]["top_logprobs"]) == 2


def test_images(model: ChatOllama) -> None:
    image = base64.b64encode(picture("red", "circle", "white")).decode()
    content: list[str | dict[Any, Any]] = [
        {"type": "image_url", "image_url": f"data:image/png;base64,{image}"},
        {"type": "text", "text": "Describe the image."},
    ]
    assert "red" in str(model.invoke([HumanMessage(content)]).content)


def test_texts(server: Served) -> None:
    model = OllamaLLM(model=MODEL, base_url=server.url, **GREEDY)
    assert model._client is not None
    with model._client:
        assert "".join(model.stream("Hello")) == model.invoke("Hello") != ""


def test_embeddings(server: Served) -> None:
    model = OllamaEmbeddings(model=MODEL, base_url=server.url)
    assert model._client is not None
    with model._client:
        first, second = model.embed_documents(["The sky is blue.", "It rains."])
        assert len(first) == len(second) == 576
        assert model.embed_query("It rains.") == pytest.approx(second, abs=1e-2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_errors(server: Served, model: ChatOllama) -> None:
    cases: list[tuple[int, str, Any]] = [
        (404, "model 'llama3' not found", lambda: model.invoke("Hello", model="llama3")),
        (400, "tools", lambda: model.bind_tools([Mood]).invoke("Hello")),
        (400, "think", lambda: model.invoke("Hello", reasoning=True)),
        (400, "options.temperature", lambda: model.invoke("Hello", options={"temperature": 1e9})),
    ]
    for status, text, call in cases:
        with pytest.raises(ollama.ResponseError, match=text) as caught:
            call()
        assert caught.value.status_code == status
    with pytest.raises(ValueError, match="not found"):
        ChatOllama(model="llama3", base_url=server.url, validate_model_on_init=True)
    gc.collect()  # such a model leaves its connection behind, and the warning about that belongs here
