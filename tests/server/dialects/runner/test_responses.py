"""Answers in the runner's dialect, byte for byte."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.errors import (
    EngineBroken,
    EngineBusy,
    InvalidGrammar,
    InvalidRequest,
    LoadError,
    NativeError,
    RunnerError,
)
from trio_runner.events import Embedded, Finished, PromptProgress, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.info import AdapterInfo, Capabilities, Device, MemoryUse, ModelInfo, Placement
from trio_runner.server.dialects.runner import requests, responses

A = TokenInfo(5, b"a", -0.5)


ZEROS = b'"timings":{"predicted_n":0,"predicted_ms":0,"prompt_n":0,"prompt_ms":0}'


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (PromptProgress(1, 2, 0), b""),
        (TextPiece("Paris"), b'{"content":"Paris","stop":false,' + ZEROS + b"}\n"),
        (TextPiece(" é😀"), '{"content":" é😀","stop":false,'.encode() + ZEROS + b"}\n"),
        (
            TextPiece('<a&b>"\\\n\t\b\f\x01\x7f\u2028\u2029'),
            rb'{"content":"\u003ca\u0026b\u003e\"\\\n\t\b\f\u0001' + b"\x7f" + rb'\u2028\u2029","stop":false,'
            + ZEROS + b"}\n",
        ),
        (
            Finished("stop", Usage(3, 1, 5, 0.0129, 1.9999)),
            b'{"content":"","stop":true,'
            b'"timings":{"predicted_n":5,"predicted_ms":1999,"prompt_n":3,"prompt_ms":12,"cache_n":1}}\n',
        ),
        (
            Finished("length", Usage(3, 0, 5, 0, 0)),
            b'{"content":"","stop":true,"stopped_limit":true,'
            b'"timings":{"predicted_n":5,"predicted_ms":0,"prompt_n":3,"prompt_ms":0,"cache_n":0}}\n',
        ),
        (
            Finished("deadline", Usage(3, 2)),
            b'{"content":"","stop":true,"stopped_deadline":true,'
            b'"timings":{"predicted_n":0,"predicted_ms":0,"prompt_n":3,"prompt_ms":0,"cache_n":2}}\n',
        ),
        (
            TextPiece("a", (SampledToken(5, b"a", -0.5, (A, TokenInfo(6, b"\xe4", -math.inf))),)),
            b'{"content":"a","stop":false,"completion_probabilities":[{"id":5,"token":"a","bytes":[97],"logprob":-0.5,'
            b'"top_logprobs":[{"id":5,"token":"a","bytes":[97],"logprob":-0.5},'
            b'{"id":6,"token":"\xef\xbf\xbd","bytes":[228],"logprob":-3.4028235e+38}]}],' + ZEROS + b"}\n",
        ),
        (
            Finished("stop", Usage(), tokens=(SampledToken(2, b"", math.nan),)),
            b'{"content":"","stop":true,"completion_probabilities":[{"id":2,"token":"","bytes":[],'
            b'"logprob":-3.4028235e+38,"top_logprobs":[]}],' + ZEROS[:-1] + b',"cache_n":0}}\n',
        ),
    ],
)  # fmt: skip
def test_lines_are_exactly_the_original_ones(event: Any, line: bytes) -> None:
    assert responses.CompletionLines().event(event) == line


def test_failures_are_a_line_that_ends_the_answer() -> None:
    line = responses.CompletionLines().failure(EngineBroken("the decode thread <died>\nbadly"))
    assert line == (rb'{"error":"the decode thread \u003cdied\u003e badly","content":"","stop":true,' + ZEROS + b"}\n")
    assert b"secret" not in responses.CompletionLines().failure(KeyError("secret"))


@given(st.text())
def test_text_survives_the_wire_on_one_line(text: str) -> None:
    line = responses.CompletionLines().event(TextPiece(text))
    assert line.count(b"\n") == 1
    assert not set(b"<>&") & set(line)
    assert json.loads(line)["content"] == text


@pytest.mark.parametrize("text", ["", "a", "<&>\u2028\u2029" * 40_000, "é😀" * 40_000, '"\\\n' * 40_000])
def test_content_survives_the_wire_however_long(text: str) -> None:
    line = responses.content_line(text)
    assert line == f'{{"content":{_quoted(text)}}}\n'.encode()


def _quoted(text: str) -> str:
    """As the original does it."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(f"\\u{ord(c):04x}" if c in "<>&\u2028\u2029" else c for c in quoted)


@pytest.mark.parametrize("n_tokens", [0, 1, 65_536, 200_000])
def test_tokens_survive_the_wire_however_many(n_tokens: int) -> None:
    tokens = list(range(n_tokens))
    assert responses.tokens_line(tokens) == json.dumps({"tokens": tokens}, separators=(",", ":")).encode() + b"\n"


def test_halves_of_surrogate_pairs_become_question_marks() -> None:
    assert responses.content_line("a\ud800<") == b'{"content":"a?\\u003c"}\n'


def test_embeddings_are_shortest_float32() -> None:
    line = responses.embedding_line(Embedded(np.array([0.1, -2.0, 1e-7, 3.4e38], np.float32), Usage()))
    assert line == b'{"embedding":[0.1,-2.0,1e-07,3.4e+38]}\n'


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_embeddings_survive_the_wire(values: list[float]) -> None:
    line = responses.embedding_line(Embedded(np.array(values, np.float32), Usage()))
    assert np.array(json.loads(line)["embedding"], np.float32).tolist() == values


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=5)))
def test_lists_of_embeddings_survive_the_wire(values: list[list[float]]) -> None:
    line = responses.embeddings_line([Embedded(np.array(vector, np.float32), Usage()) for vector in values])
    assert line.endswith(b"\n")
    vectors = json.loads(line)["embeddings"]
    assert [np.array(vector, np.float32).tolist() for vector in vectors] == values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_embeddings_are_finite(value: float) -> None:
    embedded = Embedded(np.array([1, value], np.float32), Usage())
    with pytest.raises(RunnerError):
        responses.embedding_line(embedded)
    with pytest.raises(RunnerError):
        responses.embeddings_line([Embedded(np.array([1.0], np.float32), Usage()), embedded])
    with pytest.raises(RunnerError):
        responses.rerank_line([1.0, value], None)


@pytest.mark.parametrize(
    ("scores", "top_n", "line"),
    [
        ([], None, b'{"results":[]}\n'),
        ([0.5], 9, b'{"results":[{"index":0,"relevance_score":0.5}]}\n'),
        (
            [np.float32(0.1), -1e-7],
            None,
            b'{"results":[{"index":0,"relevance_score":0.1},{"index":1,"relevance_score":-1e-07}]}\n',
        ),
        ([1.0, 3.0, 3.0], 2, b'{"results":[{"index":1,"relevance_score":3},{"index":2,"relevance_score":3}]}\n'),
    ],
)
def test_ranked_lines(scores: list[float], top_n: int | None, line: bytes) -> None:
    assert responses.rerank_line(scores, top_n) == line


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.5, -2.0]) | st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.none() | st.integers(1, 2**63 - 1),
)
def test_the_best_come_first_and_of_equal_ones_the_earlier(scores: list[float], top_n: int | None) -> None:
    results = json.loads(responses.rerank_line(scores, top_n))["results"]
    ranks = [(-scores[result["index"]], result["index"]) for result in results]
    assert ranks == sorted((-score, index) for index, score in enumerate(scores))[:top_n]
    assert all(np.float32(result["relevance_score"]) == scores[result["index"]] for result in results)


def test_adapters_are_told_by_name_without_their_directory() -> None:
    one, two = AdapterInfo("a", "/srv/secret/<é>.gguf", 0.5), AdapterInfo("b", "x.gguf", 1.0)
    objects = [
        b'{"name":"a","file":"\\u003c\xc3\xa9\\u003e.gguf","scale":0.5}',
        b'{"name":"b","file":"x.gguf","scale":1}',
    ]
    assert responses.adapter_line(one) == objects[0] + b"\n"
    assert responses.adapters_line([one, two]) == b'{"adapters":[%b,%b]}\n' % (objects[0], objects[1])
    assert responses.adapters_line([]) == b'{"adapters":[]}\n'


@pytest.mark.parametrize("directory", ["/srv/secret/", "/", "secret/", "/srv/two  blanks/", ""])
@pytest.mark.parametrize(
    "reason", ["no such\nfile", "cannot be read: [Errno 13] Permission denied: '{}'", "{}: {} is bad"]
)
def test_what_is_wrong_with_an_adapter_does_not_tell_its_directory(directory: str, reason: str) -> None:
    path = f"{directory}a.gguf"
    refusal = responses.adapter_problem(LoadError(reason.replace("{}", path), path=path), "a.gguf")
    assert refusal.status == 422
    assert refusal.text == f"file: a.gguf: {' '.join(reason.replace('{}', 'a.gguf').split())}"


@pytest.mark.parametrize(
    ("status", "progress", "line"),
    [
        ("loading", 0.0, b'{"status":"loading model","progress":0}\n'),
        ("loading", 0.1, b'{"status":"loading model","progress":0.1}\n'),
        ("ready", 1.0, b'{"status":"ok","progress":1}\n'),
        ("broken", 0.5, b'{"status":"server error","progress":0.5}\n'),
        ("closing", 1.0, b'{"status":"server error","progress":1}\n'),
        ("closed", 1.0, b'{"status":"server error","progress":1}\n'),
    ],
)
def test_health(status: str, progress: float, line: bytes) -> None:
    assert responses.health_line(status, progress) == line
    assert responses.health_status(status) == (503 if b"error" in line else 200)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            NativeError("trio_step", -3, "<the device>\nis lost"),
            b"trio_step failed with -3: \\u003cthe device\\u003e is lost",
        ),
        (LoadError("not a GGUF file", path="/srv/secret/model.gguf"), b"not a GGUF file"),
        (MemoryError(), b"MemoryError"),
    ],
)
def test_health_says_what_broke_it(failure: Exception, reason: bytes) -> None:
    line = responses.health_line("broken", 1.0, failure)
    assert line == b'{"status":"server error","progress":1,"error":"%b"}\n' % reason


def test_refusals_in_the_words_of_the_original() -> None:
    busy = responses.not_admitted(EngineBusy("full", retry_after=2.5))
    assert (busy.status, busy.text, busy.headers) == (
        503,
        "Failed to load cache: no available cache slots",
        {"Retry-After": "3"},
    )
    bad = responses.not_admitted(InvalidGrammar("no rule named root"))
    assert (bad.status, bad.text) == (400, "Failed to create new sequence: grammar: no rule named root")
    assert responses.not_admitted(EngineBroken("dead")).text == "dead"
    with pytest.raises(InvalidRequest, match="Failed to create new sequence: no input provided"):
        requests.completion(b"{}")


def test_props() -> None:
    info = ModelInfo(
        name="m", architecture="llama", description="llama 1B", n_vocab=8, n_ctx_train=64, n_embd=4, n_params=9, size=7
    )
    capabilities = Capabilities(n_slots=2, n_ctx=32, max_rows=8)
    bare = json.loads(responses.props_line(info, capabilities, None))
    assert bare == {
        "model": {"name": "m", "architecture": "llama", "description": "llama 1B", "parameters": 9, "bytes": 7},
        "slots": 2,
        "context_length": 32,
    }
    device = Device(1, "Vulkan0", "a GPU", "Vulkan", "GPU", 500, 1000)
    memory = (MemoryUse(None, 1, 2, 3), MemoryUse(1, 40, 50, 60))
    placement = json.loads(responses.props_line(info, capabilities, Placement(31, 12, (device,), memory)))["placement"]
    assert placement == {
        "layers": 31,
        "device_layers": 12,
        "devices": [
            {
                "name": "Vulkan0",
                "description": "a GPU",
                "backend": "Vulkan",
                "kind": "GPU",
                "memory_total": 1000,
                "memory_free_before": 500,
                "memory_used": {"model": 40, "context": 50, "compute": 60},
            }
        ],
        "host": {"memory_used": {"model": 1, "context": 2, "compute": 3}},
    }
