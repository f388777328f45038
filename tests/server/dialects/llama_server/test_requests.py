"""Completions in llama-server's dialect, as they are read."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.errors import InvalidRequest
from trio_runner.parameters import parameters_of
from trio_runner.sampling import RANDOM_SEED, SamplingParams
from trio_runner.server.dialects.llama_server.completion_fields import COMPLETION, MAX_COMPLETIONS
from trio_runner.server.dialects.llama_server.prompts import Mixed, Pictured
from trio_runner.server.dialects.llama_server.requests import Completion, completion, default_settings
from trio_runner.server.dialects.llama_server.samplers import OFF


def read(**fields: Any) -> Completion:
    return completion(json.dumps({"prompt": "x", **fields}).encode())


def test_defaults_are_those_of_llama_server() -> None:
    request = read().request
    assert request.sampling == SamplingParams(top_p=0.95, min_p=0.05, repeat_penalty=1.0, dry_penalty_last_n=64)
    assert (request.max_tokens, request.cache_prompt, request.shift, request.truncate) == (None, True, False, False)
    assert not read().report.stream
    # These are in both tables of defaults, so a change of ours would change the dialect.
    same = {
        "temperature": 0.8,
        "top_k": 40,
        "typical_p": 1.0,
        "xtc_probability": 0.0,
        "xtc_threshold": 0.1,
        "repeat_last_n": 64,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "dry_multiplier": 0.0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dynatemp_range": 0.0,
        "dynatemp_exponent": 1.0,
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "mirostat_eta": 0.1,
        "top_n_sigma": -1.0,
        "penalize_nl": True,
        "tfs_z": 1.0,
    }
    assert {name: getattr(request.sampling, name) for name in same} == same


@pytest.mark.parametrize(
    ("prompt", "forms"),
    [
        ("text", ("text",)),
        ([12, 34], ((12, 34),)),
        ([12, "text", 34], (Mixed((12, "text", 34)),)),
        (["one", "two"], ("one", "two")),
        (["one", [2, 3], [4, "five"]], ("one", (2, 3), Mixed((4, "five")))),
        ({"prompt_string": "text"}, ("text",)),
        ([{"prompt_string": "one"}, "two"], ("one", "two")),
        ([["one"]], (Mixed(("one",)),)),
    ],
)
def test_prompts(prompt: Any, forms: tuple[object, ...]) -> None:
    assert read(prompt=prompt).prompts == forms


def test_images_stand_where_the_markers_are() -> None:
    data = [base64.b64encode(image).decode() for image in (b"1st", b"2nd")]
    prompt = {"prompt_string": "<__media__>a<__media__>", "multimodal_data": data}
    assert read(prompt=prompt).prompts == (Pictured("<__media__>a<__media__>", (b"1st", "a", b"2nd")),)
    assert read(prompt={"prompt_string": "a", "multimodal_data": []}).prompts == (Pictured("a", ("a",)),)


@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ({"n_predict": 5, "max_tokens": 6}, 5),
        ({"max_completion_tokens": 7, "max_tokens": 6}, 7),
        ({"max_tokens": 6}, 6),
        ({"n_predict": -1}, None),
        ({"n_predict": 0}, 0),
        ({"n_predict": None, "max_tokens": 3}, 3),
    ],
)
def test_lengths_and_their_other_names(fields: dict[str, Any], max_tokens: int | None) -> None:
    assert read(**fields).request.max_tokens == max_tokens


@given(st.sets(st.sampled_from(list(OFF))))
def test_samplers_that_are_not_named_are_off(names: set[str]) -> None:
    chosen = {"repeat_penalty": 1.5, "dry_multiplier": 0.5, "xtc_probability": 0.5}
    with_all = read(**chosen).request.sampling
    sampling = read(samplers=[name for name in OFF if name in names], **chosen).request.sampling
    for sampler, values in OFF.items():
        for parameter, off in values.items():
            wanted = getattr(with_all, parameter) if sampler in names else off
            assert getattr(sampling, parameter) == wanted


@pytest.mark.parametrize(
    ("samplers", "names"),
    [
        (["top_k", "top-p", "Temp"], ("top_k", "top_p", "temperature")),
        (["topk", "nucleus", "typ"], None),
        ("kypmxt", ("top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")),
        (["top_k", "top_p", "infill"], ("top_k", "top_p", "infill")),
        ("kk", None),
        (["top_k", "unheard_of"], None),
        (["adaptive_p"], None),
        ([], ()),
        ("", ()),
    ],
)
def test_names_and_letters_of_samplers(samplers: Any, names: tuple[str, ...] | None) -> None:
    if names is None:
        with pytest.raises(InvalidRequest, match="samplers"):
            read(samplers=samplers)
    else:
        assert read(samplers=samplers).report.settings["samplers"] == names


def test_mirostat_brings_its_own_samplers() -> None:
    assert read(samplers=["top_k"], mirostat=2).request.sampling.temperature == 0.8


def test_tokens_of_logit_bias_are_numbers_or_texts() -> None:
    for biases in ([[15, 1], [7, False], [" word", -0.5]], {"15": 1, "7": False, " word": -0.5}):
        asked = read(logit_bias=biases)
        assert asked.request.sampling.logit_bias == ((15, 1.0), (7, -math.inf))
        assert asked.biased_texts == ((" word", -0.5),)
        settled = asked.settled(((99, -0.5),), None)
        assert settled.request.sampling.logit_bias[-1] == (99, -0.5)
        assert settled.report.settings["logit_bias"][-1] == {"bias": -0.5, "token": 99}


def test_completions_of_one_prompt_differ_in_their_seeds() -> None:
    asked = read(n_cmpl=3, seed=RANDOM_SEED - 2, prompt=["a", "b"])
    requests = asked.requests(["a", "b"])
    assert [request.prompt for request in requests] == ["a"] * 3 + ["b"] * 3
    assert [request.sampling.seed for request in requests] == [RANDOM_SEED - 2, RANDOM_SEED - 1, 0] * 2
    assert all(request.share_prompt for request in requests)
    assert {request.sampling.seed for request in read(n=2).requests(["a"])} == {RANDOM_SEED}


def test_there_is_a_bound_to_the_completions_of_a_request() -> None:
    assert len(read(prompt=["x"] * MAX_COMPLETIONS).prompts) == MAX_COMPLETIONS
    with pytest.raises(InvalidRequest, match="prompt has 129 prompts"):
        read(prompt=["x"] * (MAX_COMPLETIONS + 1))
    with pytest.raises(InvalidRequest, match="n_cmpl"):
        read(prompt=["x"] * 65, n_cmpl=2)


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, -1),
        ({"n_probs": 3}, 3),
        ({"logprobs": 2}, 2),
        ({"n_probs": 0}, -1),
        ({"return_tokens": True}, 0),
        ({"timings_per_token": True}, 0),
        ({"n_indent": 4}, 0),
        ({"t_max_predict_ms": 500}, 0),
        ({"t_max_predict_ms": 0}, -1),
    ],
)
def test_tokens_are_asked_for_only_when_the_answer_needs_them(fields: dict[str, Any], logprobs: int) -> None:
    assert read(**fields).request.sampling.logprobs == logprobs


def test_every_sampling_parameter_is_a_field_and_a_setting() -> None:
    assert parameters_of(SamplingParams).keys() <= COMPLETION.fields.keys()
    hidden = {"logprobs", "penalize_nl", "tfs_z", "json_schema"}
    assert parameters_of(SamplingParams).keys() - hidden <= default_settings().keys()


def test_schemas() -> None:
    assert json.loads(read(json_schema={"type": "integer"}).request.sampling.json_schema) == {"type": "integer"}
    assert json.loads(read(json_schema={}).request.sampling.json_schema) == {"type": "object"}
    with pytest.raises(InvalidRequest, match="json_schema and grammar"):
        read(json_schema={}, grammar="root ::= [a]")
    deep: Any = {}
    for _ in range(900):
        deep = {"items": deep}
    with pytest.raises(InvalidRequest, match="json_schema"):
        read(json_schema=deep)


def test_only_the_first_completion_of_a_prompt_prefers_the_slot() -> None:
    requests = read(id_slot=1, n_cmpl=2).requests(["a", "b"])
    assert [request.preferred_slot for request in requests] == [1, None, 1, None]
    assert read(id_slot=-1).requests(["a"])[0].preferred_slot is None
