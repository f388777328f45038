"""/openapi.json and /docs: what they say is what is served."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest

from tests.server.client import request, serving
from tests.server.fake_engine import FakeEngine
from trio_runner.errors import InvalidRequest
from trio_runner.interface import EngineInterface
from trio_runner.server.body_threads import BodyThreads
from trio_runner.server.dialects import DIALECTS
from trio_runner.server.dialects.dialect import Dialect, Operation, RouteContext
from trio_runner.server.dialects.fields import STRING, Body, field
from trio_runner.server.docs_page import docs_page
from trio_runner.server.names import MAX_NAME_LENGTH, ModelNames
from trio_runner.server.openapi import describe
from trio_runner.server.problems import Answer, Problem, plain_text


def context() -> RouteContext:
    engine: EngineInterface = FakeEngine()  # type: ignore[assignment]
    return RouteContext(engine, BodyThreads())


OPERATIONS = [(dialect, operation) for dialect in DIALECTS for operation in dialect.operations(context())]
IDS = [f"{operation.method} {operation.path}" for _, operation in OPERATIONS]


@pytest.mark.parametrize(("dialect", "operation"), OPERATIONS, ids=IDS)
def test_the_example_of_each_operation_is_a_body_that_it_accepts(dialect: Dialect, operation: Operation) -> None:
    if operation.body is not None:
        read = operation.body.read(json.dumps(operation.body.example).encode())
        assert read.keys() == operation.body.example.keys()
        ModelNames("whatever").check(read.get("model"))  # what the server calls its model is not known here
        assert all(entry.doc.endswith(".") for entry in operation.body.fields.values())
    assert operation.summary.endswith(".")


@pytest.mark.parametrize(("dialect", "operation"), OPERATIONS, ids=IDS)
def test_the_name_of_a_model_is_bounded(dialect: Dialect, operation: Operation) -> None:
    """Every part of a stream may repeat it."""
    if operation.body is not None and "model" in operation.body.fields:
        body = {**operation.body.example, "model": "x" * (MAX_NAME_LENGTH + 1)}
        with pytest.raises(InvalidRequest) as caught:
            operation.body.read(json.dumps(body).encode())
        assert caught.value.param == "model"


def shown(path: str) -> str:
    """A path as OpenAPI writes it."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", path)


async def test_the_document_has_every_path_and_every_field() -> None:
    async with serving(FakeEngine()) as server:
        answer = await server.ask(request("GET", "/openapi.json"))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    paths = answer.json["paths"]
    names = []
    for dialect, operation in OPERATIONS:
        method = "get" if operation.method == "ANY" else operation.method.lower()
        described = paths[shown(operation.path)][method]
        names.append(described["operationId"])
        assert {"200", "400", "401", "403", "500", "503"} <= described["responses"].keys()
        assert ("422" in described["responses"]) == (dialect.word(Problem(422, "")).status == 422)
        if operation.body is not None:
            schema = described["requestBody"]["content"]["application/json"]["schema"]
            assert list(schema["properties"]) == list(operation.body.fields)
    assert len(set(names)) == len(names)


async def test_the_page_for_people_has_every_path_and_needs_nothing_else() -> None:
    async with serving(FakeEngine()) as server:
        answer = await server.ask(request("GET", "/docs"))
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    text = answer.body.decode()
    for _, operation in OPERATIONS:
        assert shown(operation.path) in text
    assert "<script" not in text
    assert "http" not in text.replace("http://localhost", "")


async def test_the_document_tells_who_needs_a_key() -> None:
    async with serving(FakeEngine(), api_key="s3cret") as server:
        document = (await server.ask(request("GET", "/openapi.json", b"", "X-Api-Key: s3cret"))).json
        page = (await server.ask(request("GET", "/docs", b"", "X-Api-Key: s3cret"))).body.decode()
        without = await server.ask(request("GET", "/openapi.json"))
    assert without.status == 401
    schemes = document["components"]["securitySchemes"]
    assert {scheme.get("scheme") or scheme["name"] for scheme in schemes.values()} == {"bearer", "X-Api-Key"}
    assert document["security"] == [{name: []} for name in schemes]
    open_paths = [
        path for path, methods in document["paths"].items() for one in methods.values() if one.get("security") == []
    ]
    assert set(open_paths) == {"/health", "/llama/health", "/"}
    assert page.count("Bearer $KEY") == sum(map(len, document["paths"].values())) - len(open_paths)


class Said(msgspec.Struct):
    """What is said."""

    words: list[str]


class HostileDialect:
    """Describes itself in HTML."""

    name = "hostile"
    about = "</h2><script>alert(1)</script>"
    error_type = Said

    def speaks_at(self, path: str) -> bool:
        return False

    def word(self, problem: Problem) -> Answer:
        return plain_text(problem)

    def operations(self, context: RouteContext) -> list[Operation]:
        async def handler() -> Any: ...

        body = Body({"<b>": field(STRING, "<i>&.", required=True)}, {"<b>": "it's</pre>"})
        operation = Operation(method="POST", path="/x/<name>", handler=handler, summary="<u>.", body=body, answer=Said)
        return [operation]


def test_what_a_dialect_says_cannot_become_markup() -> None:
    dialect = HostileDialect()
    document = describe([(dialect, dialect.operations(context()))], version="1", needs_key=True)
    assert document["components"]["schemas"]["Said"]["description"] == "What is said."
    operation = document["paths"]["/x/{name}"]["post"]
    assert operation["parameters"][0]["name"] == "name"
    assert operation["responses"]["200"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Said"
    }
    assert operation["responses"]["413"]["content"] == operation["responses"]["400"]["content"]
    found: set[str] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.add(tag)

    page = docs_page(document, url="http://localhost")
    Reader().feed(page)
    assert not found & {"script", "b", "i", "u"}
    assert "Authorization: Bearer $KEY" in page.replace("&quot;", '"')
