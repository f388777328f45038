"""Answers in OpenAI's dialect, byte for byte."""

from __future__ import annotations

import base64
import itertools
import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.errors import (
    EngineBroken,
    EngineBusy,
    InvalidGrammar,
    InvalidRequest,
    PromptTooLong,
    RequestError,
    RunnerError,
    UnknownModel,
    Unsupported,
)
from trio_runner.events import Embedded, Event, Finished, PromptProgress, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.info import Capabilities, ModelInfo
from trio_runner.server.dialects.openai import responses, responses_stream
from trio_runner.server.dialects.openai.logprobs import TextOffsets, chat_logprobs
from trio_runner.server.dialects.openai.responses import Gathered, Head
from trio_runner.server.problems import Problem, problem

HEAD = Head("chatcmpl-1", 1700000000, "m")
FINGERPRINT = responses.FINGERPRINT.encode()
BEGIN = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"m",'
    b'"system_fingerprint":"' + FINGERPRINT + b'",'
)
TEXT_BEGIN = BEGIN.replace(b"chat.completion.chunk", b"text_completion")
REST = b',"logprobs":null,"finish_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"
END = Finished("stop", Usage(3, 1, 5))
A = SampledToken(5, b"a", -0.5, (TokenInfo(5, b"a", -0.5), TokenInfo(6, b"\xe4", -math.inf)))
HALF = SampledToken(7, b"\xc3", math.nan)


def chat_stream(n_choices: int = 1, n: int = 1, include_usage: bool = False) -> responses_stream.ChatStream:
    return responses_stream.ChatStream(HEAD, n_choices=n_choices, n=n, include_usage=include_usage)


def text_stream(n_choices: int = 1, n: int = 1, n_top: int = -1) -> responses_stream.TextStream:
    return responses_stream.TextStream(HEAD, n_top=n_top, n_choices=n_choices, n=n, include_usage=False)


# --- Streams ---------------------------------------------------------------------------------------------------------


def test_a_streamed_chat() -> None:
    stream = chat_stream()
    assert stream.opening() == BEGIN + (b'"choices":[{"index":0,"delta":{"role":"assistant","content":""}' + REST)
    assert stream.event((0, PromptProgress(1, 2, 0))) == b""
    assert stream.event((0, TextPiece('Par"is'))) == BEGIN + (
        b'"choices":[{"index":0,"delta":{"content":"Par\\"is"}' + REST
    )
    assert stream.event((0, END)) == BEGIN + (
        b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}\n\n' + DONE
    )


def test_a_streamed_completion() -> None:
    stream = text_stream()
    assert stream.opening() == b": accepted\n\n"
    assert stream.event((0, TextPiece("é"))) == TEXT_BEGIN + '"choices":[{"index":0,"text":"é"'.encode() + REST
    assert stream.event((0, Finished("deadline", Usage()))) == TEXT_BEGIN + (
        b'"choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"length","stop_reason":"deadline"}]}\n\n'
        + DONE
    )


def test_a_streamed_completion_with_echoes() -> None:
    stream = text_stream(4, 2)
    texts = [event["choices"][0] for event in parsed(stream.opening(["one", "two"]))]
    assert [(choice["index"], choice["text"]) for choice in texts] == [(0, "one"), (1, "one"), (2, "two"), (3, "two")]


def test_the_end_of_a_stream_comes_after_the_last_choice() -> None:
    stream = chat_stream(4, 2, include_usage=True)
    roles = [event["choices"][0] for event in parsed(stream.opening())]
    assert [choice["index"] for choice in roles] == [0, 1, 2, 3]
    first = [stream.event((index, Finished("stop", Usage(10, index, 2)))) for index in (3, 0, 2)]
    assert not any(DONE in written for written in first)
    last = stream.event((1, Finished("length", Usage(10, 1, 2))))
    assert last.endswith(
        b'"total_tokens":28,"prompt_tokens_details":{"cached_tokens":2},'
        b'"completion_tokens_details":{"reasoning_tokens":0}}}\n\n' + DONE
    )
    choice, usage = parsed(last)
    assert (choice["choices"][0]["finish_reason"], choice["usage"]) == ("length", None)
    assert (usage["choices"], usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == ([], 20, 8)


@pytest.mark.parametrize(
    ("finished", "reason", "stop"),
    [
        (Finished("stop", Usage()), "stop", None),
        (Finished("stop", Usage(), stop="\n"), "stop", "\n"),
        (Finished("length", Usage()), "length", None),
        (Finished("deadline", Usage()), "length", "deadline"),
    ],
)
def test_reasons(finished: Finished, reason: str, stop: str | None) -> None:
    for stream in (chat_stream(), text_stream()):
        [event] = parsed(stream.event((0, finished)))
        assert (event["choices"][0]["finish_reason"], event["choices"][0]["stop_reason"]) == (reason, stop)


def test_an_error_ends_a_stream() -> None:
    assert chat_stream().failure(EngineBroken("it died")) == (
        b'data: {"error":{"message":"it died","type":"server_error","param":null,"code":"engine_broken"}}\n\n'
    )
    assert b"internal error" in chat_stream().failure(KeyError("secret"))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\u2028\u2029\x85\n\r"\\'))


@given(TEXTS)
def test_every_text_is_one_line_to_every_reader(text: str) -> None:
    written = chat_stream().event((0, TextPiece(text)))
    assert len(written.decode().strip().splitlines()) == 1
    [event] = parsed(written)
    assert event["choices"][0]["delta"] == {"content": text}


@given(st.lists(st.tuples(st.integers(0, 2), TEXTS)), st.permutations(range(3)))
def test_the_events_of_a_stream_are_of_its_type(pieces: list[tuple[int, str]], order: list[int]) -> None:
    """What is put together by hand is what msgspec would read, and describes in /openapi.json."""
    arrived: list[tuple[int, Event]] = [(index, TextPiece(text, (A,))) for index, text in pieces]
    arrived += [(index, END) for index in order]
    for stream, kind in (
        (chat_stream(3, 3, include_usage=True), responses_stream.ChatCompletionChunk),
        (text_stream(3, 3, n_top=1), responses.TextCompletion),
    ):
        written = stream.opening() + b"".join(map(stream.event, arrived))
        *events, done = written.split(b"\n\n")[:-1]
        assert done == b"data: [DONE]"
        read: list[Any] = [
            msgspec.json.decode(complete(event.removeprefix(b"data: ")), type=kind)
            for event in events
            if not event.startswith(b":")
        ]
        for index in range(3):
            choices = [choice for event in read for choice in event.choices if choice.index == index]
            said = [getattr(choice, "text", None) or getattr(choice, "delta", None) for choice in choices]
            texts = [one if isinstance(one, str) else (one.content or "") for one in said if one is not None]
            assert "".join(texts) == "".join(text for at, text in pieces if at == index)


def complete(event: bytes) -> bytes:
    """An event with the usage that only the last one has."""
    return msgspec.json.encode({"usage": None} | json.loads(event))


def parsed(written: bytes) -> list[dict[str, Any]]:
    """The data of each event, without [DONE]."""
    events = [event for event in written.split(b"\n\n") if event and event != b"data: [DONE]"]
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


# --- Whole answers ---------------------------------------------------------------------------------------------------


def gathered(*pairs: tuple[int, Event], n_choices: int = 1) -> Gathered:
    answer = Gathered(n_choices)
    for index, event in pairs:
        answer.push(index, event)
    return answer


USAGE = (
    b'"usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8,"prompt_tokens_details":{"cached_tokens":1},'
    b'"completion_tokens_details":{"reasoning_tokens":0}},"system_fingerprint":"' + FINGERPRINT + b'"}'
)


def test_a_whole_chat() -> None:
    answer = gathered((0, PromptProgress(1, 2, 0)), (0, TextPiece("Par")), (0, TextPiece("is")), (0, END))
    assert responses.chat_completion(HEAD, answer, n=1, logprobs=False) == (
        b'{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":"m","choices":[{"index":0,'
        b'"message":{"role":"assistant","content":"Paris","refusal":null},"logprobs":null,"finish_reason":"stop",'
        b'"stop_reason":null}],' + USAGE
    )


def test_a_whole_completion() -> None:
    answer = gathered((0, TextPiece(" Paris")), (0, END))
    assert responses.text_completion(HEAD, answer, n=1, n_top=-1, echoes=[]) == (
        b'{"id":"chatcmpl-1","object":"text_completion","created":1700000000,"model":"m","choices":[{"index":0,'
        b'"text":" Paris","logprobs":null,"finish_reason":"stop","stop_reason":null}],' + USAGE
    )
    echoed = json.loads(responses.text_completion(HEAD, answer, n=1, n_top=-1, echoes=["Is it"]))
    assert echoed["choices"][0]["text"] == "Is it Paris"


def test_several_choices_have_the_usage_of_one_prompt_each() -> None:
    ends = [(index, Finished("stop", Usage(10 + index // 2, 4 * (index % 2), 2))) for index in range(4)]
    answer = gathered(*ends, (0, TextPiece("zero")), (3, TextPiece("three")), n_choices=4)
    whole = json.loads(responses.text_completion(HEAD, answer, n=2, n_top=-1, echoes=["a", "b"]))
    assert [choice["text"] for choice in whole["choices"]] == ["azero", "a", "b", "bthree"]
    assert whole["usage"]["prompt_tokens"] == 21
    assert whole["usage"]["completion_tokens"] == 8
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


# --- Log-probabilities -----------------------------------------------------------------------------------------------


def test_log_probabilities_of_a_chat() -> None:
    assert msgspec.to_builtins(chat_logprobs([A, HALF])) == {
        "content": [
            {
                "token": "a",
                "logprob": -0.5,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "a", "logprob": -0.5, "bytes": [97]},
                    {"token": "\ufffd", "logprob": -9999.0, "bytes": [228]},
                ],
            },
            {"token": "\ufffd", "logprob": -9999.0, "bytes": [195], "top_logprobs": []},
        ],
        "refusal": None,
    }


def test_log_probabilities_of_a_completion() -> None:
    offsets = TextOffsets(2)
    assert msgspec.to_builtins(offsets.logprobs([A, HALF])) == {
        "tokens": ["a", "bytes:\\xc3"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"a": -0.5, "bytes:\\xe4": -9999.0}, {"bytes:\\xc3": -9999.0}],
        "text_offset": [0, 1],
    }
    assert offsets.logprobs([SampledToken(8, b"\xa9", -1.0), A]).text_offset == [1, 2]  # the character is whole now
    assert TextOffsets(0).logprobs([A]).top_logprobs is None


@given(st.text(st.characters(exclude_categories=["Cs"])), st.data())
def test_offsets_are_characters_of_the_text(text: str, data: st.DataObject) -> None:
    encoded = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(encoded)), max_size=5)) | {0, len(encoded)})
    pieces = [encoded[start:end] for start, end in itertools.pairwise(cuts)]
    found = TextOffsets(0).logprobs([SampledToken(1, piece, -1.0) for piece in pieces]).text_offset
    assert found == [len(encoded[:cut].decode(errors="ignore")) for cut in cuts[:-1]]


def test_the_last_tokens_are_reported_if_they_belong_to_the_text() -> None:
    end_token = SampledToken(2, b"", -0.1)
    for finished, n_reported in (
        (Finished("stop", Usage(), tokens=(A, end_token)), 1),
        (Finished("length", Usage(), tokens=(A, HALF)), 2),
        (Finished("stop", Usage(), stop="x", tokens=(A,)), 0),
    ):
        whole = json.loads(responses.chat_completion(HEAD, gathered((0, finished)), n=1, logprobs=True))
        assert len(whole["choices"][0]["logprobs"]["content"]) == n_reported
        [event] = parsed(chat_stream().event((0, finished)))
        assert len((event["choices"][0]["logprobs"] or {"content": []})["content"]) == n_reported


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusal", "status", "error"),
    [
        (
            problem(InvalidRequest("n must be 1", param="n")),
            400,
            {"message": "n must be 1", "type": "invalid_request_error", "param": "n", "code": None},
        ),
        (
            problem(Unsupported("images", param="messages[0].content[1]")),
            400,
            {
                "message": "messages[0].content[1]: this model does not support images",
                "type": "invalid_request_error",
                "param": "messages[0].content[1]",
                "code": "unsupported",
            },
        ),
        (
            problem(UnknownModel("gpt", known=("m",))),
            404,
            {
                "message": "model: there is no 'gpt' here, only 'm'",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            },
        ),
        (
            Problem(401, "no key"),
            401,
            {"message": "no key", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"},
        ),
        (
            problem(KeyError("secret")),
            500,
            {"message": "internal error", "type": "server_error", "param": None, "code": None},
        ),
        (
            responses.not_taken(PromptTooLong(9, 8), {}),
            400,
            {
                "message": "This model's maximum context length is 8 tokens, but prompt has 9.",
                "type": "invalid_request_error",
                "param": "prompt",
                "code": "context_length_exceeded",
            },
        ),
        (
            responses.not_taken(InvalidRequest("content is empty", param="content"), {"content": "input"}),
            400,
            {
                "message": "input is empty",
                "type": "invalid_request_error",
                "param": "input",
                "code": None,
            },
        ),
    ],
)
def test_errors(refusal: Problem, status: int, error: dict[str, Any]) -> None:
    answer = responses.error_answer(refusal)
    assert (answer.status, json.loads(answer.body)) == (status, {"error": error})
    assert answer.headers["Content-Type"] == "application/json"


def test_clients_are_told_when_asking_again_is_worth_it() -> None:
    busy = responses.error_answer(problem(EngineBusy(retry_after=2.5)))
    assert (busy.status, busy.headers["Retry-After"], "x-should-retry" in busy.headers) == (503, "3", False)
    broken = responses.error_answer(problem(EngineBroken("it died")))
    assert (broken.status, broken.headers["x-should-retry"]) == (503, "false")
    wrong = responses.error_answer(problem(InvalidRequest("no", param="n")))
    assert "x-should-retry" not in wrong.headers
    assert len({answer.headers["x-request-id"] for answer in (busy, broken, wrong)}) == 3


@pytest.mark.parametrize(
    ("error", "param", "text"),
    [
        (PromptTooLong(9, 8), "prompt[2]", "maximum context length is 8 tokens, but prompt[2] has 9"),
        (InvalidRequest("prompt is empty", param="prompt"), "prompt[2]", "prompt[2] is empty"),
        (
            InvalidGrammar("json_schema: no", param="json_schema"),
            "response_format.schema",
            "response_format.schema: no",
        ),
        (InvalidRequest("no", param="stop"), "stop", "stop: no"),
    ],
)
def test_errors_name_the_field_of_the_body(error: RequestError, param: str, text: str) -> None:
    refusal = responses.not_taken(error, {"prompt": "prompt[2]", "json_schema": "response_format.schema"})
    assert refusal.param == param
    assert text in refusal.text


# --- Embeddings and models -------------------------------------------------------------------------------------------


def test_embeddings() -> None:
    embedded = [Embedded(np.array([0.1, -2, 1e-7], np.float32), Usage(prompt_tokens=3)), Embedded([1.0], Usage(4))]
    assert responses.embeddings(embedded, "m", as_base64=False) == (
        b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.1,-2.0,1e-07]},'
        b'{"object":"embedding","index":1,"embedding":[1.0]}],"model":"m",'
        b'"usage":{"prompt_tokens":7,"total_tokens":7}}'
    )
    encoded = json.loads(responses.embeddings(embedded, "m", as_base64=True))["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(encoded), "<f4").tolist() == embedded[0].vector.tolist()  # type: ignore[attr-defined]
    with pytest.raises(RunnerError, match="not finite"):
        responses.embeddings([Embedded([math.inf], Usage())], "m", as_base64=True)


def test_models() -> None:
    info = ModelInfo(name="", architecture="", description="", n_vocab=1, n_ctx_train=1, n_embd=1, n_params=9, size=7)
    loaded = (info, Capabilities(n_slots=1, n_ctx=512, max_rows=1))
    assert responses.models(["a", "b"], 5, None) == (
        b'{"object":"list","data":[{"id":"a","created":5,"object":"model","owned_by":"trio-runner"},'
        b'{"id":"b","created":5,"object":"model","owned_by":"trio-runner"}]}'
    )
    assert responses.model_answer("a", 5, loaded) == (
        b'{"id":"a","created":5,"object":"model","owned_by":"trio-runner","context_length":512,"parameters":9,"bytes":7}'
    )
