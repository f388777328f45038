"""A conversation with a model in this process."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from trio_runner.cli.chat.conversation import Message
from trio_runner.cli.chat.model import AnswerEvent, ChatError, ConversationTooLong, Ended, Reading, Said
from trio_runner.errors import EngineBroken, PromptTooLong, RunnerError
from trio_runner.events import Finished, PromptProgress, TextPiece
from trio_runner.interface import EngineInterface, GenerationInterface
from trio_runner.request import Chat, GenerateRequest

logger = logging.getLogger(__name__)


class LocalModel:
    """Answers with an engine. The whole conversation is sent each time, and the prompt cache has nearly all of it.

    `request` says how to generate; its prompt is not used.
    """

    def __init__(self, engine: EngineInterface, request: GenerateRequest, name: str) -> None:
        self._engine = engine
        self._request = dataclasses.replace(request, progress=True)
        self._name = name

    async def find_name(self) -> str:
        return self._name

    @asynccontextmanager
    async def answer(self, messages: Sequence[Message]) -> AsyncIterator[AsyncIterator[AnswerEvent]]:
        with _chat_errors():
            request = dataclasses.replace(self._request, prompt=Chat(messages=tuple(messages)))
            async with self._engine.generate(request) as generation:
                yield _Answer(generation, request, n_ctx=self._engine.capabilities.n_ctx)


class _Answer:
    """The events of a generation, in the words of a conversation."""

    def __init__(self, generation: GenerationInterface, request: GenerateRequest, *, n_ctx: int) -> None:
        self._generation = generation
        self._request = request
        self._n_ctx = n_ctx

    def __aiter__(self) -> _Answer:
        return self

    async def __anext__(self) -> AnswerEvent:
        match await anext(self._generation):
            case TextPiece(text):
                return Said(text)
            case PromptProgress(n_decoded, n_prompt):
                return Reading(n_decoded, n_prompt)
            case Finished() as finished:
                logger.info("%s", finished.usage)
                n_tokens = finished.usage.prompt_tokens + finished.usage.completion_tokens
                return Ended(self._notice(finished), share=n_tokens / self._n_ctx)

    def _notice(self, finished: Finished) -> str:
        if finished.reason != "length":
            return ""
        if finished.usage.completion_tokens == self._request.max_tokens:
            return f"The answer was cut after {self._request.max_tokens} tokens (--max-tokens)."
        return "The answer was cut, because the context is full."


@contextmanager
def _chat_errors() -> Iterator[None]:
    """Turn errors of a request into `ChatError`. `EngineBroken` ends the program, so it stays as it is."""
    try:
        yield
    except EngineBroken:
        raise
    except PromptTooLong as error:
        message = f"the conversation has {error.n_prompt} tokens, but at most {error.n_ctx} fit (--context-length)"
        raise ConversationTooLong(message) from error
    except RunnerError as error:
        raise ChatError(str(error)) from error
