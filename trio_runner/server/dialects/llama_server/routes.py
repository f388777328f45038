"""What each path of llama-server's dialect does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, wraps
from typing import Any, cast

import trio
from quart import Response

from trio_runner.errors import InvalidRequest, PromptTooLong, RequestError
from trio_runner.events import Finished
from trio_runner.request import AdapterChoice, GenerateRequest, Infill, Prompt
from trio_runner.server.body_threads import LARGE
from trio_runner.server.choices import Choice, Choices, check_room
from trio_runner.server.dialects.dialect import Handler, Operation, RouteContext, json_response, response
from trio_runner.server.dialects.llama_server import problem_words, responses
from trio_runner.server.dialects.llama_server.completion_fields import COMPLETION
from trio_runner.server.dialects.llama_server.infill import INFILL, infill
from trio_runner.server.dialects.llama_server.line_rules import LineRules, RuledGeneration
from trio_runner.server.dialects.llama_server.prompts import GivenPrompt, Mixed, Pictured
from trio_runner.server.dialects.llama_server.requests import Completion, completion
from trio_runner.server.dialects.llama_server.responses import CompletionPart, CompletionResult, CompletionState
from trio_runner.server.dialects.llama_server.text_routes import TextRoutes, tokens_of
from trio_runner.server.dialects.places import renamed
from trio_runner.server.event_body import EventBody
from trio_runner.server.ownership import own


def with_lengths(handler: Handler) -> Handler:
    """`handler`, whose refusal of a prompt that is too long has both lengths."""

    @wraps(handler)
    async def handle(**parts: Any) -> Response:
        try:
            return await handler(**parts)
        except PromptTooLong as error:
            return response(problem_words.too_long(error))

    return handle


class LlamaServerRoutes:
    """The handlers, one for each path and method. Errors that none of them catches are worded by the application."""

    def __init__(self, context: RouteContext) -> None:
        self._engine = context.engine
        self._threads = context.threads
        self._names = context.names
        self._texts = TextRoutes(context)

    def operations(self) -> tuple[Operation, ...]:
        """What is served."""
        completions = [
            Operation(
                method="POST",
                path=path,
                handler=with_lengths(self.completion),
                summary="Continue a prompt, or several.",
                body=COMPLETION,
                answer=CompletionResult | list[CompletionResult],
                stream=CompletionPart,
            )
            for path in ("/llama/completion", "/llama/completions")
        ]
        infills = Operation(
            method="POST",
            path="/llama/infill",
            handler=with_lengths(self.infill),
            summary="Fill a gap in a text, such as source code.",
            body=INFILL,
            answer=CompletionResult | list[CompletionResult],
            stream=CompletionPart,
        )
        return (*completions, infills, *self._texts.operations())

    # -- completions --------------------------------------------------------------------------------------------------

    async def completion(self) -> Response:
        asked = await self._threads.read_body(completion)
        self._names.check(asked.model)
        return await self._complete(asked)

    async def infill(self) -> Response:
        asked = await self._threads.read_body(infill)
        self._names.check(asked.model)
        return await self._complete(asked)

    async def _complete(self, asked: Completion) -> Response:
        await self._check_slot(asked.id_slot)
        asked = asked.settled(await self._biases(asked), await self._adapters(asked))
        prompts = [await self._prompt(form) for form in asked.prompts]
        requests = asked.requests(prompts)
        check_room(requests, self._engine.config, "n_cmpl" if asked.n_choices > 1 else "prompt")
        choices = Choices([self._generation(asked, request) for request in requests])
        own(choices)
        started = trio.current_time()
        try:
            await choices.start()
        except RequestError as error:
            which = {"prompt": f"prompt[{choices.n_started // asked.n_choices}]"} if len(prompts) > 1 else {}
            raise renamed(error, which) from None
        texts = [await self._text_of(asked, *pair) for pair in zip(asked.prompts, prompts, strict=True)]
        states = [
            CompletionState(
                index=index,
                report=asked.report,
                model=self._names.name,
                prompt=texts[index // asked.n_choices],
                max_tokens=request.max_tokens,
                started=started,
            )
            for index, request in enumerate(requests)
        ]
        if asked.report.stream:
            writer = responses.CompletionStream(states, trio.current_time)
            comment = responses.COMMENT if asked.report.comments else b""
            return Response(
                EventBody(choices, writer, keep_alive=comment, opening=comment), content_type="text/event-stream"
            )
        return await self._whole(choices, states)

    async def _whole(self, choices: Choices, states: Sequence[CompletionState]) -> Response:
        """The answer of a request that is no stream, once all of its completions have ended."""
        ends: dict[int, Finished] = {}
        async for index, event in choices:
            states[index].take(event, trio.current_time())
            if isinstance(event, Finished):
                ends[index] = event
        write = partial(responses.whole_answer, [(state, ends[index]) for index, state in enumerate(states)])
        is_small = sum(state.n_bytes for state in states) < LARGE
        return json_response(write() if is_small else await self._threads.write(write))

    def _generation(self, asked: Completion, request: GenerateRequest) -> Choice:
        generation = self._engine.generate(request)
        if not asked.min_indent and asked.max_seconds is None:
            return generation
        return RuledGeneration(generation, LineRules(asked.min_indent, asked.max_seconds), trio.current_time)

    # -- what only the engine can tell --------------------------------------------------------------------------------

    async def _biases(self, asked: Completion) -> tuple[tuple[int, float], ...]:
        """The biases of the tokens of texts."""
        return tuple(
            [
                (token, bias)
                for text, bias in asked.biased_texts
                for token in await self._engine.tokenize(text, add_special=False, parse_special=False)
            ]
        )

    async def _adapters(self, asked: Completion) -> tuple[AdapterChoice, ...] | None:
        """The adapters that a request chooses by number."""
        if asked.lora is None:
            return None
        await self._engine.wait_ready()
        adapters = self._engine.adapters
        for number, _ in asked.lora:
            if number >= len(adapters):
                raise InvalidRequest(f"lora: there is no adapter with id {number}", param="lora")
        return tuple(AdapterChoice(adapters[number].name, scale) for number, scale in asked.lora)

    async def _check_slot(self, number: int | None) -> None:
        if number is None:
            return
        await self._engine.wait_ready()
        last = self._engine.capabilities.n_slots - 1
        if number > last:
            raise InvalidRequest(f"id_slot must be between -1 and {last}, not {number}", param="id_slot")

    async def _prompt(self, form: GivenPrompt) -> Prompt:
        """A prompt as the engine takes it."""
        match form:
            case Pictured(parts=parts):
                return parts
            case Mixed():
                return await tokens_of(self._engine, form, add_special=True)
        return form

    async def _text_of(self, asked: Completion, form: GivenPrompt, prompt: Prompt) -> str | None:
        """The text of a prompt, for the answer."""
        if not asked.report.wants("prompt"):
            return None
        match form:
            case str():
                return form
            case Pictured(text=text):
                return text
            case Infill():
                return None
        return await self._engine.detokenize(cast(tuple[int, ...], prompt))
