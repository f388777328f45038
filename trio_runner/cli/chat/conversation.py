"""The messages of a conversation, in the form that OpenAI's clients send and chat templates take."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""`role` and `content`: text, or a list of parts `{"type": "text", ...}` and `{"type": "image_url", ...}`."""

_IMAGE_CHARACTERS: Final = 4000
"""Characters that take about as much of a context as an image."""

ROLES: Final = ("system", "developer", "user", "assistant", "tool")


class BadConversation(Exception):
    """A file is no conversation. The message is one line that names the field."""


class Conversation:
    """What was said so far, and what was prepared for the next message.

    An exchange is `ask` or `retry`, then either `answer` or `withdraw`.
    """

    def __init__(self, system: str = "") -> None:
        self._messages: list[Message] = []
        self._images: list[str] = []
        self._withdrawn: Message | None = None
        self._replaced: Message | None = None
        self._n_forgotten = 0
        self.system = system

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages, the oldest first. The system message, if there is one, is the first."""
        return tuple(self._messages)

    @property
    def sent(self) -> tuple[Message, ...]:
        """The messages that the model gets: without those that were forgotten."""
        n_system = self._n_system
        return (*self._messages[:n_system], *self._messages[n_system + self._n_forgotten :])

    @property
    def n_images(self) -> int:
        """Images that go with the next message."""
        return len(self._images)

    @property
    def system(self) -> str:
        """The text of the system message; "" if there is none."""
        first = self._messages[0] if self._messages else {}
        content = first.get("content") if first.get("role") == "system" else ""
        return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)

    @system.setter
    def system(self, text: str) -> None:
        del self._messages[: self._n_system]
        if text:
            self._messages.insert(0, {"role": "system", "content": text})

    @property
    def _n_system(self) -> int:
        return int(bool(self._messages) and self._messages[0].get("role") == "system")

    def attach(self, data_url: str) -> None:
        """Let an image go with the next message."""
        self._images.append(data_url)

    def ask(self, text: str) -> None:
        """Begin an exchange with a message of the user."""
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in self._images]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        self._images = []
        self._withdrawn = self._replaced = None
        self._messages.append({"role": "user", "content": content})

    def retry(self) -> bool:
        """Begin an exchange with the last message of the user once more. False if there is none."""
        if self._withdrawn is not None:
            self._messages.append(self._withdrawn)
            self._withdrawn = None
            return True
        said = self._messages[self._n_system :]
        if said and said[-1]["role"] == "assistant":
            if len(said) == 1:
                return False
            self._replaced = self._messages.pop()
        return bool(said)

    def answer(self, text: str) -> None:
        """End an exchange with what the model said, which may be a part of an answer."""
        self._replaced = None
        self._messages.append({"role": "assistant", "content": text})

    def withdraw(self) -> None:
        """End an exchange that has no answer: as if it had not begun. `retry` begins it again.

        A message without an answer is not kept, because many chat templates refuse two messages of the user in a row.
        """
        if self._replaced is not None:
            self._messages.append(self._replaced)
            self._replaced = None
        elif self._messages and self._messages[-1]["role"] == "user":
            self._withdrawn = self._messages.pop()

    def forget_oldest(self) -> int:
        """No longer send the oldest messages, about half of what is sent. Returns how many they are.

        The system message stays, and so does the last message of the user. Half is a lot, but then the beginning of the
        prompt stays the same for many exchanges, and the prompt cache has it.
        """
        said = self._messages[self._n_system + self._n_forgotten :]
        users = [index for index, message in enumerate(said) if message["role"] == "user"]
        sizes = [_size(message) for message in said]
        n_forgotten = next((at for at in users if 2 * sum(sizes[at:]) <= sum(sizes)), users[-1] if users else 0)
        self._n_forgotten += n_forgotten
        return n_forgotten

    def clear(self) -> None:
        """Drop everything except the system message."""
        self.restore(self._messages[: self._n_system])

    def restore(self, messages: Sequence[Message]) -> None:
        """Go on after these messages, instead of those that there are."""
        self._messages = list(messages)
        self._images, self._withdrawn, self._replaced, self._n_forgotten = [], None, None, 0


def _size(message: Message) -> int:
    """About how much of a context a message takes, in characters."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return len(content)
    return sum(len(part["text"]) if isinstance(part.get("text"), str) else _IMAGE_CHARACTERS for part in content)


def image_url(data: bytes, kind: str) -> str:
    """A data URL with the bytes of an image file. `kind` is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def to_json(messages: Sequence[Message]) -> str:
    """A conversation for a file: a JSON array of its messages."""
    return json.dumps(list(messages), ensure_ascii=False, indent=2) + "\n"


def from_json(text: str) -> list[Message]:
    """The messages in a file: an array, or an object that has them as `messages`, as bodies of requests do.

    Raises `BadConversation`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadConversation(f"it is not JSON: {error}") from error
    if isinstance(value, dict):
        value = value.get("messages")
    if not isinstance(value, list):
        raise BadConversation("it is no list of messages")
    for index, message in enumerate(value):
        _check_message(f"messages[{index}]", message)
    return value


def _check_message(name: str, message: object) -> None:
    if not isinstance(message, dict):
        raise BadConversation(f"{name} must be an object")
    if message.get("role") not in ROLES:
        raise BadConversation(f"{name}.role must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise BadConversation(f"{name}.content[{index}] must be an object with a type")
    elif not isinstance(content, str | None):
        raise BadConversation(f"{name}.content must be text or a list of parts")
