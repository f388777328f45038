"""A conversation that a caller gives, checked and copied into plain values."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trio_runner.errors import InvalidRequest
from trio_runner.image_source import MAX_IMAGE_BYTES, ImageSource, is_image_source
from trio_runner.request import MAX_TEXT_BYTES

MAX_MESSAGES: Final = 4096
MAX_VALUES: Final = 250_000
"""Entries of all lists and objects in a conversation and its variables."""
MAX_DEPTH: Final = 64
"""Lists and objects inside each other."""
MAX_NUMBER_BITS: Final = 1024
"""Bits of an integer."""

RESERVED_NAMES: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
"""Variables that every template gets, so that a caller cannot define them."""


@dataclass(frozen=True, slots=True)
class MessageImage:
    """An image in a message."""

    source: ImageSource
    place: str
    """The name of its field, such as `messages[0].content[1].image`."""
    index: int
    """Its number among all images of the conversation, from 0."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message, made of values that nobody else holds."""

    role: str
    content: str | list[str | MessageImage] | None
    """Text, a list of texts and images, or None if nothing is said."""
    others: dict[str, Any]
    """All other fields, which are plain values."""


class ConversationChecker:
    """Checks the parts of one conversation, and copies them into plain values that nobody else holds.

    The bounds hold for all parts together. Each method raises `InvalidRequest` with the name of the bad field.
    """

    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=16)
        """A digest of all texts so far."""
        self._n_bytes = 0
        self._n_values = 0
        self._n_images = 0

    def messages(self, messages: object) -> list[Message]:
        """The messages of a conversation."""
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
            raise InvalidRequest(f"messages must be a list, not {type(messages).__name__}", param="messages")
        if not messages:
            raise InvalidRequest("messages is empty", param="messages")
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequest(f"messages has {len(messages)}, but at most {MAX_MESSAGES} fit", param="messages")
        return [self._message(f"messages[{index}]", message) for index, message in enumerate(messages)]

    def optional_list(self, name: str, value: object) -> list[Any] | None:
        """The list `name`. An empty list becomes None."""
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            raise InvalidRequest(f"{name} must be a list, not {type(value).__name__}", param=name)
        return self._plain(name, value) or None

    def variables(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Further variables of a template, by name."""
        for name in variables:
            if name in RESERVED_NAMES or name.startswith("_") or not name.isidentifier():
                raise InvalidRequest(f"{name} cannot be a variable of a chat template", param=name)
        return {self._text(name, name): self._plain(name, value) for name, value in variables.items()}

    def _message(self, name: str, message: object) -> Message:
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
        return Message(role, content, others)

    def _content(self, name: str, content: object) -> str | list[str | MessageImage] | None:
        if content is None or isinstance(content, str):
            return None if content is None else self._text(name, content)
        if not isinstance(content, (list, tuple)):
            raise InvalidRequest(f"{name} must be a text or a list, not {type(content).__name__}", param=name)
        self._count(name, len(content))
        return [self._part(f"{name}[{index}]", part) for index, part in enumerate(content)]

    def _part(self, name: str, part: object) -> str | MessageImage:
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

    def _image(self, place: str, source: Any) -> MessageImage:
        image = MessageImage(source, place, self._n_images)
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
        """A copy of `value` that is made of None, bool, int, float, str, list and dict."""
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
            raise InvalidRequest(f"{name} has a key that is not a text", param=name)
        return self._text(name, key)


def _from_url(name: str, value: object) -> bytes:
    """The bytes in a data URL."""
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
