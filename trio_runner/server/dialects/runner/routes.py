"""What each path of the original runner does, and some more paths."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from quart import Response

from trio_runner.errors import LoadError, RunnerError, Unsupported
from trio_runner.server.dialects.dialect import ANY_METHOD, Operation, RouteContext, json_response, response
from trio_runner.server.dialects.runner import answers, requests, responses
from trio_runner.server.event_body import EventBody
from trio_runner.server.ownership import own
from trio_runner.server.problems import Problem, plain_text


class RunnerRoutes:
    """The handlers, one for each path and method. Errors that none of them catches are worded by the application."""

    def __init__(self, context: RouteContext) -> None:
        self._engine = context.engine
        self._threads = context.threads
        self._adapter_dir = context.adapter_dir

    def operations(self) -> tuple[Operation, ...]:
        """What is served."""
        return (*self._converting(), *self._telling(), *self._adapters())

    def _converting(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="POST",
                path="/completion",
                handler=self.completion,
                summary="Continue a prompt, and stream the text.",
                body=requests.COMPLETION,
                stream_type="application/json",
                stream=answers.CompletionLine,
            ),
            Operation(
                method="POST",
                path="/embedding",
                handler=self.embedding,
                summary="Make embeddings of one text or of many.",
                body=requests.EMBEDDING,
                answer=answers.Embedding | answers.Embeddings,
            ),
            Operation(
                method="POST",
                path="/tokenize",
                handler=self.tokenize,
                summary="Turn a text into tokens.",
                body=requests.TOKENIZE,
                answer=answers.Tokens,
            ),
            Operation(
                method="POST",
                path="/detokenize",
                handler=self.detokenize,
                summary="Turn tokens into a text.",
                body=requests.DETOKENIZE,
                answer=answers.Content,
            ),
            Operation(
                method="POST",
                path="/rerank",
                handler=self.rerank,
                summary="Score documents for a query.",
                body=requests.RERANK,
                answer=answers.Ranking,
            ),
        )

    def _telling(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method=ANY_METHOD,
                path="/health",
                handler=self.health,
                summary="Tell whether the model is loaded and served.",
                answer=answers.Health,
            ),
            Operation(
                method="GET",
                path="/props",
                handler=self.props,
                summary="Tell what the model is.",
                answer=answers.Properties,
            ),
            Operation(
                method="GET",
                path="/statistics",
                handler=self.statistics,
                summary="Tell how busy the engine is.",
                answer=answers.Statistics,
            ),
        )

    def _adapters(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="GET",
                path="/adapters",
                handler=self.list_adapters,
                summary="List the LoRA adapters.",
                answer=answers.Adapters,
            ),
            Operation(
                method="POST",
                path="/adapters",
                handler=self.load_adapter,
                summary="Load a LoRA adapter.",
                body=requests.ADAPTER,
                answer=answers.Adapter,
            ),
            Operation(
                method="DELETE",
                path="/adapters/<name>",
                handler=self.unload_adapter,
                summary="Unload a LoRA adapter.",
                refusals=(404,),
                answer=answers.Adapter,
            ),
        )

    async def completion(self) -> Response:
        request = await self._threads.read_body(requests.completion)
        generation = self._engine.generate(request)
        own(generation)
        try:
            await generation.start()
        except RunnerError as error:
            return _refused(responses.not_admitted(error))
        return Response(EventBody(generation, responses.CompletionLines()), content_type="application/json")

    async def embedding(self) -> Response:
        request = await self._threads.read_body(requests.embedding)
        try:
            if isinstance(request, tuple):
                embeddings = await self._engine.embed_requests(request)
                return json_response(await self._threads.write(partial(responses.embeddings_line, embeddings)))
            return json_response(responses.embedding_line(await self._engine.embed_request(request)))
        except RunnerError as error:
            return _refused(responses.not_admitted(error))

    async def rerank(self) -> Response:
        request, top_n = await self._threads.read_body(requests.rerank)
        scores = await self._engine.rerank_request(request)
        return json_response(responses.rerank_line(scores.tolist(), top_n))

    async def tokenize(self) -> Response:
        text, add_special, parse_special = await self._threads.read_body(requests.tokenize)
        tokens = await self._engine.tokenize(text, add_special=add_special, parse_special=parse_special)
        return json_response(await self._threads.convert(tokens, responses.tokens_line))

    async def detokenize(self) -> Response:
        tokens = await self._threads.read_body(requests.detokenize)
        text = await self._engine.detokenize(tokens)
        return json_response(await self._threads.convert(text, responses.content_line))

    async def list_adapters(self) -> Response:
        await self._engine.wait_ready()
        return json_response(responses.adapters_line(self._engine.adapters))

    async def load_adapter(self) -> Response:
        directory = self._directory_of_adapters()
        file, name, scale = await self._threads.read_body(requests.adapter)
        await self._engine.wait_ready()  # its LoadError would be about the model, and not about this file
        try:
            info = await self._engine.load_adapter(directory / file, name=name, scale=scale)
        except LoadError as error:
            return _refused(responses.adapter_problem(error, file))
        return json_response(responses.adapter_line(info))

    async def unload_adapter(self, name: str) -> Response:
        self._directory_of_adapters()
        await self._engine.wait_ready()
        return json_response(responses.adapter_line(self._engine.unload_adapter(name)))

    async def health(self) -> Response:
        line = responses.health_line(self._engine.status, self._engine.progress, self._engine.failure)
        return json_response(line, responses.health_status(self._engine.status))

    async def props(self) -> Response:
        await self._engine.wait_ready()
        engine = self._engine
        return json_response(responses.props_line(engine.info, engine.capabilities, engine.placement))

    async def statistics(self) -> Response:
        return json_response(responses.statistics_line(self._engine.statistics()))

    def _directory_of_adapters(self) -> Path:
        if self._adapter_dir is None:
            raise Unsupported("adapters", "this server was not told of a directory of adapters (--adapter-dir)")
        return self._adapter_dir


def _refused(problem: Problem) -> Response:
    return response(plain_text(problem))
