"""LangChain's client for OpenAI, unmodified, against the default model."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

from tests.clients.served import MODEL, Served

MESSAGES = [SystemMessage("Be brief."), HumanMessage("Count from one to ten.")]


class City(BaseModel):
    """A city."""

    name: str
    country: str


def chat(server: Served, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=SecretStr("any"), model=MODEL, temperature=0, **{"max_tokens": 12} | more
    )


def test_a_chat(server: Served) -> None:
    whole = chat(server).invoke(MESSAGES)
    assert whole.content
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    assert whole.response_metadata["model_name"] == MODEL
    assert whole.usage_metadata is not None
    assert 0 < whole.usage_metadata["output_tokens"] <= 12
    total: Any = AIMessageChunk(content="")
    for chunk in chat(server, stream_usage=True).stream(MESSAGES):
        total += chunk
    assert total.content == whole.content
    assert total.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]


def test_log_probabilities(server: Served) -> None:
    answer = chat(server, logprobs=True, top_logprobs=2, max_tokens=3).invoke(MESSAGES)
    tokens = answer.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == answer.content


def test_a_batch_and_a_task(server: Served) -> None:
    model = chat(server)
    first, second = model.batch([MESSAGES, MESSAGES])
    assert first.content == second.content
    assert asyncio.run(model.ainvoke(MESSAGES)).content == first.content


def test_a_schema(server: Served) -> None:
    model = chat(server, max_tokens=200).with_structured_output(City, method="json_schema")
    assert isinstance(model.invoke("Name the capital of France and its country. Answer with JSON."), City)


def test_tools_are_refused_by_name(server: Served) -> None:
    model = chat(server).bind_tools([City])
    with pytest.raises(openai.BadRequestError) as caught:
        model.invoke(MESSAGES)
    assert caught.value.param == "tools"


def test_a_stream_that_is_left(server: Served) -> None:
    stream = chat(server, max_tokens=None, logit_bias={0: -100, 2: -100}, extra_body={"shift": True}).stream(MESSAGES)
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    server.wait_until_idle()


def test_completions(server: Served) -> None:
    model = OpenAI(base_url=f"{server.url}/v1", api_key=SecretStr("any"), model=MODEL, temperature=0, max_tokens=4)
    text = model.invoke("The capital of France is")
    assert text.startswith(" Paris")
    assert "".join(model.stream("The capital of France is")) == text
    assert model.batch(["The capital of France is", "One, two,"])[0] == text


def embeddings(server: Served, **more: Any) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(base_url=f"{server.url}/v1", api_key=SecretStr("any"), model=MODEL, **more)


def test_embeddings(server: Served) -> None:
    model = embeddings(server, check_embedding_ctx_length=False)
    vectors = model.embed_documents(["one", "two"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(model.embed_query("one"), vectors[0], atol=2e-3)


def test_embeddings_of_tokens_say_how_to_send_texts(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default this client sends tokens of OpenAI's tokenizer, which it would fetch from the network."""

    class Tokenizer:
        def encode(self, text: str, **more: Any) -> list[int]:
            return [*text.encode()]

        encode_ordinary = encode

    monkeypatch.setattr("tiktoken.encoding_for_model", lambda name: Tokenizer())
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False") as caught:
        embeddings(server).embed_query("one")
    assert caught.value.param == "input"
