"""What each path of OpenAI's API does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Final

from quart import Response

from trio_runner.errors import RunnerError
from trio_runner.info import Capabilities, ModelInfo
from trio_runner.server.choices import Choices, check_room
from trio_runner.server.dialects.dialect import Operation, RouteContext, json_response, response
from trio_runner.server.dialects.openai import (
    requests_chat,
    requests_embeddings,
    requests_text,
    responses,
    responses_stream,
)
from trio_runner.server.dialects.openai.requests import Asked
from trio_runner.server.dialects.openai.responses import Gathered, Head
from trio_runner.server.dialects.places import naming
from trio_runner.server.event_body import EventBody
from trio_runner.server.ownership import own

_LONG: Final = 1 << 11
"""Pieces of text, alternatives of tokens or numbers of embeddings from which on a helper thread writes an answer."""


class OpenAIRoutes:
    """The handlers, one for each path and method. Errors that none of them catches are worded by the application."""

    def __init__(self, context: RouteContext) -> None:
        self._engine = context.engine
        self._threads = context.threads
        self._names = context.names
        self._created = int(time.time())

    def operations(self) -> tuple[Operation, ...]:
        """What is served."""
        return (
            Operation(
                method="POST",
                path="/v1/chat/completions",
                handler=self.chat,
                summary="Answer a conversation.",
                body=requests_chat.CHAT,
                answer=responses.ChatCompletion,
                stream=responses_stream.ChatCompletionChunk,
                refusals=(404,),
            ),
            Operation(
                method="POST",
                path="/v1/completions",
                handler=self.text,
                summary="Continue a text, or fill in its middle.",
                body=requests_text.TEXT,
                answer=responses.TextCompletion,
                stream=responses.TextCompletion,
                refusals=(404,),
            ),
            Operation(
                method="POST",
                path="/v1/embeddings",
                handler=self.embeddings,
                summary="Make embeddings of one text or of many.",
                body=requests_embeddings.EMBEDDINGS,
                answer=responses.Embeddings,
                refusals=(404,),
            ),
            Operation(
                method="GET",
                path="/v1/models",
                handler=self.models,
                summary="List the model under each of its names.",
                answer=responses.Models,
            ),
            Operation(
                method="GET",
                path="/v1/models/<path:name>",
                handler=self.model,
                summary="Tell what the model is.",
                answer=responses.Model,
                refusals=(404,),
            ),
        )

    async def chat(self) -> Response:
        asked = await self._threads.read_body(requests_chat.chat)
        self._names.check(asked.model)
        choices = await self._start(asked)
        if isinstance(choices, Response):
            return choices
        head = self._head("chatcmpl", asked.model)
        if asked.stream:
            stream = responses_stream.ChatStream(
                head, n_choices=len(asked.generations), n=asked.n, include_usage=asked.include_usage
            )
            return _streamed(choices, stream, stream.opening())
        gathered = await _gather(choices, len(asked.generations))
        return await self._answered(
            gathered.size, partial(responses.chat_completion, head, gathered, n=asked.n, logprobs=asked.n_top >= 0)
        )

    async def text(self) -> Response:
        asked = await self._threads.read_body(requests_text.text)
        self._names.check(asked.model)
        choices = await self._start(asked)
        if isinstance(choices, Response):
            return choices
        echoes = [await self._text_of(asked, index) for index in range(len(asked.echoes))]
        head = self._head("cmpl", asked.model)
        n_choices = len(asked.generations)
        if asked.stream:
            stream = responses_stream.TextStream(
                head, n_top=asked.n_top, n_choices=n_choices, n=asked.n, include_usage=asked.include_usage
            )
            return _streamed(choices, stream, stream.opening(echoes))
        gathered = await _gather(choices, n_choices)
        return await self._answered(
            gathered.size,
            partial(responses.text_completion, head, gathered, n=asked.n, n_top=asked.n_top, echoes=echoes),
        )

    async def embeddings(self) -> Response:
        asked = await self._threads.read_body(requests_embeddings.embeddings)
        self._names.check(asked.model)
        try:
            results = await self._engine.embed_requests(asked.requests)
        except RunnerError as error:
            return _refused(error, {"content": "input"})
        name = asked.model or self._names.name
        size = len(results) * self._engine.capabilities.embedding_size
        return await self._answered(size, partial(responses.embeddings, results, name, as_base64=asked.base64))

    async def models(self) -> Response:
        loaded = self._loaded()
        return _whole(responses.models(list(self._names), self._created, loaded))

    async def model(self, name: str) -> Response:
        self._names.check(name)
        return _whole(responses.model_answer(name, self._created, self._loaded()))

    async def _text_of(self, asked: Asked, index: int) -> str:
        """The text of a prompt with which answers begin."""
        prompt = asked.echoes[index]
        if isinstance(prompt, str):
            return prompt
        with naming({"tokens": _prompt(index, asked)}):
            return await self._engine.detokenize(prompt)

    def _loaded(self) -> tuple[ModelInfo, Capabilities] | None:
        """What is known of the model, unless it is still loading or was not loaded."""
        try:
            return self._engine.info, self._engine.capabilities
        except RunnerError:
            return None

    def _head(self, kind: str, model: str | None) -> Head:
        return Head(responses.answer_id(kind), int(time.time()), model or self._names.name)

    async def _start(self, asked: Asked) -> Choices | Response:
        """All generations, started; or the answer that says why one of them cannot start."""
        check_room(asked.generations, self._engine.config, "n" if asked.n > 1 else "prompt")
        choices = Choices([self._engine.generate(request) for request in asked.generations])
        own(choices)
        try:
            await choices.start()
        except RunnerError as error:
            return _refused(error, {**asked.places, "prompt": _prompt(choices.n_started // asked.n, asked)})
        return choices

    async def _answered(self, size: int, write: partial[bytes]) -> Response:
        return _whole(write() if size < _LONG else await self._threads.write(write))


def _prompt(index: int, asked: Asked) -> str:
    """What a prompt is called in the body."""
    return f"prompt[{index}]" if len(asked.generations) > asked.n else "prompt"


async def _gather(choices: Choices, n_choices: int) -> Gathered:
    gathered = Gathered(n_choices)
    async for index, event in choices:
        gathered.push(index, event)
    return gathered


def _refused(error: RunnerError, places: Mapping[str, str]) -> Response:
    return response(responses.error_answer(responses.not_taken(error, places)))


def _streamed(choices: Choices, writer: responses_stream.Stream, opening: bytes) -> Response:
    body = EventBody(choices, writer, keep_alive=responses_stream.KEEP_ALIVE, opening=opening)
    headers = {"x-request-id": responses.request_id(), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Response(body, content_type="text/event-stream", headers=headers)


def _whole(body: bytes) -> Response:
    answer = json_response(body)
    answer.headers["x-request-id"] = responses.request_id()
    return answer
