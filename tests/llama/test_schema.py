"""JSON schemas in a context: the text is a value of the schema, and the other sequences do not notice."""

from __future__ import annotations

import ctypes
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.llama.running import GREEDY, PROMPT, Running, tokens_of
from trio_runner.core.batch import Chunk, DecodeOutcome, Sampled
from trio_runner.core.memory import Trim
from trio_runner.errors import EngineClosed, InvalidGrammar, InvalidRequest
from trio_runner.llama import schema as schemas
from trio_runner.sampling import SamplingParams

pytest.importorskip("llguidance", reason="llguidance is not installed")

Models = Callable[[str], Path]

FREE = SamplingParams(repeat_penalty=1.0, top_k=0, top_p=1.0, temperature=1.0, seed=1)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["llama", "spm"])
def running(models: Models, request: pytest.FixtureRequest) -> Running:
    return Running(models(request.param))


def under(schema: object, params: SamplingParams = FREE, **changes: Any) -> SamplingParams:
    return replace(params, json_schema=json.dumps(schema), **changes)


def text_of(result: list[Sampled]) -> str:
    assert result[-1].error is None
    return b"".join(sampled.piece for sampled in result).decode()


@pytest.mark.parametrize(
    "params",
    [
        FREE,
        GREEDY,
        replace(FREE, top_k=5),
        replace(FREE, top_k=40, top_p=0.9, repeat_penalty=1.1, temperature=0.8),
        replace(FREE, dry_multiplier=0.8, frequency_penalty=0.5),
        replace(FREE, mirostat=2),
        replace(FREE, min_p=0.05, typical_p=0.9, xtc_probability=0.5, temperature=3.0),
        replace(FREE, logprobs=5),
    ],
)
def test_the_text_obeys_the_schema_whatever_the_other_samplers(running: Running, params: SamplingParams) -> None:
    for seed in range(4):
        result = running.generate(PROMPT, 200, params=under(PERSON, params, seed=seed))
        value = json.loads(text_of(result))
        assert list(value) == ["name", "age"]
        assert len(value["name"]) <= 8
        assert 0 <= value["age"] <= 99


def test_the_token_that_completes_the_value_is_the_last(running: Running) -> None:
    *others, last = running.generate(PROMPT, 100, params=under({"enum": ["yes", "no"]}))
    assert last.is_end
    assert last.piece.endswith(b'"')
    assert not any(sampled.is_end for sampled in others)


def test_the_model_may_end_a_value_that_could_go_on(running: Running) -> None:
    end = running.model.info.token_eos
    params = under({"type": "integer"}, logit_bias=((end, 100.0),))
    *number, last = running.generate(PROMPT, 10, params=params)
    assert len(number) == 1
    assert int(number[0].piece) >= 0
    assert (last.token, last.piece, last.is_end) == (end, b"", True)


def test_control_tokens_are_never_allowed_in_strings(running: Running) -> None:
    control = running.model.info.token_bos
    assert control is not None
    params = under({"type": "string", "minLength": 3, "maxLength": 6}, logit_bias=((control, 100.0),))
    assert control not in tokens_of(running.generate(PROMPT, 100, params=params))


def test_log_probabilities_are_those_of_the_model(running: Running) -> None:
    (plain,) = running.generate(PROMPT, 1, params=replace(FREE, logprobs=3))
    (masked,) = running.generate(PROMPT, 1, params=under({"type": "boolean"}, logprobs=3))
    assert masked.piece in (b"t", b"f", b"true", b"false", b"th")
    assert [info.token for info in masked.top] == [info.token for info in plain.top]


def test_a_seed_reproduces_the_value(running: Running) -> None:
    texts = [text_of(running.generate(PROMPT, 200, params=under(PERSON, seed=5))) for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {}}, "not"),
        ({"type": "string", "format": "palindrome"}, "palindrome"),
        ({"type": "strings"}, "strings"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"$ref": "#/$defs/nothing"}, "nothing"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum"),
        ({"type": "string", "minLength": "x"}, "minLength"),
        ({"enum": []}, "empty"),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused_by_name(running: Running, schema: object, named: str) -> None:
    with pytest.raises(InvalidGrammar, match=named) as refused:
        running.sampler(under(schema))
    assert refused.value.param == "json_schema"
    assert "\n" not in str(refused.value)


def test_a_dead_end_is_an_error_of_its_sequence_only(running: Running) -> None:
    """The caller forbids what the schema asks for."""
    tokens = running.tokens("the model")
    (expected,) = tokens_of(running.generate(tokens, 1))
    for slot in (0, 1):
        running.generate(tokens, 1, slot=slot)
        running.context.apply(Trim(slot, len(tokens) - 1))
    forbidden = tuple((token, -math.inf) for token in range(running.model.info.n_vocab))
    samplers = {1: running.sampler(under({"type": "null"}, logit_bias=forbidden)), 2: running.sampler()}
    chunks = [Chunk(1, 0, len(tokens) - 1, (tokens[-1],), True), Chunk(2, 1, len(tokens) - 1, (tokens[-1],), True)]
    result = running.step(*chunks, samplers=samplers)
    assert result.outcome is DecodeOutcome.OK
    error = result.sampled[1].error
    assert isinstance(error, InvalidGrammar)
    assert error.param == "json_schema"
    assert result.sampled[2].token == expected


def test_samplers_with_one_schema_do_not_share_their_place_in_it(running: Running) -> None:
    params = under({"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3})
    alone = text_of(running.generate(PROMPT, 100, params=params))
    other = running.sampler(params)
    assert text_of(running.generate(PROMPT, 100, params=params)) == alone
    other.close()
    assert text_of(running.generate(PROMPT, 100, params=params)) == alone


def test_compiled_schemas_are_kept_and_bounded(models: Models) -> None:
    running = Running(models("llama"))
    texts = [json.dumps({"type": "integer", "maximum": index}) for index in range(schemas.MAX_SCHEMAS + 1)]
    for text in texts:
        assert not running.model.has_schema(text)
        running.sampler(replace(FREE, json_schema=text)).close()
        assert running.model.has_schema(text)
        running.sampler(replace(FREE, json_schema=texts[0])).close()
    assert not running.model.has_schema(texts[1])
    assert running.model.has_schema(texts[0])
    running.model.close()  # they would keep its memory
    assert not running.model.has_schema(texts[0])


def test_compiled_schemas_do_not_keep_a_closed_model(models: Models) -> None:
    running = Running(models("llama"))
    handle = weakref.ref(running.model.handle)
    sampler = running.sampler(under(PERSON))
    running.context.close()
    running.model.close()
    assert handle() is None
    assert not running.model.has_schema(json.dumps(PERSON))
    sampler.close()
    with pytest.raises(EngineClosed):
        running.sampler(under(PERSON))


def test_an_llguidance_without_a_c_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda path: object())
    assert schemas._load.__wrapped__() == "but this one has no C interface"


def test_without_llguidance_the_error_says_how_to_get_it(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "_load", lambda: "which is not installed")
    with pytest.raises(InvalidRequest, match=r"pip install 'trio-runner\[schema\]'") as refused:
        running.sampler(under({"type": "integer", "multipleOf": 7}))
    assert refused.value.param == "json_schema"
