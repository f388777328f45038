"""The tables of the documentation, made from the code: parameters, fields on the wire, options, errors and bounds.

Nothing here knows Sphinx, so that the tests can look at the tables too. A cell is text in which code stands in
backticks.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import click

from trio_runner import errors
from trio_runner.cli.main import cli
from trio_runner.parameters import Parameter, parameters_of
from trio_runner.request import EmbedRequest, GenerateRequest, RerankRequest
from trio_runner.sampling import SamplingParams
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.json_in import Check, Fields
from trio_runner.server.dialects.runner import requests


@dataclass(frozen=True, slots=True)
class Table:
    """A row of headings, and rows of as many cells."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]
    """Relative width of each column."""


# ---- parameters ------------------------------------------------------------------------------------------------------

_TYPES: Final = {"number": "number", "integer": "integer", "boolean": "boolean", "text": "text", "choice": "text"}


def parameters(cls: type[Any]) -> Table:
    """The fields of a dataclass of parameters, as a caller in Python gives them."""
    annotations = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    rows = [
        (f"`{name}`", f"`{annotations[name]}`", _default(parameter), _with_range(parameter))
        for name, parameter in parameters_of(cls).items()
    ]
    return Table(("field", "type", "default", "meaning"), tuple(rows), (20, 20, 15, 45))


def _default(parameter: Parameter, *, json: bool = False) -> str:
    if parameter.default_text:
        return parameter.default_text
    return f"`{_literal(parameter.default, json=json)}`"


def _literal(value: object, *, json: bool) -> str:
    if json and (value is None or isinstance(value, bool)):
        return "null" if value is None else str(value).lower()
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
    if high == math.inf or (parameter.kind == "integer" and high == 2**31 - 1):
        return f"{low:g} or more{unit}"
    return f"{_figure(low)} to {_figure(high)}{unit}"


def _figure(number: float) -> str:
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:g}"


# ---- fields on the wire ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a JSON body; "" takes the type, default or text from the parameter of the same name."""

    type: str = ""
    default: str = ""
    text: str = ""


_IGNORED: Final = Field(default="ignored", text="Checked and ignored: this is settled when the model is loaded.")

COMPLETION: Final[Mapping[str, Field]] = {
    "prompt": Field("string", "required", "The text to continue. `[img-N]` in it stands for the image of that id."),
    "image_data": Field(
        "list of objects",
        "none",
        'Images of the prompt, as `{"id": N, "data": "..."}`: `data` is a file in base64.',
    ),
    "adapters": Field(
        "list of objects",
        "those loaded with the model",
        'LoRA adapters to apply, as `{"name": "...", "scale": 1}`. An empty list means the bare model.',
    ),
    "n_predict": Field(
        "integer",
        "`-1`",
        "Tokens to generate at most. 0 and below: until the model ends the text or, with `shift` false, the context is "
        "full.",
    ),
    "stop": Field("list of strings", "none"),
    "cache_prompt": Field(
        default="`false`",
        text="Continue from the longest beginning of the prompt that a slot still holds. As in the original runner, "
        "this is off unless you ask for it.",
    ),
    "truncate": Field(default="`true`"),
    "seed": Field(default="`-1`", text="Seed of the random draw. Only the lowest 32 bits count; -1 chooses a seed."),
    "repeat_last_n": Field(
        text="Tokens that the repeat, frequency and presence penalties look back on, the prompt included. 0 turns "
        "them off, below 0 means 64."
    ),
    "logit_bias": Field(
        "list or object",
        "none",
        'Numbers to add to the logits of tokens, as `[[token, bias], ...]` or `{"token": bias}`. A bias of `false` '
        "forbids the token.",
    ),
    "dry_sequence_breakers": Field("list of strings"),
    "n_probs": Field(
        "integer",
        "`0`",
        "Number of most probable alternatives to report with every token; `logprobs` overrules it. 0 reports nothing.",
    ),
    **dict.fromkeys(
        (
            "num_ctx",
            "num_batch",
            "num_gpu",
            "main_gpu",
            "num_thread",
            "low_vram",
            "f16_kv",
            "logits_all",
            "vocab_only",
            "use_mmap",
            "use_mlock",
        ),
        _IGNORED,
    ),
}
"""What the table of POST /completion says where the wire differs from the parameters in Python."""

EMBEDDING: Final[Mapping[str, Field]] = {
    "content": Field("string or list of strings", "required", "The text to embed, or several texts."),
    "cache_prompt": Field("boolean", "ignored", "Accepted and ignored: embeddings use no prompt cache."),
    "adapters": COMPLETION["adapters"],
}
RERANK: Final[Mapping[str, Field]] = {
    "query": Field("string", "required", "The question."),
    "documents": Field("list of strings", "required", "The texts to score."),
    "top_n": Field("integer", "all", "Return only this many of the best documents."),
    "adapters": COMPLETION["adapters"],
}
ADAPTER: Final[Mapping[str, Field]] = {
    "file": Field("string", "required", "Name of a file in the directory that `--adapter-dir` names, without a path."),
    "name": Field("string", "the file's name without its ending", "What requests choose the adapter by."),
    "scale": Field("number", "`0`", "How strongly it applies to requests that choose no adapters."),
}
TOKENIZE: Final[Mapping[str, Field]] = {
    "content": Field("string", '`""`', "The text to tokenise."),
    "add_special": Field("boolean", "`false`", "Add the tokens that the model has around a text, such as BOS."),
    "parse_special": Field("boolean", "`true`", "Read special tokens such as `<|im_end|>` as the tokens they name."),
}
DETOKENIZE: Final[Mapping[str, Field]] = {"tokens": Field("list of integers", "`[]`", "The tokens.")}

_CHECKED_AS: Final[Mapping[Check, str]] = {json_in.check_integer: "integer", json_in.check_boolean: "boolean"}

_BODIES: Final[Mapping[str, tuple[Fields, Mapping[str, Field], tuple[type[Any], ...]]]] = {
    "completion": (requests.COMPLETION, COMPLETION, (SamplingParams, GenerateRequest)),
    "embedding": (requests.EMBEDDING, EMBEDDING, (EmbedRequest,)),
    "rerank": (requests.RERANK, RERANK, (RerankRequest,)),
    "adapters": (requests.ADAPTER, ADAPTER, ()),
    "tokenize": (requests.TOKENIZE, TOKENIZE, ()),
    "detokenize": (requests.DETOKENIZE, DETOKENIZE, ()),
}


def wire_fields(endpoint: str, *, part: str = "") -> Table:
    """The fields that the body of a request to `endpoint` may have.

    `part` of them: "sampling" parameters, those that are "ignored", or "request", all others.
    Raises KeyError for a field that the code reads and nothing here describes, and ValueError for the opposite.
    """
    fields, described, classes = _BODIES[endpoint]
    if unknown := set(described) - set(fields):
        raise ValueError(f"the code reads no field {', '.join(sorted(unknown))} at /{endpoint}")
    known: dict[str, Parameter] = {}
    for cls in classes:
        known.update(parameters_of(cls))
    rows = [
        _wire_row(name, described.get(name, Field()), known.get(name), _CHECKED_AS.get(check, ""))
        for name, check in fields.items()
        if part in ("", _part_of(name, described))
    ]
    return Table(("field", "type", "default", "meaning"), tuple(rows), (20, 15, 20, 45))


def _part_of(name: str, described: Mapping[str, Field]) -> str:
    if described.get(name) is _IGNORED:
        return "ignored"
    return "sampling" if name in (*parameters_of(SamplingParams), "n_probs") else "request"


def _wire_row(name: str, field: Field, parameter: Parameter | None, checked_as: str) -> tuple[str, str, str, str]:
    if parameter is None and not field.text:
        raise KeyError(f"nothing describes the field {name}")
    kind = field.type or (_TYPES.get(parameter.kind, "") if parameter is not None else checked_as)
    kind = "string" if kind == "text" else kind
    default = field.default or (_default(parameter, json=True) if parameter is not None else "")
    text = field.text or (_with_range(parameter) if parameter is not None else "")
    return f"`{name}`", kind, "not given" if default == "`null`" else default, text


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
    ("Texts of one embedding or ranking request", "trio_runner.request.MAX_DOCUMENTS", "", "400"),
    ("Open connections", "trio_runner.server.serve.MAX_CONNECTIONS", "", "503"),
    ("Seconds to send the head of a request", "trio_runner.server.connection.HEAD_SECONDS", "seconds", "closed"),
    ("Seconds to send a body", "trio_runner.server.app.BODY_TIMEOUT", "seconds", "408"),
    ("Seconds between two requests", "trio_runner.server.serve.KEEP_ALIVE_SECONDS", "seconds", "closed"),
)
"""(what, its constant, the unit, what a request beyond it gets)"""


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
