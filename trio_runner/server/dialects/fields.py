"""The fields of the body of a request, for every dialect: one table for each kind of request. Pure.

From the one entry of a field come its check, its row in the documentation and its place in /openapi.json. The entries
of parameters come from the tables of parameters, such as `SamplingParams`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from trio_runner.errors import InvalidRequest
from trio_runner.parameters import Kind, Parameter, parameters_of
from trio_runner.request import MAX_STOP_STRINGS, AdapterChoice, GenerateRequest
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.json_in import Check, Object, wrong
from trio_runner.server.names import MAX_NAME_LENGTH

log = logging.getLogger(__name__)

Schema: TypeAlias = Mapping[str, Any]
"""A JSON schema of a value, as OpenAPI 3.1 has it."""

MAX_NAMES_LOGGED: Final = 1000
"""Names of unknown fields that are remembered, and logged only once. After that none is logged."""

# --- One field -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of a body."""

    check: Check
    schema: Schema
    """What the check lets through; with its default, if it has one that JSON can express."""
    doc: str
    """What the field does, in full sentences."""
    default_text: str = ""
    """The default in words, where the schema's default says too little."""
    required: bool = False
    ignored: bool = False
    """The field is checked and has no effect."""


Fields: TypeAlias = Mapping[str, Field]
"""The fields of a body, by name in lower case. They are checked in this order."""

STRING: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
BOOLEAN: Final[Schema] = {"type": "boolean"}
OBJECT: Final[Schema] = {"type": "object"}


def array(items: Schema, **more: Any) -> Schema:
    """The schema of a list."""
    return {"type": "array", "items": items, **more}


def either(*schemas: Schema) -> Schema:
    """The schema of a value that one of `schemas` describes."""
    return {"anyOf": list(schemas)}


_CHECKS: Final[Mapping[str, Check]] = {
    "string": json_in.check_text,
    "integer": json_in.check_integer,
    "number": json_in.check_number,
    "boolean": json_in.check_boolean,
}


def field(schema: Schema, doc: str, *, check: Check | None = None, default: Any = None, **more: Any) -> Field:
    """A field whose schema is `schema`, with a default of `default` unless that is None.

    A schema of one plain type brings its check. Any other needs `check`. The schema only describes: what it says beside
    the type, such as bounds, must be checked as well.
    """
    if check is None:
        check = _CHECKS[schema["type"]]
    if default is not None:
        schema = {**schema, "default": default}
    return Field(check=check, schema=schema, doc=doc, **more)


def ignored(schema: Schema, doc: str) -> Field:
    """A field that is checked and has no effect; `doc` says why."""
    return field(schema, doc, default_text="ignored", ignored=True)


def object_schema(fields: Fields) -> Schema:
    """The schema of an object with these fields."""
    required = [name for name, known in fields.items() if known.required]
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: {**known.schema, "description": known.doc} for name, known in fields.items()},
    }
    return {**schema, "required": required} if required else schema


def object_of(fields: Fields) -> Check:
    """The check of an object with these fields. A complaint names a field by its path, such as `options.seed`. An
    unknown field is ignored, and logged once."""

    def check_object(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Object):
            wrong(name, "an object", value)
        return _read(json_in.fold(value), fields, f"{name}.")

    return check_object


# --- Fields from the tables of parameters ----------------------------------------------------------------------------


def _token_biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Both [[token, bias], ...] and {"token": bias, ...}; a bias of false forbids the token."""
    if isinstance(value, Object):
        pairs = json_in.fold(value).items()
        value = [[int(token) if re.fullmatch("[0-9]{1,10}", token) else token, bias] for token, bias in pairs]
    if not isinstance(value, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in value):
        wrong(name, "a list of [token, bias] or an object", value)
    return tuple(
        (json_in.check_integer(name, token), -math.inf if bias is False else json_in.check_number(name, bias))
        for token, bias in value
    )


_KINDS: Final[Mapping[Kind, tuple[Schema, Check]]] = {
    "number": (NUMBER, json_in.check_number),
    "integer": (INTEGER, json_in.check_integer),
    "boolean": (BOOLEAN, json_in.check_boolean),
    "text": (STRING, json_in.check_text),
    "choice": (STRING, json_in.check_text),
}
_BIAS: Final = either(NUMBER, {"const": False})
_OTHERS: Final[Mapping[str, tuple[Schema, Check]]] = {
    "logit_bias": (
        either(
            array({"type": "array", "prefixItems": [INTEGER, _BIAS], "minItems": 2, "maxItems": 2}),
            {"type": "object", "additionalProperties": _BIAS},
        ),
        _token_biases,
    ),
    "dry_sequence_breakers": (array(STRING), json_in.list_of(json_in.check_text, "strings")),
}
"""Parameters that have a type of their own."""


def fields_of(table: type[Any], *names: str, **defaults: Any) -> dict[str, Field]:
    """Fields for the parameters of a dataclass: for `names`, or for all. The check is of the JSON type only, as the
    dataclass checks the range. `defaults` are those of the dialect, where they differ from the table's."""
    parameters = parameters_of(table)
    return {
        name: _field_of(parameters[name], defaults.get(name, parameters[name].default), name in defaults)
        for name in (names or parameters)
    }


def _field_of(parameter: Parameter, default: Any, is_own: bool) -> Field:
    schema, check = _OTHERS.get(parameter.name) or _KINDS[parameter.kind]
    schema = dict(schema)
    if parameter.kind in ("number", "integer"):
        schema["minimum"], schema["maximum"] = parameter.low, parameter.high
    if parameter.choices:
        schema["enum"] = list(parameter.choices)
    if isinstance(default, tuple):
        default = list(default)
    text = parameter.default_text if not is_own else ""
    return field(schema, parameter.doc, check=check, default=default, default_text=text)


# --- Fields of several dialects --------------------------------------------------------------------------------------


def check_model_name(name: str, value: Any) -> str:
    """The name of a model. It is bounded because every part of a stream may repeat it."""
    text = json_in.check_text(name, value)
    if len(text) > MAX_NAME_LENGTH:
        raise InvalidRequest(f"{name} has more than {MAX_NAME_LENGTH} characters", param=name)
    return text


def _stop(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (json_in.check_text(name, value),)
    if not isinstance(value, list):
        wrong(name, "a string or a list of strings", value)
    return json_in.check_texts(name, value, MAX_STOP_STRINGS)


STOP: Final = field(
    either(STRING, array(STRING)), parameters_of(GenerateRequest)["stop"].doc, check=_stop, default_text="none"
)


def _adapter(name: str, value: Any) -> AdapterChoice:
    if not isinstance(value, Object):
        wrong(name, "a list of objects", value)
    given = json_in.fold(value)
    if "name" not in given:
        raise InvalidRequest(f"{name} must have a name", param=name)
    return AdapterChoice(
        json_in.check_text(f"{name}.name", given["name"]),
        json_in.check_number(f"{name}.scale", given.get("scale", 1.0)),
    )


ADAPTERS: Final = field(
    array({"type": "object", "properties": {"name": STRING, "scale": NUMBER}, "required": ["name"]}),
    'LoRA adapters to apply, as `{"name": "...", "scale": 1}`. An empty list means the bare model.',
    check=json_in.list_of(_adapter, "objects"),
    default_text="those loaded with the model",
)


# --- Bodies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Body:
    """What the body of a request may have."""

    fields: Fields
    example: Mapping[str, Any]
    refusal: str = "the body is not a JSON object: {}"
    """What a client is told whose body is no JSON object; {} stands for the reason."""

    def read(self, body: bytes) -> dict[str, Any]:
        """The known fields of the object that `body` starts with, each checked.

        Raises `InvalidRequest`: `refusal` if there is no object, what the check of a field raises, and an error that
        names a required field that is missing. A field that is not known is ignored, and logged once.
        """
        try:
            value = json_in.decode(body)
        except ValueError as error:
            raise InvalidRequest(self.refusal.format(error)) from None
        except RecursionError:
            raise InvalidRequest(self.refusal.format("it is nested too deeply")) from None
        if value is None:
            value = Object([])
        if not isinstance(value, Object):
            raise InvalidRequest(self.refusal.format(f"it is {json_in.kind_of(value)}"))
        return _read(json_in.fold(value), self.fields)


def _read(given: Mapping[str, Any], fields: Fields, prefix: str = "") -> dict[str, Any]:
    """The known fields of an object, each checked. `prefix` goes before the names in complaints."""
    for name, known in fields.items():
        if known.required and name not in given:
            raise InvalidRequest(f"{prefix}{name} is missing", param=f"{prefix}{name}")
    for name in given.keys() - fields.keys():
        _log_once(re.sub(r"\[\d+\]", "", prefix) + name)
    return {name: known.check(prefix + name, given[name]) for name, known in fields.items() if name in given}


_logged: set[str] = set()


def _log_once(name: str) -> None:
    if name not in _logged and len(_logged) < MAX_NAMES_LOGGED:
        _logged.add(name)
        log.info("a request has a field that is not known here, and ignored: %.100r", name)
