"""OpenAI's chat completions, as a client reads and writes them."""

from __future__ import annotations

import json

import pytest

from trio_runner.cli.chat.model import AnswerEvent, ChatError, ConversationTooLong, Ended, Said, Thought
from trio_runner.cli.chat.openai import AnswerReader, base_url, chat_body, first_model, refusal


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1"),
        ("127.0.0.1:8080/", "http://127.0.0.1:8080/v1"),
        ("localhost:1234/v1/", "http://localhost:1234/v1"),
        ("https://x.org/api", "https://x.org/api/v1"),
        ("https://x.org/v1beta/openai/", "https://x.org/v1beta/openai"),
        ("https://x.org/v1/chat/completions", "https://x.org/v1"),
        ("http://[::1]:80", "http://[::1]:80/v1"),
    ],
)
def test_the_version_is_added_to_a_url_without_one(url: str, base: str) -> None:
    assert base_url(url) == base


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://x:99999", "http://x?y=1", "http://x#y", "http://[x"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        base_url(url)


def test_the_body_of_a_request() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert chat_body("m", messages, {"seed": 1}) == {"model": "m", "messages": messages, "stream": True, "seed": 1}


def delta(reason: str | None = None, **fields: object) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]})


ANSWERS: list[tuple[list[str], list[AnswerEvent]]] = [
    (
        [delta(role="assistant"), delta(content="he"), delta(content="llo"), delta("stop"), "[DONE]"],
        [Said("he"), Said("llo"), Ended()],
    ),
    ([delta(content="x"), "[DONE]"], [Said("x"), Ended()]),
    ([delta(content="x"), delta("stop")], [Said("x"), Ended()]),
    ([delta("stop", content="x"), '{"choices": [], "usage": {}}'], [Said("x"), Ended()]),
    ([delta(reasoning_content="hm"), delta(content=""), delta("stop")], [Thought("hm"), Ended()]),
    ([delta(reasoning="hm", reasoning_content=None), delta("stop")], [Thought("hm"), Ended()]),
    ([delta(refusal="no"), delta("stop")], [Said("no"), Ended()]),
    ([delta(content="\ud800!"), delta("stop")], [Said("?!"), Ended()]),
    (['{"choices": [null]}', '{"choices": [{"delta": null}]}', delta("stop", content=None)], [Ended()]),
]


@pytest.mark.parametrize(("chunks", "events"), ANSWERS)
def test_answers(chunks: list[str], events: list[AnswerEvent]) -> None:
    reader = AnswerReader()
    assert [*(event for chunk in chunks for event in reader.push(chunk)), *reader.flush()] == events


@pytest.mark.parametrize("reason", ["length", "content_filter", "tool_calls"])
def test_an_end_that_a_user_should_know_about(reason: str) -> None:
    reader = AnswerReader()
    reader.push(delta(reason))
    [end] = reader.flush()
    assert isinstance(end, Ended)
    assert end.notice


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        ('{"error": {"message": "no\\nmemory"}}', "the server reports an error: no memory"),
        ('{"error": "no memory"}', "no memory"),
        ('{"error": {"code": 1}}', '{"code": 1}'),
        ("what?", "no part of an answer: what?"),
        ("[]", "no part of an answer"),
        ("{}", "no part of an answer"),
        ('{"choices": 1}', "no part of an answer"),
        ("[" * 100_000, "no part of an answer"),
    ],
)
def test_what_is_no_chunk(chunk: str, words: str) -> None:
    with pytest.raises(ChatError) as caught:
        AnswerReader().push(chunk)
    assert words in str(caught.value)


def test_a_stream_that_breaks_off() -> None:
    reader = AnswerReader()
    reader.push(delta(content="x"))
    with pytest.raises(ChatError, match="the connection ended before the answer did"):
        reader.flush()


def test_an_answer_that_is_no_stream() -> None:
    reader = AnswerReader()
    body = {"choices": [{"message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}]}
    assert [*reader.push_whole(json.dumps(body).encode()), *reader.flush()] == [Said("hello"), Ended()]


def test_the_first_model() -> None:
    assert first_model(b'{"object": "list", "data": [{"id": "one"}, {"id": "two"}]}') == "one"
    for body in (b"", b"[]", b"{}", b'{"data": [1]}', b'{"data": []}'):
        with pytest.raises(ChatError):
            first_model(body)


@pytest.mark.parametrize(
    ("status", "body", "has_key", "words"),
    [
        (401, b"", False, "the server wants an API key (401). Give --api-key-file, or set OPENAI_API_KEY"),
        (401, b'{"error": {"message": "bad key"}}', True, "the server refuses the API key (401): bad key"),
        (404, b'{"error": {"message": "no model x"}}', False, "the server answered 404: no model x"),
        (404, b'{"detail": "Not Found"}', False, "the server answered 404: Not Found"),
        (502, b"<html>\nbad gateway", False, "the server answered 502"),
        (500, b"oh\nno", False, "the server answered 500: oh no"),
    ],
)
def test_a_refusal_is_one_line(status: int, body: bytes, has_key: bool, words: str) -> None:
    assert str(refusal(status, body, has_key=has_key)) == words


def test_a_refusal_of_what_is_too_long() -> None:
    for error in ({"code": "context_length_exceeded"}, {"code": 400, "type": "exceed_context_size_error"}):
        body = json.dumps({"error": {"message": "too long", **error}}).encode()
        assert isinstance(refusal(400, body, has_key=False), ConversationTooLong)
    assert not isinstance(refusal(400, b'{"error": {"code": ["x"]}}', has_key=False), ConversationTooLong)
