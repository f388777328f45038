"""The body of POST /v1/completions. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from trio_runner.errors import InvalidRequest, Unsupported
from trio_runner.request import Infill, Prompt
from trio_runner.sampling import MAX_LOGPROBS
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import BOOLEAN, INTEGER, STRING, Body, array, either, field
from trio_runner.server.dialects.json_in import wrong
from trio_runner.server.dialects.openai.requests import (
    EXTRAS,
    GENERATION,
    HARMLESS,
    MAX_CHOICES,
    MAX_GENERATIONS,
    Asked,
    bounded_integer,
    check_items,
    generations,
)

Texts = tuple[str | tuple[int, ...], ...]
"""Prompts: texts or lists of tokens."""


def _prompts(name: str, value: Any) -> Texts:
    if isinstance(value, str):
        return (json_in.check_text(name, value),)
    if not isinstance(value, list):
        wrong(name, "a string, a list of strings, a list of tokens or a list of such lists", value)
    if not value:
        raise InvalidRequest(f"{name} is empty", param=name)
    if isinstance(value[0], (int, float)):
        return (json_in.check_tokens(name, value),)
    return check_items(name, value, "prompts", _prompt)


def _prompt(place: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return json_in.check_text(place, value)
    if not isinstance(value, list):
        wrong(place, "a string or a list of tokens", value)
    if not value:
        raise InvalidRequest(f"{place} is empty", param=place)
    return json_in.check_tokens(place, value)


TEXT: Final = Body(
    {
        "prompt": field(
            either(STRING, array(STRING), array(INTEGER), array(array(INTEGER))),
            "The text to continue, or its tokens, or several of either. `[img-N]` has no meaning here.",
            check=_prompts,
            required=True,
        ),
        "suffix": field(
            STRING,
            "The text that comes after the answer: the model fills in the middle, with its own tokens for that.",
            default="",
        ),
        **GENERATION,
        "echo": field(
            BOOLEAN,
            "Begin each answer with its prompt. With `logprobs` too, the tokens of the prompt have theirs, and the "
            "answer cannot be streamed.",
            default=False,
        ),
        "logprobs": bounded_integer(
            0,
            MAX_LOGPROBS,
            "Report the log-probability of every token, and this many of the most probable alternatives.",
        ),
        "best_of": bounded_integer(
            1, MAX_CHOICES, "Only 1, or the same as `n`: no answers are written that are not returned.", default=1
        ),
        **EXTRAS,
        **HARMLESS,
    },
    {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0},
)


def text(body: bytes) -> Asked:
    """What the body of POST /v1/completions asks for."""
    given = TEXT.read(body)
    n, prompts, logprobs = given.get("n", 1), given["prompt"], given.get("logprobs", -1)
    if len(prompts) * n > MAX_GENERATIONS:
        message = f"prompt has {len(prompts)} prompts for {n} answers each, but at most {MAX_GENERATIONS} are allowed"
        raise InvalidRequest(message, param="prompt")
    if given.get("best_of", 1) not in (1, n):
        message = f"best_of must be 1 or the same as n, which is {n}: no answers are written that are not returned"
        raise Unsupported("best_of", message, param="best_of")
    requests = generations(given, _for_engine(given, prompts), logprobs=logprobs)
    if given.get("echo") and logprobs >= 0:
        for name in ("stream", "suffix"):
            if given.get(name):
                raise Unsupported("echo", f"echo with logprobs cannot be combined with {name}", param="echo")
        # The choices of one prompt would all be told the same.
        requests = tuple(
            replace(request, prompt_logprobs=-1 if index % n else logprobs) for index, request in enumerate(requests)
        )
    return Asked(
        generations=requests,
        n=n,
        n_top=logprobs,
        model=given.get("model"),
        stream=given.get("stream", False),
        include_usage=given.get("stream_options", False),
        echoes=prompts if given.get("echo") else (),
    )


def _for_engine(given: Mapping[str, Any], prompts: Texts) -> tuple[Prompt, ...]:
    suffix = given.get("suffix", "")
    if not suffix:
        return tuple(map(_without_tags, prompts))
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InvalidRequest("suffix needs a prompt of text, not of tokens", param="suffix")
    return tuple(Infill(prefix=str(prompt), suffix=suffix) for prompt in prompts)


def _without_tags(prompt: str | tuple[int, ...]) -> Prompt:
    """A prompt in which `[img-N]` is text: in the list form of prompts, only values are images."""
    return (prompt,) if isinstance(prompt, str) and "[img-" in prompt else prompt
