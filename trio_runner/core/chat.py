"""From a conversation to a prompt, with the chat template that stands in the model's file.

Templates differ in what they take: text or a list of parts, the arguments of a tool call as text or as an object. What
this one takes is found out by trying it on a few words, once; conversations are then put to it in its way.

A template's placeholders for images are not used: libmtmd puts the model's own tokens around an image itself. So a
template is given a word in the image's place, and its text is cut there afterwards. The word has a digest of all the
other texts in it, so none of them can have the word in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from trio_runner.core.template import BoundedTemplate, Refusal, TemplateError, TooLong
from trio_runner.errors import InvalidRequest, RequestError, Unsupported
from trio_runner.image_source import MAX_IMAGE_BYTES, ImageSource, is_image_source
from trio_runner.request import MAX_TEXT_BYTES, Part

MAX_MESSAGES: Final = 4096
MAX_VALUES: Final = 250_000
"""Texts, numbers, lists and objects in a conversation and what goes with it."""
MAX_DEPTH: Final = 64
"""Lists and objects inside each other."""
MAX_NUMBER_BITS: Final = 1024

_PROBE_WORK: Final = 1 << 22
_OWN_NAMES: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
"""What a template is given in any case."""


class Moment(Protocol):
    """What a template may ask for the time, such as a `datetime`."""

    def strftime(self, layout: str, /) -> str: ...


class ChatTemplate:
    """A model's chat template, compiled. May be used by several threads at once.

    `bos_token` and `eos_token` are the texts of those tokens. Raises `Unsupported` if it does not compile.
    """

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        try:
            self._template = BoundedTemplate(source)
        except TemplateError as error:
            raise Unsupported("chat", f"the model's chat template does not compile: {error}") from error
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._habits = self._find_habits()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        now: Moment | None = None,
        **variables: Any,
    ) -> tuple[Part, ...]:
        """The prompt: texts, none of them empty, and the images as they were given, in the order of the template.

        A message has a `role`, a `content` and whatever else the template knows of it, such as `tool_calls`. Its
        content is text, None, or a list of parts:

            {"type": "text", "text": ...}
            {"type": "image", "image": ImageSource}
            {"type": "image_url", "image_url": {"url": "data:image/...;base64,..."}}

        `now` is the time, which the template may write down. Without it some have a date of their own, and some fail.

        The text begins with BOS where the template has it: tokenise without adding another. Special tokens are to be
        read in it, and what somebody says is in it like the template's own words. So a message can hold `<|im_end|>`
        and speak for somebody else, here as in every peer; whoever has reason to care takes them out of it first.

        Raises `InvalidRequest`, which names `messages[i].field`, for a conversation that is none or that the template
        refuses, and `Unsupported` if the template fails with it.
        """
        intake = _Intake()
        said = intake.messages(messages)
        given = {
            "tools": intake.optional_list("tools", tools),
            "documents": intake.optional_list("documents", documents),
            "add_generation_prompt": bool(add_generation_prompt),
            **intake.variables(variables),
        }
        intake.digest.update(self._source.encode(errors="surrogatepass"))
        marker = _Marker(intake.digest.hexdigest())
        try:
            text = self._render([self._habits.apply(message, marker) for message in said], given, now)
        except RequestError:
            # Where somebody has said nothing, some templates want None and some an empty text.
            if all(message.content is not None for message in said):
                raise
            said = [replace(message, content="") if message.content is None else message for message in said]
            text = self._render([self._habits.apply(message, marker) for message in said], given, now)
        return marker.cut(text, said)

    def _render(
        self,
        messages: list[dict[str, Any]],
        given: Mapping[str, Any],
        now: Moment | None = None,
        **bounds: int,
    ) -> str:
        try:
            return self._template.render(
                {**self._tokens, "messages": messages, **given},
                max_characters=MAX_TEXT_BYTES,
                strftime_now=None if now is None else now.strftime,
                **bounds,
            )
        except Refusal as refusal:
            message = f"the model's chat template refuses messages: {refusal}"
            raise InvalidRequest(message, param="messages") from None
        except TooLong:
            message = f"messages make a prompt of more than {MAX_TEXT_BYTES} characters"
            raise InvalidRequest(message, param="messages") from None
        except TemplateError as error:
            message = f"the model's chat template fails with these messages: {error}"
            raise Unsupported("chat", message, param="messages") from error

    # What it takes.

    def _find_habits(self) -> _Habits:
        first, second = "firstneedle", "secondneedle"
        parts = self._try([{"role": "user", "content": [_text_part(first), _text_part(second)]}])
        takes_parts = 0 <= parts.find(first) < parts.find(second) and not _is_quoted(first, parts)
        takes_text = first in self._try([{"role": "user", "content": first}]) or not takes_parts

        arguments = {"needle": "found"}
        as_text = self._try_call(json.dumps(arguments))
        as_object = self._try_call(arguments)
        return _Habits(
            takes_parts=takes_parts,
            takes_text=takes_text,
            takes_json=json.dumps(arguments) in as_text,
            takes_objects="needle" in as_object and str(arguments) not in as_object,
        )

    def _try_call(self, arguments: str | dict[str, str]) -> str:
        """What it makes of a conversation with a call of a tool in it."""
        for content in (None, ""):  # beside a call, some want the one and some the other
            output = self._try(_tool_conversation(content, arguments))
            if "needle" in output:
                break
        return output

    def _try(self, messages: list[dict[str, Any]]) -> str:
        """What it makes of `messages`; nothing if it fails."""
        given = {"tools": [_TOOL], "documents": None, "add_generation_prompt": False}
        for tools in ({}, {"tools": None}):
            try:
                return self._render(messages, {**given, **tools}, _SomeDay(), max_work=_PROBE_WORK)
            except RequestError:
                continue
        return ""


class _SomeDay:
    def strftime(self, layout: str, /) -> str:
        return "2024-07-26"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _is_quoted(text: str, output: str) -> bool:
    """Whether `text` was written out as something in a list, not for somebody to read."""
    return f"'{text}'" in output or f'"{text}"' in output


_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "A key."}}},
    },
}


def _tool_conversation(content: str | None, arguments: str | dict[str, str]) -> list[dict[str, Any]]:
    function = {"name": "tool", "arguments": arguments}
    call = {"id": "call12345", "type": "function", "function": function}  # nine characters, which some insist on
    return [
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "name": "tool", "tool_call_id": "call12345", "content": "result"},
        {"role": "assistant", "content": "assistant"},
        {"role": "user", "content": "user"},
    ]


@dataclass(frozen=True, slots=True)
class _Image:
    """An image in a message, and where."""

    source: ImageSource
    place: str
    index: int


@dataclass(frozen=True, slots=True)
class _Message:
    role: str
    content: str | list[str | _Image] | None
    others: dict[str, Any]


class _Marker:
    """The words that stand for images."""

    def __init__(self, digest: str) -> None:
        # Small letters and digits only: templates strip, split and escape.
        self._word = f"image{digest}n"

    def word(self, image: _Image) -> str:
        return f"{self._word}{image.index}e"

    def cut(self, text: str, messages: Sequence[_Message]) -> tuple[Part, ...]:
        """`text` with the images of `messages` in it. Raises `Unsupported` if one of them is not there."""
        images = [part for message in messages for part in message.content or () if isinstance(part, _Image)]
        if not images:
            return (text,) if text else ()
        parts: list[Part] = []
        seen: set[int] = set()
        for position, piece in enumerate(re.split(f"{self._word}([0-9]+)e", text)):
            if position % 2:
                seen.add(int(piece))
                parts.append(images[int(piece)].source)
            elif piece:
                parts.append(piece)
        for image in images:
            if image.index not in seen:
                message = f"the model's chat template leaves out {image.place}"
                raise Unsupported("images", message, param=image.place)
        return tuple(parts)


@dataclass(frozen=True, slots=True)
class _Habits:
    """What a template takes."""

    takes_parts: bool
    """A list of typed parts for what a user says."""
    takes_text: bool
    takes_json: bool
    """The arguments of a tool call as text."""
    takes_objects: bool

    def apply(self, message: _Message, marker: _Marker) -> dict[str, Any]:
        """The message as this template takes it."""
        others = message.others
        if isinstance(others.get("tool_calls"), list):
            others = {**others, "tool_calls": [self._tool_call(call) for call in others["tool_calls"]]}
        return {"role": message.role, "content": self._content(message, marker), **others}

    def _content(self, message: _Message, marker: _Marker) -> Any:
        content = message.content
        if content is None:
            return None
        if isinstance(content, str):
            return content if self.takes_text else [_text_part(content)]
        if self.takes_parts and (message.role == "user" or not self.takes_text):
            return [_text_part(marker.word(part) if isinstance(part, _Image) else part) for part in content]
        # As llama-server does: a line for each text, and nothing around an image.
        pieces: list[str] = []
        for index, part in enumerate(content):
            if isinstance(part, _Image):
                pieces.append(marker.word(part))
            else:
                pieces += ["\n", part] if index and isinstance(content[index - 1], str) else [part]
        return "".join(pieces)

    def _tool_call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str) and self.takes_objects and not self.takes_json:
            try:
                value = json.loads(arguments)
            except (ValueError, RecursionError):
                return call
            if not isinstance(value, dict):
                return call
            arguments = value
        elif isinstance(arguments, dict) and self.takes_json and not self.takes_objects:
            arguments = json.dumps(arguments, ensure_ascii=False)
        else:
            return call
        return {**call, "function": {**call["function"], "arguments": arguments}}


class _Intake:
    """Checks what a caller gives, and copies it into plain values that nobody else holds.

    Each method raises `InvalidRequest` with the name that it was given.
    """

    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=16)
        """Of all texts."""
        self._n_bytes = 0
        self._n_values = 0
        self._n_images = 0

    def messages(self, messages: object) -> list[_Message]:
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
            raise InvalidRequest(f"messages must be a list, not {type(messages).__name__}", param="messages")
        if not messages:
            raise InvalidRequest("messages is empty", param="messages")
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequest(f"messages has {len(messages)}, but at most {MAX_MESSAGES} fit", param="messages")
        return [self._message(f"messages[{index}]", message) for index, message in enumerate(messages)]

    def optional_list(self, name: str, value: object) -> list[Any] | None:
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            raise InvalidRequest(f"{name} must be a list, not {type(value).__name__}", param=name)
        return self._plain(name, value) or None

    def variables(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        for name in variables:
            if name in _OWN_NAMES or name.startswith("_") or not name.isidentifier():
                raise InvalidRequest(f"{name} cannot be a variable of a chat template", param=name)
        return {self._text(name, name): self._plain(name, value) for name, value in variables.items()}

    def _message(self, name: str, message: object) -> _Message:
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"{name} must be an object, not {type(message).__name__}", param=name)
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise InvalidRequest(f"{name}.role must be a text that is not empty", param=f"{name}.role")
        role = self._text(f"{name}.role", role)
        content = self._content(f"{name}.content", message.get("content"))
        others = {
            self._key(name, key): self._plain(f"{name}.{key}", value)
            for key, value in message.items()
            if key not in ("role", "content")
        }
        return _Message(role, content, others)

    def _content(self, name: str, content: object) -> str | list[str | _Image] | None:
        if content is None or isinstance(content, str):
            return None if content is None else self._text(name, content)
        if not isinstance(content, (list, tuple)):
            raise InvalidRequest(f"{name} must be a text or a list, not {type(content).__name__}", param=name)
        self._count(name, len(content))
        return [self._part(f"{name}[{index}]", part) for index, part in enumerate(content)]

    def _part(self, name: str, part: object) -> str | _Image:
        if not isinstance(part, Mapping):
            raise InvalidRequest(f"{name} must be an object, not {type(part).__name__}", param=name)
        match part.get("type"):
            case "text":
                text = part.get("text")
                if not isinstance(text, str):
                    message = f"{name}.text must be a text, not {type(text).__name__}"
                    raise InvalidRequest(message, param=f"{name}.text")
                return self._text(f"{name}.text", text)
            case "image":
                source = part.get("image")
                if not is_image_source(source):
                    message = f"{name}.image must be bytes, a path or a PIL image, not {type(source).__name__}"
                    raise InvalidRequest(message, param=f"{name}.image")
                return self._image(f"{name}.image", source)
            case "image_url":
                return self._image(f"{name}.image_url", _from_url(f"{name}.image_url", part.get("image_url")))
            case _:
                message = f'{name}.type must be "text", "image" or "image_url"'
                raise InvalidRequest(message, param=f"{name}.type")

    def _image(self, place: str, source: Any) -> _Image:
        image = _Image(source, place, self._n_images)
        self._n_images += 1
        return image

    def _text(self, name: str, text: str) -> str:
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            message = f"{name} contains half of a surrogate pair, which is no character"
            raise InvalidRequest(message, param=name) from None
        self._n_bytes += len(encoded)
        if self._n_bytes > MAX_TEXT_BYTES:
            raise InvalidRequest(f"{name}: there are more than {MAX_TEXT_BYTES} bytes of text", param=name)
        self.digest.update(len(encoded).to_bytes(4, "little") + encoded)
        return str.__str__(text)

    def _count(self, name: str, n_values: int) -> None:
        self._n_values += n_values
        if self._n_values > MAX_VALUES:
            raise InvalidRequest(f"{name}: there are more than {MAX_VALUES} values", param=name)

    def _plain(self, name: str, value: object, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"{name} is nested too deeply", param=name)
        match value:
            case None | bool():
                return value
            case str():
                return self._text(name, value)
            case int():
                if value.bit_length() > MAX_NUMBER_BITS:
                    raise InvalidRequest(f"{name} has a number that is too large", param=name)
                return int(value)
            case float():
                return float(value)
            case list() | tuple():
                self._count(name, len(value))
                return [self._plain(name, each, depth + 1) for each in value]
            case Mapping():
                self._count(name, len(value))
                return {self._key(name, key): self._plain(name, each, depth + 1) for key, each in value.items()}
        message = f"{name} must be made of texts, numbers, lists and objects, not {type(value).__name__}"
        raise InvalidRequest(message, param=name)

    def _key(self, name: str, key: object) -> str:
        if not isinstance(key, str):
            raise InvalidRequest(f"{name} has a key that is no text", param=name)
        return self._text(name, key)


def _from_url(name: str, value: object) -> bytes:
    url = value.get("url") if isinstance(value, Mapping) else None
    if not isinstance(url, str):
        raise InvalidRequest(f"{name}.url must be a text", param=f"{name}.url")
    kind, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:image/[^,]*;base64", kind, re.IGNORECASE):
        message = f'{name}.url must be "data:image/...;base64,...": nothing is fetched'
        raise InvalidRequest(message, param=f"{name}.url")
    if len(data) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        message = f"{name}.url is an image of more than {MAX_IMAGE_BYTES} bytes, encoded"
        raise InvalidRequest(message, param=f"{name}.url")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise InvalidRequest(f"{name}.url is not valid base64", param=f"{name}.url") from None
