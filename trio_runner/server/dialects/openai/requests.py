"""What requests of OpenAI's dialect have in common: bytes of a body -> request values. Pure.

The fields are those of https://platform.openai.com/docs/api-reference, and ours. Every function raises `RequestError`,
which names the field at fault by its path, such as `messages[2].content[0].image_url.url`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from trio_runner.errors import InvalidRequest
from trio_runner.request import GenerateRequest, Prompt
from trio_runner.sampling import MAX_LOGPROBS, RANDOM_SEED, SamplingParams
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import (
    ADAPTERS,
    BOOLEAN,
    INTEGER,
    OBJECT,
    STOP,
    STRING,
    Field,
    Fields,
    Schema,
    check_model_name,
    either,
    field,
    fields_of,
    ignored,
)
from trio_runner.server.dialects.json_in import Check, check_object, fold, integer_between, wrong

MAX_CHOICES: Final = 16
"""Answers to one prompt."""
MAX_GENERATIONS: Final = 128
"""Answers to all prompts of one request."""

DEFAULTS: Final[Mapping[str, Any]] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repeat_penalty": 1.0}
"""Sampling parameters whose defaults are OpenAI's: the probabilities are those of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a client asks for: generations, and how their answer is written."""

    generations: tuple[GenerateRequest, ...]
    """One for each choice. Choice i of prompt p has the index p * n + i."""
    n: int = 1
    """Choices of each prompt."""
    model: str | None = None
    stream: bool = False
    n_top: int = -1
    """Alternatives that are reported with each token. Below 0, nothing is reported."""
    include_usage: bool = False
    """The stream ends with a chunk that tells the usage."""
    places: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Where in the body a parameter of the engine was given, if its name is another one there."""
    echoes: tuple[str | tuple[int, ...], ...] = ()
    """The text or the tokens of each prompt, if answers begin with them."""


# --- Checks ----------------------------------------------------------------------------------------------------------


def check_items(name: str, value: Any, what: str, check: Check) -> tuple[Any, ...]:
    """A list whose items pass `check`, which is told the place of each; `what` names them in the plural."""
    if not isinstance(value, list):
        wrong(name, f"a list of {what}", value)
    return tuple(check(f"{name}[{index}]", item) for index, item in enumerate(value))


def check_word(name: str, value: Any, *words: str) -> str:
    """One of a few words."""
    text = json_in.check_text(name, value)
    if text not in words:
        shown = ", ".join(f'"{word}"' for word in words)
        raise InvalidRequest(f"{name} must be one of {shown}", param=name)
    return text


def schema_text(name: str, value: Any) -> str:
    """The JSON text of a schema that is given as an object. Its names and nulls are data, and stay as they are."""
    if isinstance(value, str):
        return json_in.check_text(name, value)
    try:
        text = json.dumps(check_object(name, value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise InvalidRequest(f"{name} is nested too deeply", param=name) from None
    except ValueError:
        raise InvalidRequest(f"{name} has a number that is too large", param=name) from None
    return json_in.check_text(name, text)


def bounded_integer(low: int, high: int, doc: str, **more: Any) -> Field:
    """A field for an integer from `low` to `high`."""
    return field({**INTEGER, "minimum": low, "maximum": high}, doc, check=integer_between(low, high), **more)


def _token_limit(name: str, value: Any) -> int:
    limit = json_in.check_integer(name, value)
    if limit < -1:
        raise InvalidRequest(f"{name} must be 0 or more, or -1 for no limit, not {limit}", param=name)
    return min(limit, 2**31 - 1)


def _stream_options(name: str, value: Any) -> bool:
    """Whether the usage is wanted."""
    given = fold(check_object(name, value))
    for option in ("include_usage", "include_obfuscation"):
        json_in.check_boolean(f"{name}.{option}", given.get(option, False))
    return bool(given.get("include_usage"))


# --- Fields ----------------------------------------------------------------------------------------------------------

_SAMPLING: Final = {
    name: entry for name, entry in fields_of(SamplingParams, **DEFAULTS).items() if name not in ("seed", "logprobs")
}
_TOKEN_LIMIT: Final[Schema] = {**INTEGER, "minimum": -1}

GENERATION: Final[Fields] = {
    "model": field(
        STRING, "The name of the model. A name that is not the served model's is a 404.", check=check_model_name
    ),
    "stream": field(BOOLEAN, "Send the text as it comes, as server-sent events.", default=False),
    "stream_options": field(
        {"type": "object", "properties": {"include_usage": BOOLEAN, "include_obfuscation": BOOLEAN}},
        'With `{"include_usage": true}`, a stream ends with a chunk that tells the usage. Nothing is obfuscated.',
        check=_stream_options,
    ),
    "n": bounded_integer(
        1,
        MAX_CHOICES,
        "How many answers to write for each prompt. They share the prompt, which is decoded once. Each takes a place "
        "in the queue, and a slot while it runs.",
        default=1,
    ),
    "max_tokens": field(
        _TOKEN_LIMIT,
        "Tokens to generate at most. 0 only decodes the prompt, so that later requests find it in the prompt cache. "
        "Without it, or with -1, the text goes on until the model ends it or the context is full.",
        check=_token_limit,
    ),
    "stop": STOP,
    "seed": field(
        INTEGER,
        "Seed of the random draw; choice i has this seed plus i. Only the lowest 32 bits count; -1 chooses a seed.",
        default=-1,
    ),
    **_SAMPLING,
    "json_schema": field(
        either(OBJECT, STRING),
        _SAMPLING["json_schema"].doc,
        check=schema_text,
        default_text="none",
    ),
}
"""The fields of both kinds of generations."""

EXTRAS: Final[Fields] = {
    "cache_prompt": field(
        BOOLEAN, "Continue from the longest beginning of the prompt that a slot still holds.", default=True
    ),
    **fields_of(
        GenerateRequest,
        *("n_keep", "shift", "truncate", "priority", "deadline", "decode_seconds", "preferred_slot"),
        shift=False,
    ),
    "adapters": ADAPTERS,
}
"""Our own fields."""

_NOT_NEEDED = "Accepted and ignored: it means nothing on a server of your own."
HARMLESS: Final[Fields] = {
    "user": ignored(STRING, _NOT_NEEDED),
    "safety_identifier": ignored(STRING, _NOT_NEEDED),
    "service_tier": ignored(STRING, _NOT_NEEDED),
    "prompt_cache_key": ignored(STRING, "Accepted and ignored: the prompt cache finds equal beginnings by itself."),
    "prompt_cache_retention": ignored(STRING, "Accepted and ignored: what a slot holds stays until it is needed."),
    "metadata": field(
        OBJECT, "Accepted and ignored: nothing is stored.", check=check_object, default_text="ignored", ignored=True
    ),
    "store": ignored(BOOLEAN, "Accepted and ignored: nothing is stored."),
}
"""Fields that every server may ignore."""

LOGPROBS_SCHEMA: Final[Schema] = {**INTEGER, "minimum": 0, "maximum": MAX_LOGPROBS}


# --- Requests --------------------------------------------------------------------------------------------------------


def generations(
    given: Mapping[str, Any], prompts: tuple[Prompt, ...], *, logprobs: int, **sampling: Any
) -> tuple[GenerateRequest, ...]:
    """`n` requests for each of `prompts`, in the order of their choices. `sampling` overrules what is given."""
    n = given.get("n", 1)
    limit = given.get("max_completion_tokens", given.get("max_tokens", -1))
    params = {name: given[name] for name in _SAMPLING if name in given} | {"logprobs": logprobs} | sampling
    return tuple(
        GenerateRequest(
            prompt=prompt,
            max_tokens=None if limit < 0 else limit,
            stop=given.get("stop", ()),
            sampling=SamplingParams(**{**DEFAULTS, **params, "seed": _seed(given.get("seed", -1), choice)}),
            **_extras(given, n),
        )
        for prompt in prompts
        for choice in range(n)
    )


def _extras(given: Mapping[str, Any], n: int) -> dict[str, Any]:
    own = {name: given[name] for name in EXTRAS if name in given}
    return {"shift": False, "truncate": False, "share_prompt": n > 1, **own}


def _seed(seed: int, choice: int) -> int:
    """The seed of a choice. A seed that is given never becomes the one that means "choose one"."""
    lowest = seed & RANDOM_SEED
    return lowest if lowest == RANDOM_SEED else (lowest + choice) % RANDOM_SEED
