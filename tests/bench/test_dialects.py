"""Requests and answers of each dialect."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.bench.dialects import DIALECTS, Choice, DialectName, Message, Request, Total

TOP = {"id": 5, "bytes": [32, 97], "logprob": -0.5, "top_logprobs": [{"logprob": -2.5}, {"logprob": -0.5}]}

ANSWERS: list[tuple[DialectName, bytes, list[Message]]] = [
    (
        "runner",
        b'{"content":" a","stop":false,"timings":{"predicted_n":0}}\n'
        b'{"content":"","stop":true,"timings":{"predicted_n":1,"prompt_n":9,"cache_n":4}}\n',
        [Message(" a"), Message(total=Total(9, 5, 1))],
    ),
    ("runner", b'{"content":"","stop":true,"timings":{"prompt_n":9}}\n', [Message(total=Total(9, None, None))]),
    ("runner", b'{"error":"broken","content":"","stop":true}\n', [Message(error="broken")]),
    (
        "runner",
        json.dumps({"content": " a", "completion_probabilities": [TOP]}).encode() + b"\n",
        [Message(" a", (Choice(b" a", (-0.5, -2.5), -0.5, 5),))],
    ),
    (
        "llama",
        b"data: " + json.dumps({"index": 1, "content": " a", "completion_probabilities": [TOP]}).encode() + b"\n\n",
        [Message(" a", (Choice(b" a", (-0.5, -2.5), -0.5, 5, answer=1),))],
    ),
    (
        "llama",
        b': a comment\n\ndata: {"content":" a","stop":false}\n\n'
        b'data: {"content":"","stop":true,"timings":{"prompt_n":5,"cache_n":4,"predicted_n":1}}\r\n\r\n',
        [Message(" a"), Message(total=Total(9, 5, 1))],
    ),
    ("llama", b'{"content":" a b","stop":true,"timings":{}}', [Message(" a b", total=Total(None, None, None))]),
    ("llama", b'data: {"error":{"code":500,"message":"broken"}}\n\n', [Message(error="broken")]),
    (
        "openai",
        b'event: x\ndata: {"choices":[{"text":" a","finish_reason":null}],"usage":null}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1,"prompt_tokens_details":null}}\n\n'
        b"data: [DONE]\n\n",
        [Message(" a"), Message(total=Total(9, None, 1))],
    ),
    (
        "openai",
        b'data: {"choices":[{"text":"","finish_reason":"length"}],"timings":{"prompt_n":5,"cache_n":4}}\n\n',
        [Message(total=Total(9, 5, None))],
    ),
    (
        "openai",
        b'{"choices":[{"index":1,"text":" a","finish_reason":"stop","logprobs":'
        b'{"tokens":[" a"],"token_logprobs":[-1.0],"top_logprobs":[{" a":-1,"b":-3}]}}]}',
        [Message(" a", (Choice(b" a", (-1.0, -3.0), -1.0, answer=1),))],
    ),
    (
        "openai-chat",
        b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n: a comment\n\n'
        b'data: {"choices":[{"delta":{"content":" a"},"logprobs":{"content":[{"bytes":[32,97],"logprob":-0.5,'
        b'"top_logprobs":[{"logprob":-2.5},{"logprob":-0.5}]}]}}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":1}}\n\ndata: [DONE]\n\n',
        [Message(""), Message(" a", (Choice(b" a", (-0.5, -2.5), -0.5),)), Message(total=Total(9, None, 1))],
    ),
    (
        "openai-chat",
        b'{"choices":[{"message":{"content":" a b"},"finish_reason":"stop"}],"usage":{"prompt_tokens":2}}',
        [Message(" a b", total=Total(2, None, None))],
    ),
]


@pytest.mark.parametrize(("name", "body", "messages"), ANSWERS)
@given(data=st.data())
def test_an_answer_is_the_same_however_it_is_split(
    name: DialectName, body: bytes, messages: list[Message], data: st.DataObject
) -> None:
    decoder = DIALECTS[name]().decoder()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    parts = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert [message for part in parts for message in decoder.push(part)] + decoder.flush() == messages


@pytest.mark.parametrize("name", list(DIALECTS))
def test_every_request_is_greedy_and_has_a_length(name: DialectName) -> None:
    fields = DIALECTS[name](model="m").body(Request(prompt="p", max_tokens=5, reuse=True))
    assert fields.get("prompt") == "p" or fields["messages"] == [{"role": "user", "content": "p"}]
    assert fields["temperature"] == 0
    assert fields["cache_prompt"] is True
    assert fields.get("n_predict", fields.get("max_tokens")) == 5


def test_several_answers_and_a_priority_are_asked_for_by_their_names() -> None:
    request = Request(prompt="p", max_tokens=5, n_answers=2, background=True)
    bodies = {name: DIALECTS[name]().body(request) for name in DIALECTS}
    assert {body["priority"] for body in bodies.values()} == {"background"}
    assert [bodies[name].get("n", bodies[name].get("n_cmpl")) for name in DIALECTS] == [None, 2, 2, 2]
    assert [DIALECTS[name].max_answers > 1 for name in DIALECTS] == [False, True, True, True]
    plain = DIALECTS["llama"]().body(Request(prompt="p", max_tokens=5))
    assert not plain.keys() & {"priority", "n_cmpl"}


def test_tokens_that_would_end_a_stream_are_forbidden() -> None:
    request = Request(prompt="p", max_tokens=5)
    assert DIALECTS["runner"](forbidden=(2, 7)).body(request)["logit_bias"] == [[2, False], [7, False]]
    assert DIALECTS["llama"]().body(request)["ignore_eos"] is True


def test_the_paths_of_a_dialect_may_begin_with_a_base() -> None:
    dialect = DIALECTS["llama"](base="/llama")
    assert (dialect.path, dialect.embedding_path) == ("/llama/completion", "/llama/embedding")
    assert DIALECTS["llama"]().path == "/completion"
