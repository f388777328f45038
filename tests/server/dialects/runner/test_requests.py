"""Bodies of requests in the runner's dialect, and what becomes of them."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.dialects.runner.malformed import RIGHT, malformed
from trio_runner.errors import InvalidImage, RequestError
from trio_runner.image_source import MAX_IMAGE_BYTES
from trio_runner.request import AdapterChoice, EmbedRequest, GenerateRequest, RerankRequest
from trio_runner.sampling import RANDOM_SEED, SamplingParams
from trio_runner.server.dialects.fields import Fields
from trio_runner.server.dialects.runner import requests


def completion(**fields: Any) -> GenerateRequest:
    return requests.completion(json.dumps({"prompt": "x", **fields}).encode())


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
    names = [*requests.COMPLETION.fields, "unknown"]
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
        (
            {"prompt": "[img-7]", "image_data": [{"data": "AAEC", "id": 7}]},
            {"prompt": "[img-7]", "image_data": ((7, b"\0\1\2"),)},
        ),
        (
            {"prompt": "[img-0]", "IMAGE_DATA": [{"Data": "\r\nAA\nEC\r\n"}]},
            {"prompt": "[img-0]", "image_data": ((0, b"\0\1\2"),)},
        ),
        (
            {"prompt": "[img-2147483647]", "image_data": [{"data": "AA==", "id": 2**31 - 1, "x": 1}]},
            {"prompt": "[img-2147483647]", "image_data": ((2**31 - 1, b"\0"),)},
        ),
        (
            {"prompt": "[img-1]", "image_data": [{"data": "AAEC", "id": 1}] * 16},
            {"prompt": "[img-1]", "image_data": ((1, b"\0\1\2"),) * 16},
        ),
        (
            {"prompt": "[img-2] [img-]", "image_data": [{"data": "AAEC", "id": n} for n in range(4)]},
            {"prompt": "[img-2] [img-]", "image_data": ((2, b"\0\1\2"),)},
        ),
        ({"image_data": [{"data": "AAEC"}]}, {}),
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


def test_every_sampling_parameter_is_a_field() -> None:
    ours = {field.name for field in dataclasses.fields(SamplingParams)}
    assert ours <= requests.COMPLETION.fields.keys()


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
    assert requests.completion(body).max_tokens == n_predict


def test_bytes_that_are_no_utf8_become_replacement_characters() -> None:
    assert requests.completion(b'{"prompt":"a\xffb\xe4"}').prompt == "a\ufffdb\ufffd"


def test_a_surrogate_pair_is_one_character() -> None:
    assert requests.completion(b'{"prompt":"\\ud83d\\ude00"}').prompt == "\U0001f600"


PARSERS: dict[str, Callable[[bytes], object]] = {
    "/completion": requests.completion,
    "/embedding": requests.embedding,
    "/rerank": requests.rerank,
    "/adapters": requests.adapter,
    "/tokenize": requests.tokenize,
    "/detokenize": requests.detokenize,
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


FIELDS: dict[str, Fields] = {
    "/completion": requests.COMPLETION.fields,
    "/embedding": requests.EMBEDDING.fields,
    "/rerank": requests.RERANK.fields,
    "/adapters": requests.ADAPTER.fields,
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
    """What a request with these fields is refused with; None if it is accepted."""
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
    assert completion(prompt="[img-3]", image_data=[{"data": lines, "id": 3}]).image_data == ((3, image),)


def test_images_survive_the_wire_however_long() -> None:
    image = random.Random(0).randbytes(3_000_000)
    assert completion(prompt="[img-0]", image_data=[{"data": base64.b64encode(image).decode()}]).image_data == (
        (0, image),
    )
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
    asked = requests.embedding(json.dumps({"content": content, **fields}).encode())
    if isinstance(content, str):
        assert asked == EmbedRequest(content=content, **expected)
    else:
        assert asked == tuple(EmbedRequest(content=text, **expected) for text in content)


def test_rerank() -> None:
    needed = {"query": "q", "documents": ["a", "", "a"]}
    assert requests.rerank(json.dumps(needed).encode()) == (RerankRequest(query="q", documents=("a", "", "a")), None)
    asked = RerankRequest(query="q", documents=("a", "", "a"), truncate=True, adapters=(AdapterChoice("x", 2.0),))
    fields = {**needed, "truncate": True, "top_n": 7, "adapters": [{"name": "x", "scale": 2}]}
    assert requests.rerank(json.dumps(fields).encode()) == (asked, 7)


def test_adapters() -> None:
    assert requests.adapter(b'{"file": "a.gguf"}') == ("a.gguf", None, 0.0)
    assert requests.adapter(b'{"FILE": "\xc3\xa9", "name": "b", "scale": -2}') == ("é", "b", -2.0)


def test_tokenize_reads_special_tokens_and_adds_none() -> None:
    assert requests.tokenize(b'{"content":"x"}') == ("x", False, True)
    assert requests.tokenize(b"{}") == ("", False, True)
    assert requests.detokenize(b'{"tokens":[1,2]}') == (1, 2)
