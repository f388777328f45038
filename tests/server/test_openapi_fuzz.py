"""Requests that are made from /openapi.json, against the toy engine: no answer is a failure of the server, and every
answer is one that the document describes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import schemathesis
import trio
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.client import request, serving
from trio_runner.front_door import open_engine
from trio_runner.testing import ToyLoader

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LENGTHS = ("n_predict", "max_tokens", "max_completion_tokens", "num_predict")
"""Fields that bound the text. In a drawn request they are always there, and small."""
DEADLINE = 120.0


def with_short_texts(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document, except that every text is short: the toy model never ends one by itself."""
    bounded = copy.deepcopy(dict(document))
    for methods in bounded["paths"].values():
        for operation in methods.values():
            if "requestBody" not in operation:
                continue
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            schemas = [schema, schema["properties"].get("options", {})]
            for one in schemas:
                for name in LENGTHS:
                    if name in one.get("properties", {}):
                        one["properties"][name] = {"type": "integer", "minimum": 1, "maximum": 3}
                        one["required"] = [*one.get("required", ()), name]
            if "required" in schemas[1] and "options" not in schema.get("required", ()):
                schema["required"] = [*schema.get("required", ()), "options"]
    return bounded


def try_all(document: Mapping[str, Any], url: str, mode: GenerationMode) -> dict[str, int]:
    """Send requests to every operation of the document. Returns how many of each status were answered."""
    statuses: dict[str, int] = {}
    schema = schemathesis.openapi.from_dict(dict(document))
    for found in schema.get_all_operations():
        operation = cast(Any, found).ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing of it can be wrong
        if "501" in operation.definition.raw["responses"]:
            continue  # it refuses everything

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=6,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        def ask(case: schemathesis.Case[Any]) -> None:
            answer = case.call_and_validate(base_url=url, checks=CHECKS)
            statuses[str(answer.status_code)] = statuses.get(str(answer.status_code), 0) + 1

        ask()
    return statuses


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
async def test_drawn_requests_get_only_answers_that_are_described(mode: GenerationMode) -> None:
    async with (
        open_engine(ToyLoader(), slots=4) as engine,
        serving(engine, deadline=DEADLINE) as server,
    ):
        document = (await server.ask(request("GET", "/openapi.json"))).json
        url = f"http://{server.host}:{server.port}"
        call: Callable[[], dict[str, int]] = lambda: try_all(with_short_texts(document), url, mode)  # noqa: E731
        statuses = await trio.to_thread.run_sync(call, abandon_on_cancel=True)
        wanted = "200" if mode is GenerationMode.POSITIVE else "400"
        assert statuses[wanted] > 20, json.dumps(statuses)
        assert engine.statistics().generations == 0
