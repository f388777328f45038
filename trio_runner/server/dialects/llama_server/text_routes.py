"""What each path of llama-server's dialect does that generates nothing."""

from __future__ import annotations

from quart import Response, request

from trio_runner.errors import EngineBusy, Unsupported
from trio_runner.interface import EngineInterface
from trio_runner.request import EmbedRequest
from trio_runner.server.dialects.dialect import Operation, RouteContext, json_response, response
from trio_runner.server.dialects.llama_server import problem_words, results, text_requests
from trio_runner.server.dialects.llama_server.prompts import Mixed
from trio_runner.server.dialects.llama_server.text_requests import Content
from trio_runner.server.dialects.places import naming, places_of_variables
from trio_runner.server.metrics import Metrics


async def tokens_of(
    engine: EngineInterface, content: Content, *, add_special: bool, parse_special: bool = True
) -> tuple[int, ...]:
    """The tokens of a text, or of texts and tokens. Special tokens go before the first part, if that is a text."""
    parts = content.parts if isinstance(content, Mixed) else (content,) if isinstance(content, str) else content
    tokens: list[int] = []
    for place, part in enumerate(parts):
        if isinstance(part, str):
            special = add_special and place == 0
            tokens += await engine.tokenize(part, add_special=special, parse_special=parse_special)
        else:
            tokens.append(part)
    return tuple(tokens)


class TextRoutes:
    """The handlers, one for each path and method. Errors that none of them catches are worded by the application."""

    def __init__(self, context: RouteContext) -> None:
        self._engine = context.engine
        self._threads = context.threads
        self._names = context.names
        self._metrics = Metrics(context)

    def operations(self) -> tuple[Operation, ...]:
        """What is served."""
        return (*self._converting(), *self._telling(), *self._refusing())

    def _converting(self) -> tuple[Operation, ...]:
        return (
            *(
                Operation(
                    method="POST",
                    path=f"/llama/{word}",
                    handler=self.embedding,
                    summary="Make embeddings of one text or of many.",
                    body=text_requests.EMBEDDING,
                    answer=list[results.EmbeddingEntry],
                )
                for word in ("embedding", "embeddings")
            ),
            *(
                Operation(
                    method="POST",
                    path=f"/llama/{word}",
                    handler=self.rerank,
                    summary="Score documents for a query.",
                    body=text_requests.RERANK,
                    answer=results.RankedDocuments | list[results.Ranked],
                )
                for word in ("rerank", "reranking")
            ),
            Operation(
                method="POST",
                path="/llama/tokenize",
                handler=self.tokenize,
                summary="Turn a text into tokens.",
                body=text_requests.TOKENIZE,
                answer=results.Tokens,
            ),
            Operation(
                method="POST",
                path="/llama/detokenize",
                handler=self.detokenize,
                summary="Turn tokens into a text.",
                body=text_requests.DETOKENIZE,
                answer=results.Content,
            ),
            Operation(
                method="POST",
                path="/llama/apply-template",
                handler=self.apply_template,
                summary="Turn a conversation into the prompt that the chat template makes of it.",
                body=text_requests.TEMPLATE,
                answer=results.Prompt,
            ),
        )

    def _telling(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="GET",
                path="/llama/props",
                handler=self.props,
                summary="Tell what the model is.",
                answer=results.Props,
            ),
            Operation(
                method="GET",
                path="/llama/slots",
                handler=self.slots,
                summary="Tell how many slots are busy.",
                answer=list[results.SlotState],
            ),
            Operation(
                method="GET",
                path="/llama/lora-adapters",
                handler=self.adapters,
                summary="List the LoRA adapters.",
                answer=list[results.Adapter],
            ),
            Operation(
                method="GET",
                path="/llama/health",
                handler=self.health,
                summary="Tell whether the model is loaded.",
                answer=results.Health,
            ),
            self._metrics.operation("/llama/metrics"),
        )

    def _refusing(self) -> tuple[Operation, ...]:
        return tuple(
            Operation(
                method="POST",
                path=path,
                handler=self.refuse,
                summary=f"Refused: {what} cannot be changed here.",
            )
            for path, what in (
                ("/llama/slots/<id>", "what a slot holds"),
                ("/llama/lora-adapters", "the scales of all requests"),
                ("/llama/props", "what the server is"),
            )
        )

    async def embedding(self) -> Response:
        asked = await self._threads.read_body(text_requests.embedding)
        self._names.check(asked.model)
        contents = [
            await tokens_of(self._engine, content, add_special=True) if isinstance(content, Mixed) else content
            for content in asked.contents
        ]
        with naming({"content": asked.place}):
            embedded = await self._engine.embed_requests([EmbedRequest(content=content) for content in contents])
        return json_response(await self._threads.write(lambda: results.embeddings(embedded, asked.norm)))

    async def rerank(self) -> Response:
        asked = await self._threads.read_body(text_requests.rerank)
        self._names.check(asked.model)
        scores = (await self._engine.rerank_request(asked.request)).tolist()
        return json_response(await self._threads.write(lambda: results.ranking(scores, asked, self._names.name)))

    async def tokenize(self) -> Response:
        asked = await self._threads.read_body(text_requests.tokenize)
        tokens = await tokens_of(
            self._engine, asked.content, add_special=asked.add_special, parse_special=asked.parse_special
        )
        if not asked.with_pieces:
            return json_response(await self._threads.convert(tokens, results.tokens))
        pieces = await self._engine.pieces(tokens)
        return json_response(await self._threads.write(lambda: results.tokens_with_pieces(tokens, pieces)))

    async def apply_template(self) -> Response:
        chat = await self._threads.read_body(text_requests.template)
        with naming(places_of_variables(chat.variables, text_requests.TEMPLATE.fields)):
            text = await self._engine.render(chat)
        return json_response(await self._threads.convert(text, results.prompt))

    async def detokenize(self) -> Response:
        tokens = await self._threads.read_body(text_requests.detokenize)
        return json_response(await self._threads.convert(await self._engine.detokenize(tokens), results.content))

    async def props(self) -> Response:
        await self._engine.wait_ready()
        engine = self._engine
        return json_response(
            results.props(engine.info, engine.capabilities, self._names.name, sees=engine.has_projector)
        )

    async def slots(self) -> Response:
        await self._engine.wait_ready()
        statistics, capabilities = self._engine.statistics(), self._engine.capabilities
        if request.args.get("fail_on_no_slot") and statistics.busy >= capabilities.n_slots:
            raise EngineBusy("no slot is free")
        return json_response(results.slots(statistics, capabilities))

    async def adapters(self) -> Response:
        await self._engine.wait_ready()
        return json_response(results.adapters(self._engine.adapters))

    async def health(self) -> Response:
        match self._engine.status:
            case "ready":
                return json_response(results.health())
            case "loading":
                return response(problem_words.loading())
        return response(problem_words.no_service())

    async def refuse(self, **_: str) -> Response:
        raise Unsupported("this", f"{request.path} cannot be changed here: send what you want with each request")
