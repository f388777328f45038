"""Schemas that were made to do harm: each is refused or bounded, and the stream beside it goes on unchanged."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests.placing import model_config
from tests.tiny_models import tiny_model
from trio_runner.errors import RequestError
from trio_runner.front_door import open_engine
from trio_runner.sampling import SamplingParams

pytest.importorskip("llguidance", reason="llguidance is not installed")

DEADLINE = 120.0
FREE = SamplingParams(temperature=1, top_k=0, top_p=1, repeat_penalty=1, seed=3)


def doubling(keyword: str) -> dict[str, Any]:
    """Forty definitions of which each refers twice to the next."""
    definitions: dict[str, Any] = {
        f"d{index}": {keyword: [{"$ref": f"#/$defs/d{index + 1}"}, {"$ref": f"#/$defs/d{index + 1}"}]}
        for index in range(40)
    }
    return {"$defs": definitions | {"d40": {"type": "null"}}, "$ref": "#/$defs/d0"}


def nested(levels: int, high: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": high}
    return schema


def branches(n: int) -> dict[str, Any]:
    return {"anyOf": [{"type": "object", "properties": {f"k{index}": {"type": "string"}}} for index in range(n)]}


def names(n: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"name{index}": {"type": "integer"} for index in range(n)}}


HOSTILE: Final[dict[str, object]] = {
    "deep": '{"items":' * 10_000 + "{}" + "}" * 10_000,
    "deep values": '{"const":' + "[" * 100_000,
    "a megabyte": {"enum": ["x" * (1 << 20)]},
    "doubling allOf": doubling("allOf"),
    "doubling anyOf": doubling("anyOf"),
    "doubling prefixItems": doubling("prefixItems"),
    "a product of alternatives": {"allOf": [branches(3) for _ in range(12)]},
    "many alternatives": branches(2000),
    "many names": names(4000),
    "many names inside": {"type": "object", "properties": {"a": names(450)}, "required": ["a"]},
    "many required names": {**names(2500), "required": [f"name{index}" for index in range(2500)]},
    "many items": {"type": "array", "minItems": 10**15, "items": {"type": "array", "minItems": 10**15}},
    "nested items": nested(30, 10**9),
    "a long text": {"type": "string", "minLength": 10**9, "maxLength": 10**12},
    "a long pattern": {"type": "string", "pattern": "a?" * 50_000},
    "a pattern with many states": {"type": "string", "pattern": "(.*[ab ].{300}){30}"},
    "nested repetitions": {"type": "string", "pattern": "((((a{1000}){1000}){1000}){1000}){1000}"},
    "catastrophic backtracking": {"type": "string", "pattern": "^((a+)+)+$"},
    "many parentheses": {"type": "string", "pattern": "(" * 20_000 + ")" * 20_000},
    "a large factor": {"type": "integer", "multipleOf": 10**9 + 7},
    "a tiny factor": {"type": "number", "multipleOf": 5e-324},
    "a large negative number": {"const": -(2**63)},
    "negative bounds": {"type": "integer", "minimum": -(2**63) + 1, "maximum": -(2**63) + 1},
    "a huge number": {"type": "number", "maximum": 10**400},
    "a reference to itself": {"$ref": "#"},
    "a cycle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "a cycle of alternatives": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}},
    "half a character": '{"const": "\\ud800"}',
    "nothing but NUL": {"const": "\0" * 1000},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_schema_harms_nobody_else(models: Path, name: str) -> None:
    schema = HOSTILE[name]
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with trio.fail_after(DEADLINE):
        model = model_config(tiny_model("llama", models))
        async with open_engine(model, slots=2, threads=1, context_length=512, kv_type="f32") as engine:
            alone = await engine.generate("the world", max_tokens=60, sampling=FREE, cache_prompt=False).collect()
            async with engine.generate("the world", max_tokens=60, sampling=FREE) as stream:
                pieces = [(await anext(stream)).text]
                with suppress(RequestError):
                    await engine.generate("hello", max_tokens=30, json_schema=text, temperature=2.0).collect()
                pieces += [event.text async for event in stream]
            assert "".join(pieces) == alone
            assert await engine.generate("hello", json_schema={"const": 1}).collect() == "1"
