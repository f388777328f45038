"""Errors that only the engine can find name the field of the body, in every dialect."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.toys import Toy
from tests.server.client import post, serving
from trio_runner.errors import InvalidGrammar, InvalidRequest, PromptTooLong, RequestError, UnknownAdapter, Unsupported
from trio_runner.front_door import open_engine
from trio_runner.server.dialects.places import renamed
from trio_runner.testing import N_VOCAB, ToyLoader

LONG = "x" * 9000
UNKNOWN = N_VOCAB + 9


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (InvalidRequest("a is odd", param="a"), "b[2] is odd"),
        (InvalidRequest("odd", param="a"), "b[2]: odd"),
        (PromptTooLong(9, 8, param="a"), "b[2] has 9 tokens, but at most 8 fit"),
        (InvalidGrammar("no root", param="a"), "b[2]: no root"),
        (Unsupported("that", param="a"), "b[2]: this model does not support that"),
        (UnknownAdapter("one", param="a"), "b[2]: there is no adapter 'one'"),
    ],
)
def test_an_error_with_another_name_is_otherwise_the_same(error: RequestError, text: str) -> None:
    other = renamed(error, {"a": "b[2]"})
    assert (str(other), other.param) == (text, "b[2]")
    assert type(other) is type(error)
    assert vars(other) == {**vars(error), "param": "b[2]"}
    assert renamed(error, {"c": "d"}) is error


@pytest.mark.parametrize(
    ("path", "fields", "place"),
    [
        ("/v1/completions", {"prompt": [UNKNOWN], "echo": True}, "prompt"),
        ("/v1/completions", {"prompt": ["x", [UNKNOWN]], "echo": True}, "prompt[1]"),
        ("/v1/completions", {"prompt": ["x", ""], "n": 2}, "prompt[1]"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": ["x", LONG]}, "input"),
        ("/api/embed", {"input": ["x", ""]}, "input"),
        ("/api/embeddings", {"prompt": LONG}, "prompt"),
        ("/llama/embedding", {"content": LONG}, "content"),
        ("/llama/embedding", {"input": LONG}, "input"),
        ("/llama/completion", {"prompt": [UNKNOWN]}, "prompt"),
        ("/llama/completion", {"prompt": ["x", LONG], "n": 2}, "prompt[1]"),
        ("/llama/completion", {"prompt": [["x", 1], ["x", UNKNOWN]]}, "prompt[1]"),
    ],
)
async def test_the_field_is_called_what_it_is_called_in_the_body(path: str, fields: dict[str, Any], place: str) -> None:
    async with open_engine(ToyLoader()) as engine, serving(engine) as server:
        answer = await server.ask(post(path, fields))
    assert answer.status == 400
    error = answer.json["error"]
    message = error if isinstance(error, str) else error["message"]
    assert place in message
    assert ("content" in message) == (place == "content")
    if path.startswith("/v1"):
        assert error["param"] == place


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/llama/apply-template"])
async def test_a_variable_of_the_chat_template_is_named_by_its_place(path: str, toy: Toy) -> None:
    toy.info = {"chat_template": "{{ messages[0].content }}"}
    deep: Any = 1
    for _ in range(200):
        deep = {"x": deep}
    async with toy.engine() as engine, serving(engine) as server:
        for name, value in (("never_heard_of", deep), ("documents", [])):
            fields = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {name: value}}
            answer = await server.ask(post(path, fields))
            assert answer.status == 400
            assert f"chat_template_kwargs.{name}" in answer.json["error"]["message"]
