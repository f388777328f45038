"""What each path does, in the dialect of Ollama's Go runner."""

from __future__ import annotations

from collections.abc import Callable, Sized
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import trio
from quart import Response, request
from quart_trio import QuartTrio

from trio_runner.errors import LoadError, RunnerError, Unsupported
from trio_runner.server import runner_api
from trio_runner.server.body import EventBody
from trio_runner.server.problems import Problem

if TYPE_CHECKING:
    from trio_runner.engine.engine import Engine
    from trio_runner.engine.generation import Generation

OWNED = "trio_runner.owned"
"""Key of the ASGI scope: the generations to close when the request is over."""
LARGE = 1 << 15
"""Bytes of a body, or characters or tokens of an answer, from which on it is read or written on a helper thread: on the
event loop, some milliseconds of it are all that the others may have to wait for. A thread helps only as long as no call
into C takes long, for that keeps the interpreter to itself; `runner_api` sees to it."""

S = TypeVar("S", bound=Sized)
T = TypeVar("T")


def json_response(line: bytes, status: int = 200) -> Response:
    return Response(line, status=status, content_type="application/json")


def problem_response(problem: Problem) -> Response:
    return Response(problem.body, status=problem.status, headers=problem.all_headers)


def _own(generation: Generation) -> None:
    cast(dict[str, Any], request.scope)[OWNED].append(generation)


def add_routes(app: QuartTrio, engine: Engine, adapter_dir: Path | None = None) -> None:
    """Serve `engine` on the paths of the original runner, and some more. Clients may load the adapters in
    `adapter_dir`, if there is one."""
    helper, writer = trio.CapacityLimiter(1), trio.CapacityLimiter(1)

    async def convert(data: S, into: Callable[[S], T]) -> T:
        """What `into` makes of `data`, while others are served. Raises as `into`."""
        if len(data) < LARGE:
            return into(data)
        return await trio.to_thread.run_sync(into, data, limiter=helper, abandon_on_cancel=True)

    async def body(parse: Callable[[bytes], T]) -> T:
        """The body, as `parse` understands it. Raises as `parse`."""
        # Not to be kept beside what is read from it, for as long as the answer takes.
        return await convert(cast(bytes, await request.get_data(cache=False)), parse)

    async def completion() -> Response:
        asked = await body(runner_api.completion)
        generation = engine.generate(asked)
        _own(generation)
        try:
            await generation.start()
        except RunnerError as error:
            return problem_response(runner_api.not_admitted(error))
        return Response(EventBody(generation, runner_api.CompletionLines()), content_type="application/json")

    async def embedding() -> Response:
        asked = await body(runner_api.embedding)
        try:
            if isinstance(asked, tuple):
                vectors = await engine.embed_requests(asked)
                write = partial(runner_api.embeddings_line, vectors)  # may take seconds
                return json_response(await trio.to_thread.run_sync(write, limiter=writer, abandon_on_cancel=True))
            return json_response(runner_api.embedding_line(await engine.embed_request(asked)))
        except RunnerError as error:
            return problem_response(runner_api.not_admitted(error))

    async def rerank() -> Response:
        asked, top_n = await body(runner_api.rerank)
        scores = await engine.rerank_request(asked)
        return json_response(runner_api.rerank_line(scores.tolist(), top_n))

    async def list_adapters() -> Response:
        await engine.wait_ready()
        return json_response(runner_api.adapters_line(engine.adapters))

    def own_adapters() -> Path:
        if adapter_dir is None:
            raise Unsupported("adapters", "this server was not told of a directory of adapters (--adapter-dir)")
        return adapter_dir

    async def load_adapter() -> Response:
        directory = own_adapters()
        file, name, scale = await body(runner_api.adapter)
        await engine.wait_ready()  # a model that cannot be loaded is no fault of this file
        try:
            info = await engine.load_adapter(directory / file, name=name, scale=scale)
        except LoadError as error:
            return problem_response(runner_api.adapter_problem(error, file))
        return json_response(runner_api.adapter_line(info))

    async def unload_adapter(name: str) -> Response:
        own_adapters()
        await engine.wait_ready()
        return json_response(runner_api.adapter_line(engine.unload_adapter(name)))

    async def tokenize() -> Response:
        text, add_special, parse_special = await body(runner_api.tokenize)
        tokens = await engine.tokenize(text, add_special=add_special, parse_special=parse_special)
        return json_response(await convert(tokens, runner_api.tokens_line))

    async def detokenize() -> Response:
        tokens = await body(runner_api.detokenize)
        text = await engine.detokenize(tokens)
        return json_response(await convert(text, runner_api.content_line))

    async def health() -> Response:
        line = runner_api.health_line(engine.status, engine.progress, engine.failure)
        return json_response(line, runner_api.health_status(engine.status))

    async def props() -> Response:
        await engine.wait_ready()
        return json_response(runner_api.props_line(engine.info, engine.capabilities, engine.placement))

    async def statistics() -> Response:
        return json_response(runner_api.statistics_line(engine.statistics()))

    for handler in (completion, embedding, tokenize, detokenize, rerank):
        app.add_url_rule(f"/{handler.__name__}", view_func=handler, methods=["POST"])

    app.add_url_rule("/props", view_func=props, methods=["GET"])
    app.add_url_rule("/statistics", view_func=statistics, methods=["GET"])
    app.add_url_rule("/adapters", view_func=list_adapters, methods=["GET"])
    app.add_url_rule("/adapters", view_func=load_adapter, methods=["POST"])
    app.add_url_rule("/adapters/<name>", view_func=unload_adapter, methods=["DELETE"])

    # Any method at all, which add_url_rule cannot say.
    rule = app.url_rule_class("/health", endpoint="health")
    rule.provide_automatic_options = False
    app.url_map.add(rule)
    app.view_functions["health"] = health
