"""/openapi.json: what the server serves, for programs. Pure.

The document is made from what is really checked: the fields of each `Operation` are those that its body is read with,
and msgspec describes the types that its answers are written from. The format is OpenAPI 3.1
(https://spec.openapis.org/oas/v3.1.0), whose schemas are JSON schemas.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from types import UnionType
from typing import Any, Final, TypeAlias, get_args

import msgspec

from trio_runner.server.access import needs_no_key
from trio_runner.server.dialects.dialect import ANY_METHOD, Dialect, Operation
from trio_runner.server.dialects.fields import Body, Field, either
from trio_runner.server.problems import Problem

Document: TypeAlias = dict[str, Any]
Served: TypeAlias = Sequence[tuple[Dialect, Sequence[Operation]]]
"""Each dialect with what it serves."""

EVERYWHERE: Final = (400, 401, 403, 422, 500, 503)
"""Statuses of refusals that every operation may answer with, before its dialect words them."""
WITH_BODY: Final = (404, 408, 413)
"""The same for operations with a body. What is not found is an adapter or a model."""

_KEYS: Final = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}
"""The ways to send the API key."""
_REFERENCE: Final = "#/components/schemas/{name}"
_VARIABLE: Final = re.compile(r"<(?:\w+:)?(\w+)>")


def describe(served: Served, *, version: str, needs_key: bool) -> Document:
    """The document, as values that JSON has. `version` is the server's. With `needs_key`, clients must send a key."""
    types = _Types(served)
    paths: dict[str, dict[str, Any]] = {}
    for dialect, operations in served:
        for operation in operations:
            method = "get" if operation.method == ANY_METHOD else operation.method.lower()
            path = _VARIABLE.sub(r"{\1}", operation.path)
            described = _operation(dialect, operation, types)
            if needs_key and needs_no_key(method.upper(), path):
                described["security"] = []
            paths.setdefault(path, {})[method] = described
    document: Document = {
        "openapi": "3.1.0",
        "info": {"title": "trio-runner", "version": version, "description": "One model, served over HTTP."},
        "tags": [{"name": dialect.name, "description": dialect.about} for dialect, operations in served if operations],
        "paths": paths,
        "components": {"schemas": types.components},
    }
    if needs_key:
        document["components"]["securitySchemes"] = _KEYS
        document["security"] = [{name: []} for name in _KEYS]  # either of them
    return document


class _Types:
    """The schemas of all msgspec types of the answers. Those that have a name are components of the document."""

    def __init__(self, served: Served) -> None:
        kinds = [
            kind
            for dialect, operations in served
            for kind in (dialect.error_type, *(type_ for one in operations for type_ in (one.answer, one.stream)))
        ]
        known = sorted({member for kind in kinds for member in _members(kind)}, key=repr)
        schemas, self.components = msgspec.json.schema_components(known, ref_template=_REFERENCE)
        self._schemas = dict(zip(known, schemas, strict=True))

    def schema(self, kind: Any) -> Mapping[str, Any]:
        """The schema of a type, or of a union of types. Anything is allowed by None."""
        schemas = [self._schemas[member] for member in _members(kind)]
        return either(*schemas) if len(schemas) > 1 else schemas[0] if schemas else {}


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, which msgspec does not take as a whole if several of them are objects."""
    if kind is None:
        return ()
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _operation(dialect: Dialect, operation: Operation, types: _Types) -> dict[str, Any]:
    name = re.sub(r"\W+", "_", f"{dialect.name}_{operation.method}_{operation.path}").strip("_").lower()
    described: dict[str, Any] = {"operationId": name, "summary": operation.summary, "tags": [dialect.name]}
    if variables := _VARIABLE.findall(operation.path):
        described["parameters"] = [
            {"name": variable, "in": "path", "required": True, "schema": {"type": "string"}} for variable in variables
        ]
    if operation.body is not None:
        described["requestBody"] = _request_body(operation.body)
    refusals = {*EVERYWHERE, *operation.refusals, *(WITH_BODY if operation.body is not None else ())}
    refusals = {dialect.word(Problem(status, "")).status for status in refusals}  # some make a 400 of a 422
    refusal = _refusal(dialect, types)
    described["responses"] = {
        "200": {"description": HTTPStatus.OK.phrase, "content": _content(operation, types)},
        **{str(status): {"description": HTTPStatus(status).phrase, **refusal} for status in sorted(refusals)},
    }
    return described


def _request_body(body: Body) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _property(field) for name, field in body.fields.items()},
    }
    if required := [name for name, field in body.fields.items() if field.required]:
        schema["required"] = required
    return {"required": True, "content": {"application/json": {"schema": schema, "example": dict(body.example)}}}


def _property(field: Field) -> dict[str, Any]:
    described = {**field.schema, "description": field.doc}
    if field.ignored:
        described["deprecated"] = True
    return described


def _content(operation: Operation, types: _Types) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.answer is not None or operation.stream is None:
        content[operation.answer_type] = {"schema": types.schema(operation.answer)}
    if operation.stream is not None:
        # OpenAPI has no schema for the parts of a stream before 3.2, so a whole stream is a text.
        described = {"type": "string", "description": "A stream of the type in contentSchema."}
        content[operation.stream_type] = {"schema": {**described, "contentSchema": types.schema(operation.stream)}}
    return content


def _refusal(dialect: Dialect, types: _Types) -> dict[str, Any]:
    if dialect.error_type is None:
        return {"content": {"text/plain": {"schema": {"type": "string"}}}}
    return {"content": {"application/json": {"schema": types.schema(dialect.error_type)}}}
