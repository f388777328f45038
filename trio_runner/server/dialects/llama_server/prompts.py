"""The prompts of llama-server's dialect: JSON -> prompts. Pure.

One prompt is a text, a list of tokens, a list of texts and tokens, or an object with a text and the images for it. A
list without a number in it is a list of prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from trio_runner.errors import InvalidRequest
from trio_runner.request import MAX_IMAGES, Infill, Part
from trio_runner.server.dialects import json_in
from trio_runner.server.dialects.fields import INTEGER, STRING, Schema, array, either
from trio_runner.server.dialects.json_in import Object, fold, wrong

MARKER: Final = "<__media__>"
"""Stands for an image in a text. GET /props tells it to clients."""

MAX_TEXTS: Final = 256
"""Texts among the tokens of one prompt or of `logit_bias`. Each is tokenised by itself, in a millisecond at least."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """Texts and tokens of one prompt. Special tokens go before the first part, if that is a text."""

    parts: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Pictured:
    """A text with markers and the images that they stand for, as the parts of a prompt."""

    text: str
    parts: tuple[Part, ...]


PromptForm: TypeAlias = str | tuple[int, ...] | Mixed | Pictured
GivenPrompt: TypeAlias = PromptForm | Infill

TEXT_OR_TOKENS: Final = either(STRING, array(either(STRING, INTEGER)))
"""The schema of a text, or of a list of texts and tokens."""
_OBJECT: Final[Schema] = {
    "type": "object",
    "properties": {"prompt_string": STRING, "multimodal_data": array(STRING, maxItems=MAX_IMAGES)},
    "required": ["prompt_string"],
}
_ONE: Final = either(STRING, array(either(STRING, INTEGER)), _OBJECT)
PROMPTS: Final = either(STRING, array(either(INTEGER, _ONE)), _OBJECT)
"""The schema of what `check_prompts` lets through."""

_WANTED = "a text, a list of tokens and texts, or an object with a prompt_string"


def check_prompts(name: str, value: Any, max_prompts: int) -> tuple[PromptForm, ...]:
    """The prompts in `value`, at most `max_prompts`."""
    if isinstance(value, list) and not any(type(item) in (int, float) for item in value):
        if not value:
            raise InvalidRequest(f"{name} must not be an empty list", param=name)
        if len(value) > max_prompts:
            raise InvalidRequest(f"{name} has {len(value)} prompts, but at most {max_prompts} are allowed", param=name)
        return tuple(check_prompt(f"{name}[{index}]", item) for index, item in enumerate(value))
    return (check_prompt(name, value),)


def check_prompt(name: str, value: Any) -> PromptForm:
    """One prompt."""
    if isinstance(value, Object):
        return _check_object(name, value)
    if not isinstance(value, (str, list)):
        wrong(name, _WANTED, value)
    return check_text_or_tokens(name, value)


def check_text_or_tokens(name: str, value: Any) -> str | tuple[int, ...] | Mixed:
    """A text, or a list of texts and tokens."""
    if isinstance(value, str):
        return json_in.check_text(name, value)
    if not isinstance(value, list):
        wrong(name, "a string or a list of strings and integers", value)
    if not any(isinstance(part, str) for part in value):
        return json_in.check_tokens(name, value)
    n_texts = sum(isinstance(part, str) for part in value)
    if n_texts > MAX_TEXTS:
        raise InvalidRequest(f"{name} has {n_texts} texts, but at most {MAX_TEXTS} are allowed", param=name)
    parts: list[str | int] = []
    for part in value:
        parts += [json_in.check_text(name, part)] if isinstance(part, str) else json_in.check_tokens(name, [part])
    return Mixed(tuple(parts))


def _check_object(name: str, value: Object) -> str | Pictured:
    given = fold(value)
    if "prompt_string" not in given:
        raise InvalidRequest(f"{name}.prompt_string is missing", param=f"{name}.prompt_string")
    text = json_in.check_text(f"{name}.prompt_string", given["prompt_string"])
    if "multimodal_data" not in given:
        return text
    images = _check_images(f"{name}.multimodal_data", given["multimodal_data"])
    pieces = text.split(MARKER)
    if len(pieces) - 1 != len(images):
        raise InvalidRequest(
            f"{name}.multimodal_data has {len(images)} images, but {name}.prompt_string has {len(pieces) - 1} times "
            f"the marker {MARKER}",
            param=f"{name}.multimodal_data",
        )
    parts: list[Part] = [pieces[0]]
    for image, piece in zip(images, pieces[1:], strict=True):
        parts += [image, piece]
    return Pictured(text, tuple(part for part in parts if part != ""))


def _check_images(name: str, value: Any) -> list[bytes]:
    if not isinstance(value, list):
        wrong(name, "a list of strings", value)
    if len(value) > MAX_IMAGES:
        raise InvalidRequest(f"{name} has {len(value)} images, but at most {MAX_IMAGES} are allowed", param=name)
    return [json_in.image_file(f"{name}[{index}]", item) for index, item in enumerate(value)]
