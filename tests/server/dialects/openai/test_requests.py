"""Bodies of requests in OpenAI's dialect, and what becomes of them."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.dialects.openai.malformed import CHAT, EMBEDDINGS, RIGHT, TEXT, malformed
from trio_runner.errors import InvalidImage, RequestError
from trio_runner.image_source import MAX_IMAGE_BYTES
from trio_runner.parameters import parameters_of
from trio_runner.request import AdapterChoice, Chat, EmbedRequest, GenerateRequest, Infill
from trio_runner.sampling import RANDOM_SEED, SamplingParams
from trio_runner.server.dialects.fields import Body
from trio_runner.server.dialects.openai import requests_chat, requests_embeddings, requests_text
from trio_runner.server.dialects.openai.requests import Asked

PARSERS: dict[str, Callable[[bytes], object]] = {
    CHAT: requests_chat.chat,
    TEXT: requests_text.text,
    EMBEDDINGS: requests_embeddings.embeddings,
}
BODIES: dict[str, Body] = {
    CHAT: requests_chat.CHAT,
    TEXT: requests_text.TEXT,
    EMBEDDINGS: requests_embeddings.EMBEDDINGS,
}
PIXEL = "data:image/png;base64," + base64.b64encode(b"\0\1\2").decode()


def chat(**fields: Any) -> Asked:
    return requests_chat.chat(json.dumps(RIGHT[CHAT] | fields).encode())


def text(**fields: Any) -> Asked:
    return requests_text.text(json.dumps(RIGHT[TEXT] | fields).encode())


def said(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """What becomes of messages."""
    [request] = chat(messages=messages).generations
    assert isinstance(request.prompt, Chat)
    return [dict(message) for message in request.prompt.messages]


def sampling(**params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repeat_penalty": 1.0} | params)


def test_defaults() -> None:
    [request] = text().generations
    assert request == GenerateRequest(
        prompt="x", max_tokens=None, sampling=sampling(), cache_prompt=True, shift=False, truncate=False
    )
    [request] = chat().generations
    assert request.prompt == Chat(messages=({"role": "user", "content": "x"},))
    assert dataclasses.replace(request, prompt="x") == text().generations[0]
    assert chat() == Asked(generations=(request,))


@pytest.mark.parametrize("path", BODIES)
def test_null_leaves_every_default(path: str) -> None:
    nulls = {name: None for name in (*BODIES[path].fields, "unknown") if name not in RIGHT[path]}
    body = json.dumps(RIGHT[path] | nulls).encode()
    assert PARSERS[path](body) == PARSERS[path](json.dumps(RIGHT[path]).encode())


@pytest.mark.parametrize("path", BODIES)
def test_the_example_of_the_documentation_is_right(path: str) -> None:
    PARSERS[path](json.dumps(BODIES[path].example).encode())


@pytest.mark.parametrize("asked", [chat, text])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": 0}, {"max_tokens": 0}),
        ({"max_tokens": -1}, {"max_tokens": None}),
        ({"max_tokens": 2**40}, {"max_tokens": 2**31 - 1}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop": ["a", "", "é"]}, {"stop": ("a", "", "é")}),
        ({"cache_prompt": False}, {"cache_prompt": False}),
        ({"shift": True, "truncate": True, "n_keep": 9}, {"shift": True, "truncate": True, "n_keep": 9}),
        ({"priority": "background", "deadline": 2}, {"priority": "background", "deadline": 2.0}),
        ({"decode_seconds": 2, "preferred_slot": 1}, {"decode_seconds": 2.0, "preferred_slot": 1}),
        ({"ignore_eos": True}, {"sampling": sampling(ignore_eos=True)}),
        ({"adapters": [{"name": "a", "scale": 2}]}, {"adapters": (AdapterChoice("a", 2.0),)}),
        ({"temperature": 0, "top_p": 0.5}, {"sampling": sampling(temperature=0.0, top_p=0.5)}),
        ({"top_k": 40, "min_p": 0.1, "typical_p": 0.5}, {"sampling": sampling(top_k=40, min_p=0.1, typical_p=0.5)}),
        (
            {"presence_penalty": 1, "frequency_penalty": -1},
            {"sampling": sampling(presence_penalty=1.0, frequency_penalty=-1.0)},
        ),
        ({"logit_bias": {"5": -100, "6": 1}}, {"sampling": sampling(logit_bias=((5, -100.0), (6, 1.0)))}),
        ({"grammar": 'root ::= "x"'}, {"sampling": sampling(grammar='root ::= "x"')}),
        (
            {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s"},
            {},
        ),
        ({"prompt_cache_key": "k", "prompt_cache_retention": "24h", "extra": [1]}, {}),
    ],
)
def test_fields_of_both(asked: Callable[..., Asked], fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert asked(**fields).generations == (dataclasses.replace(asked().generations[0], **expected),)


@pytest.mark.parametrize("asked", [chat, text])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stream": True}, {"stream": True}),
        ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True, "include_usage": True}),
        ({"stream_options": {"include_obfuscation": False}}, {}),
        ({"stream_options": {"INCLUDE_USAGE": None}}, {}),
        ({"model": "m"}, {"model": "m"}),
    ],
)
def test_how_the_answer_is_written(
    asked: Callable[..., Asked], fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert asked(**fields) == dataclasses.replace(asked(), **expected)


def test_every_sampling_parameter_is_a_field() -> None:
    assert parameters_of(SamplingParams).keys() <= requests_chat.CHAT.fields.keys()
    assert parameters_of(SamplingParams).keys() <= requests_text.TEXT.fields.keys()


def test_harmless_fields_of_a_chat() -> None:
    fields = {"parallel_tool_calls": True, "verbosity": "low", "prediction": {"type": "content", "content": "x"}}
    assert chat(**fields, modalities=["text"], tools=[], tool_choice="auto", functions=[]) == chat()


# --- Choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [chat, text])
@pytest.mark.parametrize(
    ("seed", "seeds"),
    [
        (None, [RANDOM_SEED] * 3),
        (-1, [RANDOM_SEED] * 3),
        (7, [7, 8, 9]),
        (2**32 + 7, [7, 8, 9]),
        (-3, [0xFFFFFFFD, 0xFFFFFFFE, 0]),
        (-(2**63), [0, 1, 2]),
    ],
)
def test_each_choice_has_the_next_seed(asked: Callable[..., Asked], seed: int | None, seeds: list[int]) -> None:
    generations = asked(n=3, seed=seed).generations
    assert [request.sampling.seed for request in generations] == seeds
    assert all(request.share_prompt for request in generations)
    assert not any(request.share_prompt for request in asked(n=1, seed=seed).generations)


def test_choices_follow_each_other_prompt_by_prompt() -> None:
    asked = text(prompt=["a", [1, 2], "b"], n=2, echo=True)
    assert [request.prompt for request in asked.generations] == ["a", "a", (1, 2), (1, 2), "b", "b"]
    assert (asked.n, asked.echoes) == (2, ("a", (1, 2), "b"))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("x", ["x"]),
        ("", [""]),
        (["x", "y"], ["x", "y"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        ("an [img-1]", [("an [img-1]",)]),
        (["an [img-1]", "b"], [("an [img-1]",), "b"]),
    ],
)
def test_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert [request.prompt for request in text(prompt=prompt).generations] == prompts


def test_a_suffix_makes_a_gap() -> None:
    gaps = (Infill(prefix="a", suffix="z"), Infill(prefix="[img-1]", suffix="z"))
    assert tuple(request.prompt for request in text(prompt=["a", "[img-1]"], suffix="z").generations) == gaps
    assert text(suffix="") == text()


def test_best_of_may_only_be_what_is_returned() -> None:
    assert text(best_of=1, n=3) == text(n=3)
    assert text(best_of=3, n=3) == text(n=3)


# --- Log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "n_top"),
    [
        (text(), -1),
        (text(logprobs=0), 0),
        (text(logprobs=5), 5),
        (chat(), -1),
        (chat(logprobs=False, top_logprobs=0), -1),
        (chat(logprobs=True), 0),
        (chat(logprobs=True, top_logprobs=3), 3),
    ],
)
def test_log_probabilities(asked: Asked, n_top: int) -> None:
    assert asked.n_top == n_top
    assert asked.generations[0].sampling.logprobs == n_top


# --- Messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "function", "name": "f", "content": "x"}, {"role": "tool", "name": "f", "content": "x"}),
        (
            {"role": "tool", "tool_call_id": "1", "content": "x"},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
        ),
        ({"Role": "user", "CONTENT": "x", "name": "n"}, {"role": "user", "content": "x", "name": "n"}),
        ({"role": "assistant", "content": None, "refusal": "no"}, {"role": "assistant", "content": "no"}),
        (
            {
                "role": "assistant",
                "content": "x",
                "refusal": None,
                "audio": None,
                "tool_calls": None,
                "annotations": [],
            },
            {"role": "assistant", "content": "x", "annotations": []},
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
            },
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        ),
        *(
            (
                {"role": "user", "content": [{"type": "image_url", "image_url": image}]},
                {"role": "user", "content": [{"type": "image", "image": b"\0\1\2"}]},
            )
            for image in (PIXEL, {"url": PIXEL}, {"url": PIXEL, "detail": "low"}, {"URL": PIXEL.replace("png", "PNG")})
        ),
    ],
)
def test_messages(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert said(message) == [expected]


@given(st.binary(min_size=1, max_size=200), st.sampled_from(["", "\n", "\r\n"]))
def test_images_survive_the_wire(image: bytes, line_break: str) -> None:
    data = base64.b64encode(image).decode()
    lines = line_break.join(data[start : start + 8] for start in range(0, len(data), 8))
    part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{lines}"}}
    assert said({"role": "user", "content": [part]}) == [
        {"role": "user", "content": [{"type": "image", "image": image}]}
    ]


def test_an_image_that_is_too_large_is_refused() -> None:
    url = "data:image/png;base64," + "A" * (MAX_IMAGE_BYTES * 3 // 2 + 4)
    with pytest.raises(InvalidImage, match=rf"url has more than {MAX_IMAGE_BYTES} bytes"):
        said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]})


def test_variables_of_the_template() -> None:
    [request] = chat(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False}).generations
    assert isinstance(request.prompt, Chat)
    assert request.prompt.variables == {"enable_thinking": False, "reasoning_effort": "low"}


def test_tools_that_must_not_be_called_are_left_out() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools, tool_choice="none") == chat()
    assert chat(functions=[{"name": "f"}], function_call="none") == chat()


# --- Schemas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "text"}, ""),
        ({"type": "json_object"}, '{"type":"object"}'),
        ({"type": "json_object", "schema": {"type": "array"}}, '{"type":"array"}'),
        ({"TYPE": "json_schema", "json_schema": {"schema": {}}}, "{}"),
        (
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "n",
                    "description": "d",
                    "strict": True,
                    "schema": {"Title": None, "enum": [None, "é"], "type": "string"},
                },
            },
            '{"Title":null,"enum":[null,"é"],"type":"string"}',
        ),
    ],
)
def test_the_format_of_an_answer(response_format: dict[str, Any], schema: str) -> None:
    asked = chat(response_format=response_format)
    assert asked.generations[0].sampling == sampling(json_schema=schema)
    assert asked.places.keys() == ({"json_schema"} if schema else set())


@pytest.mark.parametrize("asked", [chat, text])
def test_a_schema_is_an_object_or_its_text(asked: Callable[..., Asked]) -> None:
    for schema in ({"type": "array"}, '{"type":"array"}'):
        assert asked(json_schema=schema).generations[0].sampling == sampling(json_schema='{"type":"array"}')


# --- Embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"dimensions": 3, "truncate": True}, {"dimensions": 3, "truncate": True}),
        ({"normalize": False}, {"normalize": False}),
        ({"user": "u", "model": None}, {}),
        ({"adapters": [{"name": "a"}]}, {"adapters": (AdapterChoice("a", 1.0),)}),
    ],
)
@pytest.mark.parametrize("content", ["x", ["x"], ["x", "", "y"]])
def test_embeddings(content: str | list[str], fields: dict[str, Any], expected: dict[str, Any]) -> None:
    asked = requests_embeddings.embeddings(json.dumps({"input": content, **fields}).encode())
    texts = [content] if isinstance(content, str) else content
    assert asked.requests == tuple(EmbedRequest(content=one, **{"normalize": True} | expected) for one in texts)
    assert not asked.base64


def test_the_format_of_embeddings() -> None:
    asked = requests_embeddings.embeddings(b'{"input": "x", "encoding_format": "base64", "model": "m"}')
    assert (asked.base64, asked.model) == (True, "m")


# --- What is wrong ---------------------------------------------------------------------------------------------------

CASES = list(malformed())


def test_there_are_enough_malformed_requests() -> None:
    assert len(set(CASES)) >= 500


def test_malformed_requests_name_the_field() -> None:
    for path, body, param in CASES:
        with pytest.raises(RequestError) as caught:
            PARSERS[path](body)
        assert (caught.value.param or "") == param, (path, body[:80])
        assert param in str(caught.value), (path, body[:80])


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.integers(-(2**70), 2**70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
WORDS = st.sampled_from(["user", "assistant", "text", "image_url", "refusal", "json_schema", "json_object", PIXEL, "x"])
NAMES = ["role", "content", "type", "text", "image_url", "url", "detail", "name", "tool_calls", "function", "schema"]
SHAPED: st.SearchStrategy[Any] = st.recursive(
    WORDS | JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "json_schema"]), inner),
    max_leaves=8,
)
"""Values that look like parts of messages and schemas."""


@pytest.mark.parametrize("path", BODIES)
@given(st.data())
def test_any_value_is_accepted_or_refused_by_name(path: str, data: st.DataObject) -> None:
    fields = data.draw(st.dictionaries(st.sampled_from([*BODIES[path].fields]), JSON | SHAPED, max_size=4))
    if data.draw(st.booleans()):
        fields = RIGHT[path] | fields
    refusal = None
    try:
        PARSERS[path](json.dumps(fields).encode())
    except RequestError as error:
        refusal = None if "not a JSON object" in str(error) else error
    if refusal is not None:
        assert refusal.param is not None
        assert refusal.param.partition("[")[0].partition(".")[0] in BODIES[path].fields
        assert refusal.param in str(refusal)


@given(st.binary(max_size=60))
def test_any_bytes_are_accepted_or_refused(body: bytes) -> None:
    for parse in PARSERS.values():
        with contextlib.suppress(RequestError):
            parse(body)
