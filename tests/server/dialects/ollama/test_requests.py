"""Bodies of requests in Ollama's dialect, and what becomes of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.dialects.ollama.malformed import malformed
from trio_runner.errors import InvalidGrammar, InvalidImage, PromptTooLong, RequestError, UnknownAdapter, Unsupported
from trio_runner.parameters import parameters_of
from trio_runner.request import AdapterChoice, Chat, EmbedRequest, GenerateRequest, Infill
from trio_runner.sampling import RANDOM_SEED, SamplingParams
from trio_runner.server.dialects.ollama import bodies, requests
from trio_runner.server.dialects.ollama.options import OPTIONS
from trio_runner.server.dialects.ollama.requests import GenerateCall

USER = {"role": "user", "content": "x"}
THINKER = "{% if enable_thinking %}<think>{% endif %}</think>"
PARSERS: dict[str, Callable[[bytes], object]] = {
    "/api/generate": requests.generate,
    "/api/chat": requests.chat,
    "/api/embed": requests.embed,
    "/api/embeddings": requests.embeddings,
    "/api/show": requests.show,
    "/api/pull": requests.pull,
}


def parse(path: str, body: bytes) -> None:
    call = PARSERS[path](body)
    if isinstance(call, GenerateCall):
        prepared(call)


def encoded(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def generate(**fields: Any) -> GenerateCall:
    return requests.generate(encoded(**{"prompt": "x", **fields}))


def chat(*messages: dict[str, Any], **fields: Any) -> GenerateCall:
    return requests.chat(encoded(messages=messages or [USER], **fields))


def prepared(call: GenerateCall, template: str | None = "{{ messages }}", n_ctx: int = 100) -> GenerateRequest:
    return call.prepare(chat_template=template, n_ctx=n_ctx)


def options(**given: Any) -> GenerateRequest:
    return prepared(generate(options=given))


def test_defaults() -> None:
    expected = GenerateRequest(
        prompt=Chat(messages=(USER,)),
        max_tokens=1000,
        sampling=SamplingParams(
            temperature=0.8,
            top_k=40,
            top_p=0.9,
            min_p=0.0,
            typical_p=1.0,
            repeat_last_n=64,
            repeat_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            mirostat=0,
            seed=RANDOM_SEED,
        ),
        n_keep=4,
        cache_prompt=True,
        shift=True,
        truncate=True,
    )
    for call in (generate(), chat()):
        assert prepared(call) == expected
        assert (call.stream, call.model, call.idle, call.think, call.num_ctx) == (True, None, None, None, None)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_documented_default_of_each_option_is_the_one_that_holds(name: str) -> None:
    default = OPTIONS[name].schema.get("default")
    if default is not None:
        assert options(**{name: default}) == options()


def test_null_leaves_every_default() -> None:
    nulls = dict.fromkeys([*bodies.GENERATE.fields, "unknown"])
    assert generate(**{**nulls, "prompt": "x"}) == generate()
    assert generate(options=dict.fromkeys([*OPTIONS, "unknown"])) == generate(options={})
    nulls = dict.fromkeys({*bodies.CHAT.fields, "unknown"} - {"messages"})
    assert chat({**dict.fromkeys(bodies.MESSAGE), **USER}, **nulls) == chat()


def test_what_clients_send_that_mean_nothing() -> None:
    """The Python client sends an empty text or list for every field that its caller did not give."""
    empty = {"suffix": "", "system": "", "template": "", "context": [], "raw": False, "images": [], "format": ""}
    assert generate(**empty) == generate()
    message = {**USER, "images": [], "tool_calls": []}
    assert chat(message, tools=[], format="") == chat()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_predict": 7}, {"max_tokens": 7}),
        ({"num_predict": 7.0}, {"max_tokens": 7}),
        ({"num_predict": -1}, {"max_tokens": 1000, "shift": True}),
        ({"num_predict": -2}, {"max_tokens": 1000, "shift": False}),
        ({"num_predict": 10**9}, {"max_tokens": 1000}),
        ({"num_predict": 10**12}, {"max_tokens": 1000}),
        ({"num_keep": -1}, {"n_keep": -1}),
        ({"num_keep": -9}, {"n_keep": -1}),
        ({"num_keep": 10**12}, {"n_keep": 2**31 - 1}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"priority": "background", "deadline": 3}, {"priority": "background", "deadline": 3.0}),
        ({"adapters": [{"name": "a"}]}, {"adapters": (AdapterChoice("a"),)}),
        ({"STOP": ["a"]}, {"stop": ("a",)}),
    ],
)
def test_options_of_the_request(given: dict[str, Any], expected: dict[str, Any]) -> None:
    request = options(**given)
    assert {name: getattr(request, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -1}, {"seed": RANDOM_SEED}),
        ({"seed": 2**33 + 5}, {"seed": 5}),
        ({"top_k": 20.0}, {"top_k": 20}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"penalize_newline": False}, {"penalize_nl": False}),
        ({"repeat_penalty": 1.3, "repeat_last_n": -1}, {"repeat_penalty": 1.3, "repeat_last_n": -1}),
        ({"mirostat": 2, "mirostat_tau": 4, "mirostat_eta": 0.2}, {"mirostat": 2, "mirostat_tau": 4.0}),
        ({"dry_multiplier": 0.5, "xtc_probability": 0.1}, {"dry_multiplier": 0.5, "xtc_probability": 0.1}),
        ({"logit_bias": {"3": -1}}, {"logit_bias": ((3, -1.0),)}),
    ],
)
def test_options_of_sampling(given: dict[str, Any], expected: dict[str, Any]) -> None:
    sampling = options(**given).sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_every_sampling_parameter_is_an_option() -> None:
    assert parameters_of(SamplingParams).keys() - OPTIONS.keys() <= {"logprobs", "json_schema"}


def test_log_probabilities() -> None:
    for fields, expected in (
        ({}, -1),
        ({"logprobs": False, "top_logprobs": 3}, -1),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ):
        assert prepared(chat(**fields)).sampling.logprobs == expected


def test_prompts_of_generate() -> None:
    image = {"type": "image", "image": b"\0\0\0"}
    said = generate(system="y").request.prompt
    assert said == Chat(messages=({"role": "system", "content": "y"}, USER))
    assert generate(images=["AAAA"]).request.prompt == Chat(
        messages=({"role": "user", "content": [image, {"type": "text", "text": "x"}]},)
    )
    assert generate(raw=True).request.prompt == "x"
    raw = generate(raw=True, prompt="[img-0]x", images=["AAAA"]).request
    assert (raw.prompt, raw.image_data) == ("[img-0]x", ((0, b"\0\0\0"),))


def test_a_gap_to_fill() -> None:
    for more in ({}, {"raw": True}, {"system": "y", "think": False}):
        call = generate(suffix="z", **more)
        assert prepared(call).prompt == prepared(call, None).prompt == Infill(prefix="x", suffix="z")
    assert generate(prompt="", suffix="z").idle is None


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        ("json", '{"type":"object"}'),
        ({}, "{}"),
        ({"type": "string", "X": None, "enum": ["\u00e9"]}, '{"type": "string", "X": null, "enum": ["\\u00e9"]}'),
        ("", ""),
        (None, ""),
    ],
)
def test_formats(given: object, schema: str) -> None:
    """The names and nulls of a schema are data: they stay as they are."""
    for call in (generate(format=given), chat(format=given)):
        assert prepared(call).sampling.json_schema == schema


def test_a_model_without_a_chat_template_gets_plain_text() -> None:
    assert prepared(generate(), None).prompt == "x"
    assert prepared(generate(system="y"), None).prompt == "y\n\nx"
    assert prepared(generate(images=["AAAA"]), None).prompt == (b"\0\0\0", "x")
    assert isinstance(prepared(chat(), None).prompt, Chat)  # which the engine refuses


def test_messages_as_chat_templates_read_them() -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    request = chat(
        {"role": "system"},
        {**USER, "images": ["AAAA"], "unknown": 1},
        {"ROLE": "assistant", "content": None, "thinking": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_name": "f", "tool_call_id": "1"},
    ).request
    assert request.prompt == Chat(
        messages=(
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "image", "image": b"\0\0\0"}, {"type": "text", "text": "x"}]},
            {
                "role": "assistant",
                "content": "",
                "thinking": "hm",
                "reasoning_content": "hm",
                "tool_calls": ({"type": "function", **call},),
            },
            {"role": "tool", "content": "r", "tool_call_id": "1", "tool_name": "f", "name": "f"},
        )
    )


def test_thinking() -> None:
    for think in (True, "low"):
        call = chat(think=think)
        prompt = prepared(call, THINKER).prompt
        assert call.thinks
        assert isinstance(prompt, Chat)
        assert prompt.variables["enable_thinking"] is True
        assert prompt.variables.get("reasoning_effort") == (think if think == "low" else None)
        with pytest.raises(Unsupported, match="think"):
            prepared(call)
    call = chat(think=False)
    prompt = prepared(call).prompt
    assert isinstance(prompt, Chat)
    assert (call.thinks, prompt.variables) == (False, {"enable_thinking": False, "thinking": False})
    assert prepared(chat(), THINKER).prompt == Chat(messages=(USER,))


@pytest.mark.parametrize(
    ("keep_alive", "idle"),
    [
        *[(0, "unload"), ("0", "unload"), ("0s", "unload"), ("0h0m", "unload"), (None, "load"), (-1, "load")],
        *[(300, "load"), (0.5, "load"), ("5m", "load"), ("1h30m", "load"), ("-1", "load"), ("0.5s", "load")],
    ],
)
def test_requests_that_generate_nothing(keep_alive: object, idle: str) -> None:
    assert requests.generate(encoded(keep_alive=keep_alive)).idle == idle
    assert requests.generate(encoded(keep_alive=keep_alive, system="y", raw=False)).idle == idle
    assert requests.chat(encoded(messages=[], keep_alive=keep_alive)).idle == idle
    assert generate(keep_alive=keep_alive).idle is None


def test_embeddings() -> None:
    call = requests.embed(encoded(model="m", input=["a", ""], dimensions=2, options={"adapters": []}))
    assert (call.model, call.requests) == (
        "m",
        tuple(EmbedRequest(content=c, normalize=True, truncate=True, dimensions=2, adapters=()) for c in ("a", "")),
    )
    one = EmbedRequest(content="a", normalize=True, truncate=False)
    assert requests.embed(encoded(input="a", truncate=False, dimensions=0)).requests == (one,)
    for nothing in (b"{}", b'{"input": ""}', b'{"input": []}', b'{"input": null}'):
        assert requests.embed(nothing).requests == ()
    assert requests.embeddings(encoded(prompt="a")).requests == (EmbedRequest(content="a"),)
    assert requests.embeddings(encoded(prompt="")).requests == ()


def test_errors_of_embeddings_name_the_field_of_the_request() -> None:
    too_long, unknown = PromptTooLong(9, 5, param="content"), UnknownAdapter("x")
    for call, name in (
        (requests.embed(b'{"input": "x"}'), "input"),
        (requests.embeddings(b'{"prompt": "x"}'), "prompt"),
    ):
        assert str(call.renamed(too_long)) == f"{name} has 9 tokens, but at most 5 fit"
        assert str(call.renamed(unknown)) == "options.adapters: there is no adapter 'x'"
        assert call.renamed(unknown).status == 400  # a 404 would say that there is no such model


def test_names() -> None:
    assert requests.show(encoded(name="a")) == requests.show(encoded(model="a")) == "a"
    assert requests.show(encoded(model="a", name="b")) == "a"
    assert requests.pull(encoded(name="a", stream=False)) == ("a", False)
    assert requests.pull(encoded(model="")) == (None, True)


def test_malformed_requests_are_refused_by_name() -> None:
    cases = list(malformed())
    assert len(cases) > 300
    for path, body, name in cases:
        with pytest.raises(RequestError) as caught:
            parse(path, body)
        assert name in str(caught.value), body[:80]


@pytest.mark.parametrize(
    ("error", "of_generate", "of_chat"),
    [
        (InvalidGrammar("no root"), "options.grammar: no root", "options.grammar: no root"),
        (InvalidGrammar("grammar has no root"), "options.grammar has no root", "options.grammar has no root"),
        (InvalidGrammar("no `not`", param="json_schema"), "format: no `not`", "format: no `not`"),
        (RequestError("json_schema is odd", param="json_schema"), "format is odd", "format is odd"),
        (
            PromptTooLong(9, 5, param="messages"),
            "prompt has 9 tokens, but at most 5 fit",
            "messages has 9 tokens, but at most 5 fit",
        ),
        (
            InvalidImage("messages[2].content[1].image is odd", param="messages[2].content[1].image"),
            "images[1] is odd",
            "messages[2].images[1] is odd",
        ),
        (
            Unsupported("images", "no images", param="messages[0].content[0]"),
            "images[0]: no images",
            "messages[0].images[0]: no images",
        ),
        (RequestError("x"), "x", "x"),
    ],
)
def test_errors_name_the_field_of_the_request(error: RequestError, of_generate: str, of_chat: str) -> None:
    for call, text in ((generate(), of_generate), (chat(), of_chat)):
        renamed = call.renamed(error)
        assert str(renamed) == text
        assert renamed.param is None or renamed.param in text


def test_an_unknown_option_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert generate(options={"never_heard_of": 1}) == generate(options={})
    assert [record.message.count("options.never_heard_of") for record in caplog.records] == [1]
