"""The dialect, byte for byte."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.malformed import malformed
from trio_runner.errors import (
    EngineBroken,
    EngineBusy,
    InvalidGrammar,
    InvalidRequest,
    RequestError,
    RunnerError,
    Unsupported,
)
from trio_runner.events import Embedded, Finished, PromptProgress, SampledToken, TextPiece, TokenInfo, Usage
from trio_runner.request import RANDOM_SEED, GenerateRequest, SamplingParams
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


CASES = list(malformed())


def test_there_are_enough_malformed_requests() -> None:
    assert len(set(CASES)) >= 400


def test_malformed_requests_name_the_field() -> None:
    parsers: dict[str, Any] = {
        "/completion": runner_api.completion,
        "/embedding": runner_api.embedding,
        "/tokenize": runner_api.tokenize,
        "/detokenize": runner_api.detokenize,
    }
    for path, body, name in CASES:
        with pytest.raises(RequestError) as caught:
            parsers[path](body)
        assert name in str(caught.value), (path, body[:80])
        assert caught.value.param is None or caught.value.param.startswith(name)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.integers(-(2**70), 2**70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*runner_api._COMPLETION]), JSON, max_size=4), st.booleans())
def test_any_value_is_accepted_or_refused_by_name(fields: dict[str, Any], with_prompt: bool) -> None:
    if with_prompt:
        fields["prompt"] = "x"
    refusal: RequestError | None = None
    try:
        runner_api.completion(json.dumps(fields).encode())
    except RequestError as error:
        refusal = error
    if refusal is not None and str(refusal) != "Bad request":
        assert refusal.param is not None
        assert refusal.param in str(refusal)


@given(st.binary(max_size=60))
def test_any_bytes_are_accepted_or_refused(body: bytes) -> None:
    for parse in (runner_api.completion, runner_api.embedding, runner_api.tokenize, runner_api.detokenize):
        try:
            parse(body)
        except RequestError:
            continue


def test_images_need_a_projector() -> None:
    with pytest.raises(Unsupported) as caught:
        completion(image_data=[{"data": "AAAA", "id": 1}])
    assert caught.value.param == "image_data"


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_embeddings_are_finite(value: float) -> None:
    with pytest.raises(RunnerError):
        runner_api.embedding_line(Embedded(np.array([1, value], np.float32), Usage()))


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
