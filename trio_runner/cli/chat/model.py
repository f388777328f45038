"""What a conversation needs of a model, wherever the model runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from trio_runner.cli.chat.conversation import Message


class ChatError(Exception):
    """An exchange failed, or a command did. The message is one line for the user."""


class ConversationTooLong(ChatError):
    """The conversation does not fit into the model's context."""


@dataclass(frozen=True, slots=True)
class Said:
    """More text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """More text of what the model thinks before it answers. It is shown, but is no part of the conversation."""

    text: str


@dataclass(frozen=True, slots=True)
class Reading:
    """The model has read `n_read` of the conversation's `n_tokens` tokens."""

    n_read: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is complete. `notice` is a line for the user, if there is something to know about its end."""

    notice: str = ""
    share: float = 0.0
    """How much of the context the conversation takes with this answer, from 0 to 1; 0 if that is not known."""


AnswerEvent: TypeAlias = Said | Thought | Reading | Ended


class ChatModel(Protocol):
    """Answers conversations."""

    async def find_name(self) -> str:
        """What the model is called. Raises `ChatError` if that cannot be found out now."""

    def answer(self, messages: Sequence[Message]) -> AbstractAsyncContextManager[AsyncIterator[AnswerEvent]]:
        """The answer to a conversation, as it is made. Leaving the block stops it at once.

        Entering and iterating raise `ChatError`. The last event is `Ended`.
        """
