"""The fields of a completion in llama-server's dialect: their checks, defaults and documentation. Pure.

Names, ranges and defaults are those of llama-server (tools/server/server-schema.cpp of llama.cpp). What it would do and
this server cannot is refused; what has no effect there has none here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from trio_runner.errors import InvalidRequest
from trio_runner.parameters import number_complaint
from trio_runner.request import MAX_ADAPTER_SCALE, MAX_ADAPTERS, GenerateRequest
from trio_runner.sampling import MAX_LOGPROBS, SamplingParams
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    OBJECT,
    STOP,
    STRING,
    Body,
    Field,
    Fields,
    Schema,
    array,
    check_model_name,
    either,
    field,
    fields_of,
    ignored,
)
from trio_runner.server.dialects.json_in import Check, Object, fold, list_of, wrong
from trio_runner.server.dialects.llama_server.prompts import MAX_TEXTS, PROMPTS, PromptForm, check_prompts
from trio_runner.server.dialects.llama_server.samplers import check_samplers

MAX_COMPLETIONS: Final = 128
"""Completions of one request: prompts, times `n_cmpl`."""
MAX_RESPONSE_FIELDS: Final = 256
"""Fields that one request may name for its answer."""
NOT_COVERED: Final = "not covered"
"""The default, in words, of a field of which only values without an effect are let through."""
_INT32: Final = 2**31 - 1

DEFAULTS: Final[Mapping[str, Any]] = {
    "top_p": 0.95,
    "min_p": 0.05,
    "repeat_penalty": 1.0,
    "dry_penalty_last_n": 64,
}
"""Sampling parameters whose default is another one than ours."""


# --- Checks ----------------------------------------------------------------------------------------------------------


def _integer(low: int, high: int = _INT32) -> Check:
    return json_in.integer_between(low, high)


def _bounded(low: int, doc: str, high: int = _INT32, **more: Any) -> Field:
    """A field for an integer from `low` to `high`."""
    return field({**INTEGER, "minimum": low, "maximum": high}, doc, check=_integer(low, high), **more)


def _uncovered(schema: Schema, check: Check, is_harmless: Callable[[Any], bool], doc: str) -> Field:
    """A field that would change the answer in llama-server and is not covered here: only values without an effect are
    let through."""

    def refuse(name: str, value: Any) -> Any:
        checked = check(name, value)
        if not is_harmless(checked):
            raise InvalidRequest(f"{name} is not covered by this server", param=name)
        return checked

    return field(schema, doc, check=refuse, default_text=NOT_COVERED)


def _prompts(name: str, value: Any) -> tuple[PromptForm, ...]:
    return check_prompts(name, value, MAX_COMPLETIONS)


def _any(name: str, value: Any) -> Any:
    return value


def _list(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        wrong(name, "a list", value)
    return value


def _schema(name: str, value: Any) -> str:
    if not isinstance(value, (Object, bool)):
        wrong(name, "an object", value)
    try:
        return json.dumps(value) if value != {} else '{"type": "object"}'
    except RecursionError:
        raise InvalidRequest(f"{name} is nested too deeply", param=name) from None


def _adapter(name: str, value: Any) -> tuple[int, float]:
    if not isinstance(value, Object):
        wrong(name, "a list of objects", value)
    given = fold(value)
    if "id" not in given:
        raise InvalidRequest(f"{name} must have an id", param=name)
    number = _integer(0)(f"{name}.id", given["id"])
    scale = json_in.check_number(f"{name}.scale", given.get("scale", 0.0))
    if not abs(scale) <= MAX_ADAPTER_SCALE:
        raise InvalidRequest(
            f"{name}.scale must be between {-MAX_ADAPTER_SCALE:g} and {MAX_ADAPTER_SCALE:g}", param=f"{name}.scale"
        )
    return number, scale


def _lora(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    chosen: tuple[tuple[int, float], ...] = list_of(_adapter, "objects")(name, value)
    if len(chosen) > MAX_ADAPTERS:
        raise InvalidRequest(f"{name} has {len(chosen)} adapters, but at most {MAX_ADAPTERS} are allowed", param=name)
    if len({number for number, _ in chosen}) < len(chosen):
        raise InvalidRequest(f"{name} names an adapter twice", param=name)
    return chosen


def _bias(name: str, value: Any) -> float:
    return -math.inf if value is False else json_in.check_number(name, value)


def _biases(name: str, value: Any) -> tuple[tuple[int | str, float], ...]:
    """[[token or text, bias], ...] or {"token or text": bias, ...}; a bias of false forbids the token."""
    is_object = isinstance(value, Object)
    pairs = [[_number_or_text(token), bias] for token, bias in value.items()] if is_object else value
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        wrong(name, "a list of [token, bias] or an object", value)
    biases = tuple((_token_or_text(name, token), _bias(name, bias)) for token, bias in pairs)
    n_texts = sum(isinstance(token, str) for token, _ in biases)
    if n_texts > MAX_TEXTS:
        raise InvalidRequest(f"{name} has {n_texts} texts, but at most {MAX_TEXTS} are allowed", param=name)
    return biases


def _number_or_text(name: str) -> int | str:
    return int(name) if name.isascii() and name.isdigit() and len(name) <= 10 else name


def _token_or_text(name: str, value: Any) -> int | str:
    return json_in.check_text(name, value) if isinstance(value, str) else _integer(0)(name, value)


def _decay(name: str, value: Any) -> float:
    number = json_in.check_number(name, value)
    complaint = number_complaint(name, number, 0, 0.99)
    if complaint is not None:
        raise InvalidRequest(complaint, param=name)
    return number


def _response_fields(name: str, value: Any) -> tuple[str, ...]:
    return json_in.check_texts(name, value, MAX_RESPONSE_FIELDS)


# --- Fields ----------------------------------------------------------------------------------------------------------

_PREDICT_DOC = (
    "Tokens to generate at most. -1: until the model ends the text or the context is full. 0 only reads the prompt "
    "into the cache."
)
SAMPLING: Final = fields_of(SamplingParams, **DEFAULTS)
_BIAS = either(NUMBER, {"const": False})
_NO_CHAT = "Checked and ignored: it belongs to chat."
_ELSEWHERE = "Checked and ignored, as it changes no text."

_OWN_SAMPLING: Fields = {
    "logit_bias": field(
        either(
            array({"type": "array", "prefixItems": [either(INTEGER, STRING), _BIAS], "minItems": 2, "maxItems": 2}),
            {"type": "object", "additionalProperties": _BIAS},
        ),
        'Numbers that are added to the logits of tokens, as `[[token, bias], ...]` or `{"token": bias}`. `false` '
        "forbids a token. In place of a token, a text stands for all its tokens.",
        check=_biases,
        default_text="none",
    ),
    "json_schema": field(
        either(OBJECT, BOOLEAN),
        "JSON schema that the text obeys. `{}` means any object. Not together with `grammar`.",
        check=_schema,
        default_text="none",
    ),
    "seed": field(INTEGER, "Seed of the random draw. Only the lowest 32 bits count; -1 chooses a seed.", default=-1),
    "n_probs": field(
        {**INTEGER, "minimum": 0, "maximum": MAX_LOGPROBS},
        "Number of most probable tokens to report with every token.",
        check=_integer(0, MAX_LOGPROBS),
        default=0,
    ),
    "logprobs": field(
        {**INTEGER, "minimum": 0, "maximum": MAX_LOGPROBS},
        "Another name of `n_probs`, which comes first.",
        check=_integer(0, MAX_LOGPROBS),
        default_text="`n_probs`",
    ),
    "samplers": field(
        either(array(STRING), STRING),
        "The samplers to use, as names or as a text of letters. All others are switched off. Their order must be the "
        "one in which they run here. `infill` has no effect.",
        check=check_samplers,
        default_text="all",
    ),
}

MODEL: Final = field(
    STRING,
    "Name of the model. Another model than the one that is served is a 404.",
    check=check_model_name,
    default_text="any",
)

_OPTIONS: Fields = {
    "model": MODEL,
    "stream": field(
        BOOLEAN, "Send the text as it comes, as server-sent events. Otherwise it is one object.", default=False
    ),
    "n_predict": _bounded(-1, _PREDICT_DOC, default=-1),
    "max_completion_tokens": _bounded(
        -1, "Another name of `n_predict`, which comes first.", default_text="`n_predict`"
    ),
    "max_tokens": _bounded(-1, "Another name of `n_predict`, which comes first.", default_text="`n_predict`"),
    "n_cmpl": _bounded(1, "Completions of each prompt. They are an array, and differ in their seeds.", default=1),
    "n": _bounded(1, "Another name of `n_cmpl`, which comes first.", default_text="`n_cmpl`"),
    "stop": STOP,
    "cache_prompt": field(
        BOOLEAN,
        "Continue from the longest beginning of the prompt that a slot still holds, instead of decoding it again.",
        default=True,
    ),
    "id_slot": _bounded(-1, "Number of the slot to take if it is free. -1 takes any.", default=-1),
    "n_keep": _bounded(
        -1, "Checked and ignored: nothing is dropped from a full context.", default_text="ignored", ignored=True
    ),
    "n_indent": _bounded(
        0,
        "End the text before a line, after the first one, that begins with fewer spaces and tabs than this.",
        default=0,
    ),
    "t_max_predict_ms": _bounded(
        -1,
        "Milliseconds from the first token on, after which the text ends with the next newline. 0 and below is off.",
        2**53,
        default=-1,
    ),
    "lora": field(
        array({"type": "object", "properties": {"id": INTEGER, "scale": NUMBER}, "required": ["id"]}),
        'Adapters to apply, as `{"id": 0, "scale": 1}`. The ids are those of GET /lora-adapters. Adapters that are not '
        "in the list do not apply.",
        check=_lora,
        default_text="those loaded with the model",
    ),
    **fields_of(GenerateRequest, "priority", "deadline"),
    "return_tokens": field(BOOLEAN, "Report the tokens of the text.", default=False),
    "return_progress": field(BOOLEAN, "Report how much of the prompt is decoded. For streams.", default=False),
    "timings_per_token": field(BOOLEAN, "Report with every part of a stream how long it took.", default=False),
    "response_fields": field(
        array(STRING, maxItems=MAX_RESPONSE_FIELDS),
        "Fields that the answer has, or the last object of a stream. A path such as `timings/prompt_n` names a field "
        "of a field.",
        check=_response_fields,
        default_text="all",
    ),
    "sse_ping_interval": _bounded(
        -1,
        "-1 turns off the comments that a silent stream sends. Every other value is ignored: one is sent every 10 "
        "seconds.",
        default_text="10",
    ),
}

_IGNORED: Fields = {
    "n_discard": ignored({**INTEGER}, "Checked and ignored: nothing is dropped from a full context."),
    "n_cache_reuse": ignored(INTEGER, "Checked and ignored: only equal beginnings of prompts are reused."),
    "t_max_prompt_ms": ignored(INTEGER, "Checked and ignored, as in llama-server."),
    "backend_sampling": ignored(BOOLEAN, _ELSEWHERE),
    "verbose": ignored(BOOLEAN, _ELSEWHERE),
    "stream_options": field(OBJECT, _NO_CHAT, check=json_in.check_object, default_text="ignored", ignored=True),
    "echo": ignored(BOOLEAN, _NO_CHAT),
    "chat_format": field({}, _NO_CHAT, check=_any, default_text="ignored", ignored=True),
    "reasoning_format": ignored(STRING, _NO_CHAT),
    "parse_tool_calls": ignored(BOOLEAN, _NO_CHAT),
    "adaptive_decay": field(
        {**NUMBER, "minimum": 0, "maximum": 0.99},
        "Checked and ignored: it belongs to `adaptive_target`.",
        check=_decay,
        default_text="ignored",
        ignored=True,
    ),
}

_UNCOVERED: Fields = {
    "adaptive_target": _uncovered(
        NUMBER, json_in.check_number, lambda value: value < 0, "A sampler that does not exist here; below 0 it is off."
    ),
    "min_keep": _uncovered(
        INTEGER, _integer(0), lambda value: value <= 1, "Tokens that each sampler must leave; every one leaves 1."
    ),
    "grammar_lazy": _uncovered(
        BOOLEAN, json_in.check_boolean, lambda value: not value, "A grammar that begins later in the text."
    ),
    "grammar_triggers": _uncovered(array({}), _list, lambda value: not value, "Texts at which such a grammar begins."),
    "preserved_tokens": _uncovered(
        array({}), _list, lambda value: not value, "Special tokens that appear in the text."
    ),
    "reasoning_budget_tokens": _uncovered(
        INTEGER, _integer(-1), lambda value: value < 0, "Tokens that a model may think for; -1 is no bound."
    ),
    "image_data": _uncovered(
        array({}), _list, lambda value: not value, "Images of older servers: use `prompt_string` and `multimodal_data`."
    ),
}

COMPLETION_FIELDS: Fields = {
    **_OPTIONS,
    **{name: entry for name, entry in SAMPLING.items() if name not in _OWN_SAMPLING},
    **_OWN_SAMPLING,
    **_IGNORED,
    **_UNCOVERED,
}
"""All but the prompt."""

COMPLETION = Body(
    {
        "prompt": field(
            PROMPTS,
            "The text to continue: a string, a list of tokens, a list of strings and tokens, or an object with "
            "`prompt_string` and `multimodal_data`. A list of these is answered with an array.",
            check=_prompts,
            required=True,
        ),
        **COMPLETION_FIELDS,
    },
    {"prompt": "The capital of France is", "n_predict": 4, "temperature": 0},
)
