"""The tables of the documentation, made from the code: parameters, fields on the wire, options, errors and bounds.

Nothing here knows Sphinx, so that the tests can look at the tables too. A cell is text in which code stands in
backticks.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import click

from trio_runner import errors
from trio_runner.cli.main import cli
from trio_runner.parameters import Parameter, parameters_of
from trio_runner.sampling import SamplingParams
from trio_runner.server.dialects.fields import Body, Field, Schema
from trio_runner.server.dialects.llama_server import text_requests
from trio_runner.server.dialects.llama_server.completion_fields import COMPLETION, NOT_COVERED
from trio_runner.server.dialects.llama_server.infill import GAP_FIELDS
from trio_runner.server.dialects.ollama import bodies as ollama
from trio_runner.server.dialects.ollama.options import OPTIONS
from trio_runner.server.dialects.openai.requests_chat import CHAT
from trio_runner.server.dialects.openai.requests_embeddings import EMBEDDINGS
from trio_runner.server.dialects.openai.requests_text import TEXT
from trio_runner.server.dialects.runner import requests
from trio_runner.server.metric_table import LLAMA_SERVER_METRICS, METRICS


@dataclass(frozen=True, slots=True)
class Table:
    """A row of headings, and rows of as many cells."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]
    """Relative width of each column."""


# ---- parameters ------------------------------------------------------------------------------------------------------


def parameters(cls: type[Any]) -> Table:
    """The fields of a dataclass of parameters, as a caller in Python gives them."""
    annotations = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    rows = [
        (f"`{name}`", f"`{annotations[name]}`", _default(parameter), _with_range(parameter))
        for name, parameter in parameters_of(cls).items()
    ]
    return Table(("field", "type", "default", "meaning"), tuple(rows), (20, 20, 15, 45))


def _default(parameter: Parameter) -> str:
    return parameter.default_text or f"`{_literal(parameter.default)}`"


def _literal(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"{value:g}"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _with_range(parameter: Parameter) -> str:
    bounds = ""
    if parameter.kind in ("number", "integer") and (parameter.low, parameter.high) != (-(2**31), 2**31 - 1):
        bounds = f" Allowed: {_bounds(parameter)}."
    elif parameter.kind == "choice":
        bounds = f" Allowed: {', '.join(f'`{choice}`' for choice in parameter.choices)}."
    elif parameter.max_bytes is not None:
        bounds = f" Allowed: at most {parameter.max_bytes:,} bytes."
    return parameter.doc + bounds


def _bounds(parameter: Parameter) -> str:
    low, high = parameter.low, parameter.high
    unit = f" {parameter.unit}" if parameter.unit else ""
    if high in (math.inf, 2**31 - 1):
        return f"{low:g} or more{unit}"
    return f"{_figure(low)} to {_figure(high)}{unit}"


def _figure(number: float) -> str:
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:g}"


# ---- fields on the wire ----------------------------------------------------------------------------------------------


BODIES: Final[Mapping[str, Body]] = {
    "completion": requests.COMPLETION,
    "embedding": requests.EMBEDDING,
    "rerank": requests.RERANK,
    "adapters": requests.ADAPTER,
    "tokenize": requests.TOKENIZE,
    "detokenize": requests.DETOKENIZE,
    "ollama-generate": ollama.GENERATE,
    "ollama-chat": ollama.CHAT,
    "ollama-message": Body(ollama.MESSAGE, {}),
    "ollama-options": Body(OPTIONS, {}),
    "ollama-embed": ollama.EMBED,
    "ollama-embeddings": ollama.EMBEDDINGS,
    "ollama-show": ollama.SHOW,
    "ollama-pull": ollama.PULL,
    "openai-chat": CHAT,
    "openai-text": TEXT,
    "openai-embeddings": EMBEDDINGS,
    "llama-completion": COMPLETION,
    "llama-infill": Body(GAP_FIELDS, {}),
    "llama-embedding": text_requests.EMBEDDING,
    "llama-rerank": text_requests.RERANK,
    "llama-tokenize": text_requests.TOKENIZE,
    "llama-detokenize": text_requests.DETOKENIZE,
    "llama-template": text_requests.TEMPLATE,
}
"""The body of each kind of request, by the name that the pages use."""


def wire_fields(name: str, *, part: str = "", beside: str = "") -> Table:
    """The fields that a body of `BODIES` may have.

    `part` of them: "sampling" parameters, those that are "ignored" or "uncovered", or "request", all others. With
    `beside`, only those that this other body does not have, or has with another meaning.
    """
    others = wire_fields(beside).rows if beside else ()
    rows = [
        _wire_row(name, field) for name, field in BODIES[name].fields.items() if part in ("", _part_of(name, field))
    ]
    rows = [row for row in rows if row not in others]
    return Table(("field", "type", "default", "meaning"), tuple(rows), (20, 15, 20, 45))


def _part_of(name: str, field: Field) -> str:
    if field.ignored:
        return "ignored"
    if field.default_text == NOT_COVERED:
        return "uncovered"
    return "sampling" if name in (*parameters_of(SamplingParams), "n_probs", "samplers") else "request"


def _wire_row(name: str, field: Field) -> tuple[str, str, str, str]:
    default = "required" if field.required else field.default_text
    if not default and "default" in field.schema:
        default = f"`{json.dumps(field.schema['default'])}`"
    return f"`{name}`", schema_words(field.schema), default or "not given", field.doc + _bounds_of(field.schema)


def schema_words(schema: Schema, *, several: bool = False) -> str:
    """The type that a JSON schema describes, in words; of `several` such values, in the plural."""
    if "anyOf" in schema:
        return " or ".join(schema_words(one, several=several) for one in schema["anyOf"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    kind = "list" if schema.get("type") == "array" else schema.get("type", "any value")
    words = f"{kind}s" if several and kind != "any value" else kind
    return f"{words} of {schema_words(schema['items'], several=True)}" if "items" in schema else words


def _bounds_of(schema: Schema) -> str:
    if "enum" in schema:
        return f" Allowed: {', '.join(f'`{choice}`' for choice in schema['enum'])}."
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if (low, high) in ((-math.inf, math.inf), (-(2**31), 2**31 - 1)):
        return ""
    return f" Allowed: {_bounds(Parameter(kind='number', default=None, doc='', low=low, high=high))}."


# ---- the command line ------------------------------------------------------------------------------------------------


def commands() -> Table:
    """Every command, with the first sentence of its help."""
    rows = [
        (f"`trio-runner {name}`", " ".join((command.help or "").strip().partition("\n\n")[0].split()))
        for name, command in sorted(cli.commands.items())
    ]
    return Table(("command", "what it does"), tuple(rows), (25, 75))


def command_options(name: str, *, beside: str = "", common: str = "") -> Table:
    """The options of a command: all of them, or only those that the command `beside` does not have, or only those that
    the command `common` has too."""
    own = {parameter.name for parameter in cli.commands[name].params}
    if beside or common:
        others = {parameter.name for parameter in cli.commands[beside or common].params}
        own = own & others if common else own - others
    context = click.Context(cli.commands[name])
    rows = []
    for parameter in cli.commands[name].params:
        if not isinstance(parameter, click.Option) or parameter.hidden or parameter.name not in own:
            continue
        record = parameter.get_help_record(context)
        assert record is not None
        flags, text = record
        text, _, default = text.partition("  [")
        rows.append((f"`{flags}`", f"{text.strip()} [{default}" if default else text.strip()))
    return Table(("option", "meaning"), tuple(rows), (35, 65))


# ---- errors ----------------------------------------------------------------------------------------------------------


def error_classes() -> Table:
    """Every error, with the HTTP status that it becomes."""
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.RunnerError) and value is not errors.RunnerError
    ]
    rows = [(f"`{cls.__name__}`", str(cls.status), (cls.__doc__ or "").strip()) for cls in classes]
    return Table(("error", "HTTP status", "meaning"), tuple(rows), (20, 12, 68))


# ---- bounds ----------------------------------------------------------------------------------------------------------

BOUNDS: Final = (
    ("Bytes of a body", "trio_runner.server.app.MAX_BODY_BYTES", "bytes", "413"),
    ("Bytes of a body, with a projector", "trio_runner.server.app.MAX_BODY_BYTES_WITH_IMAGES", "bytes", "413"),
    ("Bytes of the bodies of all requests together", "trio_runner.server.intake.MAX_BYTES", "bytes", "503"),
    ("Lists, objects and strings in one body", "trio_runner.server.dialects.json_in.MAX_VALUES", "", "400"),
    ("Bytes of a prompt or text", "trio_runner.request.MAX_TEXT_BYTES", "bytes", "400"),
    ("Images of one prompt", "trio_runner.request.MAX_IMAGES", "", "400"),
    ("Bytes of one image file", "trio_runner.image_source.MAX_IMAGE_BYTES", "bytes", "400"),
    ("Pixels of one image", "trio_runner.image_formats.MAX_PIXELS", "", "400"),
    ("Stop strings", "trio_runner.request.MAX_STOP_STRINGS", "", "400"),
    ("Bytes of a stop string", "trio_runner.request.MAX_STOP_BYTES", "bytes", "400"),
    ("Adapters of one request", "trio_runner.request.MAX_ADAPTERS", "", "400"),
    ("Tokens with a bias", "trio_runner.sampling.MAX_LOGIT_BIAS", "", "400"),
    ("Bytes of a grammar", "trio_runner.sampling.MAX_GRAMMAR_BYTES", "bytes", "400"),
    ("Bytes of a JSON schema", "trio_runner.json_schema.MAX_SCHEMA_BYTES", "bytes", "400"),
    ("Levels of a JSON schema", "trio_runner.json_schema.MAX_SCHEMA_DEPTH", "", "400"),
    ("Bytes of a pattern in a JSON schema", "trio_runner.json_schema.MAX_PATTERN_BYTES", "bytes", "400"),
    ("Least common multiple of `multipleOf` in it", "trio_runner.json_schema.MAX_MULTIPLE", "", "400"),
    (
        "Answers to one prompt, in OpenAI's dialect",
        "trio_runner.server.dialects.openai.requests.MAX_CHOICES",
        "",
        "400",
    ),
    (
        "Answers to all prompts of one request, in OpenAI's dialect",
        "trio_runner.server.dialects.openai.requests.MAX_GENERATIONS",
        "",
        "400",
    ),
    ("Texts of one embedding or ranking request", "trio_runner.request.MAX_DOCUMENTS", "", "400"),
    ("Open connections", "trio_runner.server.serve.MAX_CONNECTIONS", "", "503"),
    ("Seconds to send the head of a request", "trio_runner.server.connection.HEAD_SECONDS", "seconds", "closed"),
    ("Seconds to send a body", "trio_runner.server.app.BODY_TIMEOUT", "seconds", "408"),
    ("Seconds between two requests", "trio_runner.server.serve.KEEP_ALIVE_SECONDS", "seconds", "closed"),
)
"""(what, its constant, the unit, what a request beyond it gets)"""


def metrics(whose: str = "") -> Table:
    """The metrics of /metrics: ours, without their prefix, or those of llama-server."""
    entries = LLAMA_SERVER_METRICS if whose == "llama-server" else METRICS
    rows = [
        (f"`{entry.name}`" + (f", by `{entry.label}`" if entry.label else ""), entry.kind, entry.doc)
        for entry in entries
    ]
    return Table(("name", "kind", "meaning"), tuple(rows), (40, 15, 45))


def bounds() -> Table:
    """What one client may ask for, as the constants say it."""
    rows = [(what, _amount(_constant(name), unit), outcome) for what, name, unit, outcome in BOUNDS]
    return Table(("what", "at most", "beyond it"), tuple(rows), (60, 20, 20))


def _constant(name: str) -> float:
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    assert isinstance(value, (int, float))
    return value


def _amount(value: float, unit: str) -> str:
    if unit == "bytes" and value >= 1 << 20:
        return f"{value / (1 << 20):g} MiB"
    if unit == "bytes" and value >= 1 << 10:
        return f"{value / (1 << 10):g} KiB"
    return f"{value:,g} {unit}".strip() if value < 1e6 else f"{value:,.0f} {unit}".strip()
