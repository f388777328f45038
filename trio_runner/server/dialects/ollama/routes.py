"""What each path of Ollama's dialect does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

import trio
from quart import Response

from trio_runner.errors import RequestError, UnknownModel
from trio_runner.events import Embedded
from trio_runner.parameters import MAX_SHOWN
from trio_runner.request import Chat, GenerateRequest
from trio_runner.server.dialects.dialect import Operation, RouteContext, json_response, response
from trio_runner.server.dialects.ollama import bodies, model, requests, responses
from trio_runner.server.dialects.ollama.model import ServedModel
from trio_runner.server.dialects.ollama.requests import EmbedCall, GenerateCall
from trio_runner.server.dialects.ollama.responses import ChatLines, GenerateLines
from trio_runner.server.dialects.ollama.thinking import ThinkingSplitter, thinking_style
from trio_runner.server.dialects.ollama.times import Stopwatch
from trio_runner.server.event_body import EventBody
from trio_runner.server.model_file import ModelFile
from trio_runner.server.ownership import own
from trio_runner.server.problems import Problem

log = logging.getLogger(__name__)

VERSION: Final = "0.12.11"
"""The version of Ollama whose API this is. Clients compare it: some want at least 0.6.4, and others take 0.13.4 as a
promise of /v1/responses."""
NDJSON: Final = "application/x-ndjson"
ONE_MODEL: Final = "this server has one model, which is chosen when it starts, so it cannot {} models"
KEEP_ALIVE: Final = b" "
"""What a stream says after a long silence: white space before the next line. An empty line would be no JSON."""

Parse: TypeAlias = Callable[[bytes], GenerateCall]


class OllamaRoutes:
    """The handlers, one for each path and method. Errors that none of them catches are worded by the application."""

    def __init__(self, context: RouteContext) -> None:
        self._engine = context.engine
        self._threads = context.threads
        self._names = context.names
        self._model_path = context.model_path
        self._file: ModelFile | None = None
        self._started_ns = time.time_ns()
        self._is_context_noted = False

    def operations(self) -> tuple[Operation, ...]:
        """What is served."""
        return (*self._generating(), *self._telling(), *self._refusing())

    def _generating(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="POST",
                path="/api/generate",
                handler=self.generate,
                summary="Answer a prompt, continue a text, or fill in a gap.",
                body=bodies.GENERATE,
                answer=responses.GenerateLine,
                stream=responses.GenerateLine,
                stream_type=NDJSON,
            ),
            Operation(
                method="POST",
                path="/api/chat",
                handler=self.chat,
                summary="Continue a conversation.",
                body=bodies.CHAT,
                answer=responses.ChatLine,
                stream=responses.ChatLine,
                stream_type=NDJSON,
            ),
            Operation(
                method="POST",
                path="/api/embed",
                handler=self.embed,
                summary="Make embeddings of one text or of many, each of length 1.",
                body=bodies.EMBED,
                answer=responses.EmbedAnswer,
            ),
            Operation(
                method="POST",
                path="/api/embeddings",
                handler=self.embeddings,
                summary="Make an embedding of one text, as it comes out of the model.",
                body=bodies.EMBEDDINGS,
                answer=responses.EmbeddingAnswer,
            ),
        )

    def _telling(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="POST",
                path="/api/show",
                handler=self.show,
                summary="Tell what the model is.",
                body=bodies.SHOW,
                answer=model.Shown,
            ),
            Operation(
                method="GET",
                path="/api/tags",
                handler=self.tags,
                summary="List the names of the model.",
                answer=model.Tags,
            ),
            Operation(
                method="GET",
                path="/api/ps",
                handler=self.processes,
                summary="Tell whether the model is in memory, and how much it takes.",
                answer=model.Processes,
            ),
            Operation(
                method="GET",
                path="/api/version",
                handler=self.version,
                summary="Tell which version of Ollama has this API.",
                answer=responses.Version,
            ),
            Operation(
                method="POST",
                path="/api/pull",
                handler=self.pull,
                summary="Say that the model is there.",
                body=bodies.PULL,
                answer=responses.Progress,
                stream=responses.Progress,
                stream_type=NDJSON,
            ),
        )

    def _refusing(self) -> tuple[Operation, ...]:
        return tuple(
            Operation(
                method=method,
                path=path,
                handler=partial(self.refuse, verb),
                summary=f"Refuse to {verb} models.",
                refusals=(501,),
            )
            for method, path, verb in (
                ("POST", "/api/push", "push"),
                ("POST", "/api/create", "create"),
                ("POST", "/api/copy", "copy"),
                ("DELETE", "/api/delete", "delete"),
                ("POST", "/api/blobs/<digest>", "create"),
            )
        )

    # Generating.

    async def generate(self) -> Response:
        return await self._answer(requests.generate, GenerateLines)

    async def chat(self) -> Response:
        return await self._answer(requests.chat, ChatLines)

    async def _answer(self, parse: Parse, lines_of: type[GenerateLines]) -> Response:
        watch = Stopwatch()
        call = await self._threads.read_body(parse)
        name = self._checked(call.model)
        await self._engine.wait_ready()
        watch.loaded()
        if call.idle is not None:
            return json_response(lines_of(name, watch).idle(call.idle))
        info, n_ctx = self._engine.info, self._engine.capabilities.n_ctx
        self._note_context(call.num_ctx, n_ctx)
        request = call.prepare(chat_template=info.chat_template, n_ctx=n_ctx)
        lines = lines_of(name, watch, await self._splitter(call, request))
        generation = self._engine.generate(request)
        own(generation)
        try:
            await generation.start()
        except RequestError as error:
            raise call.renamed(error) from None
        if call.stream:
            return Response(EventBody(generation, lines, keep_alive=KEEP_ALIVE), content_type=NDJSON)
        events = [event async for event in generation]
        return json_response(await self._threads.convert(events, lines.whole))

    async def _splitter(self, call: GenerateCall, request: GenerateRequest) -> ThinkingSplitter | None:
        tags = thinking_style(self._engine.info.chat_template).tags
        if not call.thinks or tags is None:
            return None
        prompt = request.prompt
        if isinstance(prompt, Chat):  # whose template may open the block of thinking itself
            prompt = await self._engine.render(prompt)
        return ThinkingSplitter(tags, opened=isinstance(prompt, str) and prompt.rstrip().endswith(tags.opening))

    def _note_context(self, wanted: int | None, n_ctx: int) -> None:
        if wanted is not None and wanted > n_ctx and not self._is_context_noted:
            self._is_context_noted = True
            log.warning("a client wants a context of %d tokens (num_ctx), but %d are served", wanted, n_ctx)

    # Embeddings.

    async def embed(self) -> Response:
        watch = Stopwatch()
        call = await self._threads.read_body(requests.embed)
        name = self._checked(call.model)
        await self._engine.wait_ready()
        watch.loaded()
        embedded = await self._embedded(call)
        return json_response(await self._threads.write(partial(responses.embed_line, name, embedded, watch)))

    async def embeddings(self) -> Response:
        call = await self._threads.read_body(requests.embeddings)
        self._checked(call.model)
        return json_response(responses.embedding_line(await self._embedded(call)))

    async def _embedded(self, call: EmbedCall) -> list[Embedded]:
        try:
            return await self._engine.embed_requests(call.requests) if call.requests else []
        except RequestError as error:
            raise call.renamed(error) from None

    # Telling.

    async def show(self) -> Response:
        self._checked(await self._threads.read_body(requests.show))
        return json_response((await self._served()).show())

    async def tags(self) -> Response:
        return json_response((await self._served()).tags(tuple(self._names)))

    async def processes(self) -> Response:
        if self._engine.status == "loading":
            return json_response(model.NO_PROCESSES)
        return json_response((await self._served()).processes())

    async def version(self) -> Response:
        return json_response(responses.version_line(VERSION))

    async def pull(self) -> Response:
        name, stream = await self._threads.read_body(requests.pull)
        self._checked(name, " It fetches no other.")
        if stream:
            return Response(responses.pulled_lines(), content_type=NDJSON)
        return json_response(responses.pulled_line())

    async def refuse(self, verb: str, **variables: str) -> Response:
        return response(responses.refusal(Problem(501, ONE_MODEL.format(verb))))

    async def _served(self) -> ServedModel:
        await self._engine.wait_ready()
        engine = self._engine
        if self._file is None:
            self._file = await self._read_file()
        return ServedModel(
            name=self._names.name,
            info=engine.info,
            capabilities=engine.capabilities,
            placement=engine.placement,
            has_projector=engine.has_projector,
            file=self._file,
        )

    async def _read_file(self) -> ModelFile:
        if self._model_path is not None:
            try:
                return await trio.to_thread.run_sync(ModelFile.read, self._model_path, abandon_on_cancel=True)
            except OSError as error:
                log.warning("the file of the model cannot be read any more: %s", error)
        return model.no_file(self._engine.info, self._started_ns)

    def _checked(self, name: str | None, more: str = "") -> str:
        """The name of the model, as the client gave it if it gave one. Raises `UnknownModel` if that is another's."""
        try:
            self._names.check(name)
        except UnknownModel as error:
            known = " or ".join(f"'{one}'" for one in error.known)
            error.args = (f"model '{error.name[:MAX_SHOWN]}' not found: this server has {known} only.{more}",)
            raise
        return name or self._names.name
