"""The dialect, byte for byte."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.malformed import RIGHT, malformed
from trio_runner.errors import (
    EngineBroken,
    EngineBusy,
    InvalidGrammar,
    InvalidImage,
    InvalidRequest,
    LoadError,
    NativeError,
    RequestError,
    RunnerError,
)
from trio_runner.events import Embedded, Finished, PromptProgress, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.image_source import MAX_IMAGE_BYTES
from trio_runner.info import AdapterInfo, Capabilities, Device, MemoryUse, ModelInfo, Placement
from trio_runner.request import AdapterChoice, EmbedRequest, GenerateRequest, RerankRequest
from trio_runner.sampling import RANDOM_SEED, SamplingParams
from trio_runner.server import runner_api


def completion(**fields: Any) -> GenerateRequest:
    return runner_api.completion(json.dumps({"prompt": "x", **fields}).encode())


def test_defaults() -> None:
    assert completion() == GenerateRequest(
        prompt="x",
        max_tokens=None,
        stop=(),
        sampling=SamplingParams(
            grammar="",
            seed=0xFFFFFFFF,
            top_k=40,
            top_p=0.9,
            min_p=0.0,
            tfs_z=1.0,
            typical_p=1.0,
            repeat_last_n=64,
            temperature=0.8,
            repeat_penalty=1.1,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            mirostat=0,
            mirostat_tau=5.0,
            mirostat_eta=0.1,
            penalize_nl=True,
            logprobs=-1,
        ),
        cache_prompt=False,
        n_keep=4,
        shift=True,
        truncate=True,
    )


def test_null_leaves_every_default() -> None:
    names = [*runner_api._COMPLETION, "unknown"]
    assert completion(**{name: None for name in names if name != "prompt"}) == completion()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_predict": 0}, {"max_tokens": None}),
        ({"n_predict": -7}, {"max_tokens": None}),
        ({"n_predict": 7}, {"max_tokens": 7}),
        ({"n_predict": 2**40}, {"max_tokens": 2**31 - 1}),
        ({"n_keep": -5}, {"n_keep": -1}),
        ({"n_keep": 2**40}, {"n_keep": 2**31 - 1}),
        ({"stop": ["a", None, "é"]}, {"stop": ("a", "", "é")}),
        ({"cache_prompt": True}, {"cache_prompt": True}),
        ({"CACHE_prompt": True}, {"cache_prompt": True}),
        ({"shift": False, "truncate": False}, {"shift": False, "truncate": False}),
        ({"prompt": "[img-0] \0 \u2028"}, {"prompt": "[img-0] \0 \u2028"}),
        ({"image_data": []}, {}),
        ({"image_data": [{"data": "AAEC", "id": 7}]}, {"image_data": ((7, b"\0\1\2"),)}),
        ({"IMAGE_DATA": [{"Data": "\r\nAA\nEC\r\n"}]}, {"image_data": ((0, b"\0\1\2"),)}),
        ({"image_data": [{"data": "AA==", "id": 2**31 - 1, "x": 1}]}, {"image_data": ((2**31 - 1, b"\0"),)}),
        ({"image_data": [{"data": "AAEC", "id": 1}] * 16}, {"image_data": ((1, b"\0\1\2"),) * 16}),
        ({"adapters": []}, {"adapters": ()}),
        ({"adapters": [{"name": "a"}]}, {"adapters": (AdapterChoice("a", 1.0),)}),
        (
            {"adapters": [{"Name": "a", "SCALE": -2}, {"name": "b", "scale": None}]},
            {"adapters": (AdapterChoice("a", -2.0), AdapterChoice("b", 1.0))},
        ),
        ({"priority": "background", "deadline": 2}, {"priority": "background", "deadline": 2.0}),
        ({"priority": "interactive", "deadline": 0.25}, {"deadline": 0.25}),
        ({"stream": False, "num_ctx": 5, "use_mmap": False, "whatever": {"deep": [1]}}, {}),
    ],
)
def test_requests(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert completion(**fields) == dataclasses.replace(completion(), **expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"seed": -1}, {"seed": RANDOM_SEED}),
        ({"seed": -2}, {"seed": 0xFFFFFFFE}),
        ({"seed": 2**32 + 5}, {"seed": 5}),
        ({"seed": -(2**63)}, {"seed": 0}),
        ({"repeat_last_n": -1}, {"repeat_last_n": 64}),
        ({"repeat_last_n": -(2**40)}, {"repeat_last_n": 64}),
        ({"repeat_last_n": 0}, {"repeat_last_n": 0}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
        ({"logit_bias": [[1, 2], [3, False]]}, {"logit_bias": ((1, 2.0), (3, -math.inf))}),
        ({"logit_bias": {"1": 2, "3": False}}, {"logit_bias": ((1, 2.0), (3, -math.inf))}),
        ({"n_probs": 0}, {"logprobs": -1}),
        ({"n_probs": 3}, {"logprobs": 3}),
        ({"logprobs": 0}, {"logprobs": 0}),
        ({"logprobs": 2, "n_probs": 5}, {"logprobs": 2}),
        ({"dry_sequence_breakers": ["x"]}, {"dry_sequence_breakers": ("x",)}),
        ({"xtc_probability": 1, "dynatemp_range": 0.5}, {"xtc_probability": 1.0, "dynatemp_range": 0.5}),
    ],
)
def test_sampling(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert completion(**fields).sampling == dataclasses.replace(completion().sampling, **expected)


def test_every_sampler_of_the_engine_can_be_asked_for() -> None:
    ours = {field.name for field in dataclasses.fields(SamplingParams)}
    assert ours <= runner_api._COMPLETION.keys()


@pytest.mark.parametrize(
    ("body", "n_predict"),
    [
        (b'{"prompt":"x","n_predict":5} {"n_predict":6} rubbish', 5),
        (b' \r\n\t{"prompt":"x","n_predict":5}', 5),
        (b'{"prompt":"x","n_predict":5,"N_PREDICT":6}', 6),
        (b'{"prompt":"x","n_predict":5,"N_PREDICT":6,"n_predict":7}', 7),
        (b'{"prompt":"x","n_predict":5,"n_predict":null}', 5),
        ('{"prompt":"x","n_predi\u212at":1,"n_predict":5}'.encode(), 5),
    ],
)
def test_only_the_first_value_and_the_last_duplicate_count(body: bytes, n_predict: int) -> None:
    assert runner_api.completion(body).max_tokens == n_predict


def test_bytes_that_are_no_utf8_become_replacement_characters() -> None:
    assert runner_api.completion(b'{"prompt":"a\xffb\xe4"}').prompt == "a\ufffdb\ufffd"


def test_a_surrogate_pair_is_one_character() -> None:
    assert runner_api.completion(b'{"prompt":"\\ud83d\\ude00"}').prompt == "\U0001f600"


MANY = runner_api.MAX_VALUES


@pytest.mark.parametrize(
    ("value", "n_values"),
    [
        ("[]", 1),
        ("{}", 1),
        ('""', 1),
        ('"a[b"', 1),
        ('"\\\\"', 1),
        ('"\\""', 1),
        ('"\\\\\\"["', 1),
        ('{"a":1}', 2),
        ("[" * 50 + "]" * 50, 50),
    ],
)
def test_a_body_has_only_so_many_values(value: str, n_values: int) -> None:
    most = (MANY - 3) // n_values  # beside the body, its list and the name of that
    assert runner_api.tokenize(f'{{"z":[{",".join([value] * most)}]}}'.encode()) == ("", False, True)
    with pytest.raises(InvalidRequest, match=f"but at most {MANY} are allowed"):
        runner_api.tokenize(f'{{"z":[{",".join([value] * (most + 1))}]}}'.encode())


def test_text_and_numbers_do_not_count() -> None:
    text = '[{"\\' * MANY
    assert runner_api.tokenize(json.dumps({"content": text}).encode())[0] == text
    tokens = list(range(2 * MANY))
    assert runner_api.detokenize(json.dumps({"tokens": tokens}).encode()) == tuple(tokens)


PARSERS: dict[str, Callable[[bytes], object]] = {
    "/completion": runner_api.completion,
    "/embedding": runner_api.embedding,
    "/rerank": runner_api.rerank,
    "/adapters": runner_api.adapter,
    "/tokenize": runner_api.tokenize,
    "/detokenize": runner_api.detokenize,
}
CASES = list(malformed())


def test_there_are_enough_malformed_requests() -> None:
    assert len(set(CASES)) >= 400


def test_malformed_requests_name_the_field() -> None:
    for path, body, name in CASES:
        with pytest.raises(RequestError) as caught:
            PARSERS[path](body)
        assert name in str(caught.value), (path, body[:80])
        assert caught.value.param is None or caught.value.param.startswith(name)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.integers(-(2**70), 2**70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


FIELDS: dict[str, dict[str, Any]] = {
    "/completion": runner_api._COMPLETION,
    "/embedding": runner_api._EMBEDDING,
    "/rerank": runner_api._RERANK,
    "/adapters": runner_api._ADAPTER,
}


@pytest.mark.parametrize("path", FIELDS)
@given(st.data(), st.booleans())
def test_any_value_is_accepted_or_refused_by_name(path: str, data: st.DataObject, with_what_is_needed: bool) -> None:
    fields = data.draw(st.dictionaries(st.sampled_from([*FIELDS[path]]), JSON, max_size=4))
    if with_what_is_needed:
        fields |= json.loads(f"{{{RIGHT[path]}}}")
    refusal = refusal_of(path, fields)
    if refusal is not None:
        assert refusal.param is not None
        assert refusal.param in str(refusal)


def refusal_of(path: str, fields: dict[str, Any]) -> RequestError | None:
    """Of something that is JSON."""
    try:
        PARSERS[path](json.dumps(fields).encode())
    except RequestError as error:
        return None if str(error).lower().startswith("bad request") else error
    return None


PARTS: st.SearchStrategy[Any] = st.dictionaries(
    st.sampled_from(["id", "data", "name", "scale"]), st.sampled_from(["AAAA", "", 1, 0.5]) | JSON
)


@given(
    st.sampled_from([path for path, fields in FIELDS.items() if "adapters" in fields]),
    st.sampled_from(["image_data", "adapters"]),
    st.lists(PARTS | JSON, max_size=3),
)
def test_any_part_of_a_list_is_accepted_or_refused_by_name(path: str, name: str, parts: list[Any]) -> None:
    refusal = refusal_of(path, json.loads(f"{{{RIGHT[path]}}}") | {name: parts})
    if refusal is not None:
        assert refusal.param is not None
        assert refusal.param.startswith(name)
        assert refusal.param in str(refusal)


@given(st.binary(max_size=60))
def test_any_bytes_are_accepted_or_refused(body: bytes) -> None:
    for parse in PARSERS.values():
        with contextlib.suppress(RequestError):
            parse(body)


@given(st.binary(min_size=1, max_size=200), st.sampled_from(["", "\n", "\r\n"]))
def test_images_survive_the_wire(image: bytes, line_break: str) -> None:
    text = base64.b64encode(image).decode()
    lines = line_break.join(text[start : start + 8] for start in range(0, len(text), 8))
    assert completion(image_data=[{"data": lines, "id": 3}]).image_data == ((3, image),)


def test_images_survive_the_wire_however_long() -> None:
    image = random.Random(0).randbytes(3_000_000)
    assert completion(image_data=[{"data": base64.b64encode(image).decode()}]).image_data == ((0, image),)
    too_long = "A" * (MAX_IMAGE_BYTES * 3 // 2 + 4)
    with pytest.raises(InvalidImage, match=rf"image_data\[1\]\.data has more than {MAX_IMAGE_BYTES} bytes"):
        completion(image_data=[{"data": "AAAA"}, {"data": too_long}])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"cache_prompt": True}, {}),
        (
            {"normalize": True, "truncate": True, "dimensions": 3},
            {"normalize": True, "truncate": True, "dimensions": 3},
        ),
        ({"adapters": [{"name": "a", "scale": 0.5}]}, {"adapters": (AdapterChoice("a", 0.5),)}),
    ],
)
@pytest.mark.parametrize("content", ["x", ["x"], ["x", "", "x"]])
def test_embeddings(content: str | list[str], fields: dict[str, Any], expected: dict[str, Any]) -> None:
    asked = runner_api.embedding(json.dumps({"content": content, **fields}).encode())
    if isinstance(content, str):
        assert asked == EmbedRequest(content=content, **expected)
    else:
        assert asked == tuple(EmbedRequest(content=text, **expected) for text in content)


def test_rerank() -> None:
    needed = {"query": "q", "documents": ["a", "", "a"]}
    assert runner_api.rerank(json.dumps(needed).encode()) == (RerankRequest(query="q", documents=("a", "", "a")), None)
    asked = RerankRequest(query="q", documents=("a", "", "a"), truncate=True, adapters=(AdapterChoice("x", 2.0),))
    fields = {**needed, "truncate": True, "top_n": 7, "adapters": [{"name": "x", "scale": 2}]}
    assert runner_api.rerank(json.dumps(fields).encode()) == (asked, 7)


def test_adapters() -> None:
    assert runner_api.adapter(b'{"file": "a.gguf"}') == ("a.gguf", None, 0.0)
    assert runner_api.adapter(b'{"FILE": "\xc3\xa9", "name": "b", "scale": -2}') == ("é", "b", -2.0)


def test_tokenize_reads_special_tokens_and_adds_none() -> None:
    assert runner_api.tokenize(b'{"content":"x"}') == ("x", False, True)
    assert runner_api.tokenize(b"{}") == ("", False, True)
    assert runner_api.detokenize(b'{"tokens":[1,2]}') == (1, 2)


# --- Out ---

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
    assert runner_api.CompletionLines().event(event) == line


def test_failures_are_a_line_that_ends_the_answer() -> None:
    line = runner_api.CompletionLines().failure(EngineBroken("the decode thread <died>\nbadly"))
    assert line == (rb'{"error":"the decode thread \u003cdied\u003e badly","content":"","stop":true,' + ZEROS + b"}\n")
    assert b"secret" not in runner_api.CompletionLines().failure(KeyError("secret"))


@given(st.text())
def test_text_survives_the_wire_on_one_line(text: str) -> None:
    line = runner_api.CompletionLines().event(TextPiece(text))
    assert line.count(b"\n") == 1
    assert not set(b"<>&") & set(line)
    assert json.loads(line)["content"] == text


@pytest.mark.parametrize("text", ["", "a", "<&>\u2028\u2029" * 40_000, "é😀" * 40_000, '"\\\n' * 40_000])
def test_content_survives_the_wire_however_long(text: str) -> None:
    line = runner_api.content_line(text)
    assert line == f'{{"content":{_quoted(text)}}}\n'.encode()


def _quoted(text: str) -> str:
    """As the original does it."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(f"\\u{ord(c):04x}" if c in "<>&\u2028\u2029" else c for c in quoted)


@pytest.mark.parametrize("n_tokens", [0, 1, 65_536, 200_000])
def test_tokens_survive_the_wire_however_many(n_tokens: int) -> None:
    tokens = list(range(n_tokens))
    assert runner_api.tokens_line(tokens) == json.dumps({"tokens": tokens}, separators=(",", ":")).encode() + b"\n"


def test_halves_of_surrogate_pairs_become_question_marks() -> None:
    assert runner_api.content_line("a\ud800<") == b'{"content":"a?\\u003c"}\n'


def test_embeddings_are_shortest_float32() -> None:
    line = runner_api.embedding_line(Embedded(np.array([0.1, -2.0, 1e-7, 3.4e38], np.float32), Usage()))
    assert line == b'{"embedding":[0.1,-2.0,1e-07,3.4e+38]}\n'


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_embeddings_survive_the_wire(values: list[float]) -> None:
    line = runner_api.embedding_line(Embedded(np.array(values, np.float32), Usage()))
    assert np.array(json.loads(line)["embedding"], np.float32).tolist() == values


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=5)))
def test_lists_of_embeddings_survive_the_wire(values: list[list[float]]) -> None:
    line = runner_api.embeddings_line([Embedded(np.array(vector, np.float32), Usage()) for vector in values])
    assert line.endswith(b"\n")
    vectors = json.loads(line)["embeddings"]
    assert [np.array(vector, np.float32).tolist() for vector in vectors] == values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_embeddings_are_finite(value: float) -> None:
    embedded = Embedded(np.array([1, value], np.float32), Usage())
    with pytest.raises(RunnerError):
        runner_api.embedding_line(embedded)
    with pytest.raises(RunnerError):
        runner_api.embeddings_line([Embedded(np.array([1.0], np.float32), Usage()), embedded])
    with pytest.raises(RunnerError):
        runner_api.rerank_line([1.0, value], None)


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
    assert runner_api.rerank_line(scores, top_n) == line


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.5, -2.0]) | st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.none() | st.integers(1, 2**63 - 1),
)
def test_the_best_come_first_and_of_equal_ones_the_earlier(scores: list[float], top_n: int | None) -> None:
    results = json.loads(runner_api.rerank_line(scores, top_n))["results"]
    ranks = [(-scores[result["index"]], result["index"]) for result in results]
    assert ranks == sorted((-score, index) for index, score in enumerate(scores))[:top_n]
    assert all(np.float32(result["relevance_score"]) == scores[result["index"]] for result in results)


def test_adapters_are_told_by_name_and_not_where_they_stand() -> None:
    one, two = AdapterInfo("a", "/srv/secret/<é>.gguf", 0.5), AdapterInfo("b", "x.gguf", 1.0)
    objects = [
        b'{"name":"a","file":"\\u003c\xc3\xa9\\u003e.gguf","scale":0.5}',
        b'{"name":"b","file":"x.gguf","scale":1}',
    ]
    assert runner_api.adapter_line(one) == objects[0] + b"\n"
    assert runner_api.adapters_line([one, two]) == b'{"adapters":[%b,%b]}\n' % (objects[0], objects[1])
    assert runner_api.adapters_line([]) == b'{"adapters":[]}\n'


@pytest.mark.parametrize("directory", ["/srv/secret/", "/", "secret/", "/srv/two  blanks/", ""])
@pytest.mark.parametrize(
    "reason", ["no such\nfile", "cannot be read: [Errno 13] Permission denied: '{}'", "{}: {} is bad"]
)
def test_what_is_wrong_with_an_adapter_does_not_tell_where_it_stands(directory: str, reason: str) -> None:
    path = f"{directory}a.gguf"
    refusal = runner_api.adapter_problem(LoadError(reason.replace("{}", path), path=path), "a.gguf")
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
    assert runner_api.health_line(status, progress) == line
    assert runner_api.health_status(status) == (503 if b"error" in line else 200)


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
    line = runner_api.health_line("broken", 1.0, failure)
    assert line == b'{"status":"server error","progress":1,"error":"%b"}\n' % reason


def test_refusals_in_the_words_of_the_original() -> None:
    busy = runner_api.not_admitted(EngineBusy("full", retry_after=2.5))
    assert (busy.status, busy.text, busy.headers) == (
        503,
        "Failed to load cache: no available cache slots",
        {"Retry-After": "3"},
    )
    bad = runner_api.not_admitted(InvalidGrammar("no rule named root"))
    assert (bad.status, bad.text) == (400, "Failed to create new sequence: grammar: no rule named root")
    assert runner_api.not_admitted(EngineBroken("dead")).text == "dead"
    with pytest.raises(InvalidRequest, match="Failed to create new sequence: no input provided"):
        runner_api.completion(b"{}")


def test_props() -> None:
    info = ModelInfo(
        name="m", architecture="llama", description="llama 1B", n_vocab=8, n_ctx_train=64, n_embd=4, n_params=9, size=7
    )
    capabilities = Capabilities(n_slots=2, n_ctx=32, max_rows=8)
    bare = json.loads(runner_api.props_line(info, capabilities, None))
    assert bare == {
        "model": {"name": "m", "architecture": "llama", "description": "llama 1B", "parameters": 9, "bytes": 7},
        "slots": 2,
        "context_length": 32,
    }
    device = Device(1, "Vulkan0", "a GPU", "Vulkan", "GPU", 500, 1000)
    memory = (MemoryUse(None, 1, 2, 3), MemoryUse(1, 40, 50, 60))
    placement = json.loads(runner_api.props_line(info, capabilities, Placement(31, 12, (device,), memory)))["placement"]
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
