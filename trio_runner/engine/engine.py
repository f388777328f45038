"""The engine as its users see it: one model, and the verbs to use it with.

The work is done elsewhere: `lifecycle.py` loads, runs and frees the model, `dispatcher.py` has the requests in flight,
`generation.py` and `embedding.py` read their events, and `decode_loop.py` is the thread that computes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from trio_runner.config import EngineConfig
from trio_runner.engine.adapters import load_adapter
from trio_runner.engine.embedding import embed_all, embed_one, shaped
from trio_runner.engine.generation import Generation
from trio_runner.engine.helper_threads import kind_for
from trio_runner.engine.lifecycle import Lifecycle
from trio_runner.engine.mailbox import Retire
from trio_runner.engine.prompt_parts import rendered_text
from trio_runner.engine.requests import PairRequest, n_characters
from trio_runner.engine.tokens import pieces_of, tokenize
from trio_runner.events import Embedded
from trio_runner.info import (
    AdapterInfo,
    Capabilities,
    EngineStatistics,
    ModelInfo,
    Placement,
    Status,
)
from trio_runner.options import ChatOptions, GenerateOptions
from trio_runner.request import (
    AdapterChoice,
    Chat,
    EmbedRequest,
    GenerateRequest,
    Infill,
    Part,
    RerankRequest,
    as_prompt,
    make_request,
)


class Engine:
    """One loaded model, ready for any number of concurrent requests. Made by `open_engine`, and used on its trio
    thread.

    An engine breaks if its model does not load or if its decode thread dies. It stays broken: `status` is "broken",
    `failure` says why, the model is freed, and every request raises. To go on, open another engine.
    """

    def __init__(self, lifecycle: Lifecycle) -> None:
        """Not for users: `open_engine` makes engines."""
        self._lifecycle = lifecycle
        self._state = lifecycle.state
        self._dispatcher = lifecycle.dispatcher
        self._adapters = lifecycle.adapters

    # -- what the engine is -------------------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        """How the engine runs."""
        return self._state.config

    @property
    def status(self) -> Status:
        """What the engine is doing: "loading", "ready", "closing", "closed" or "broken"."""
        return self._state.status

    @property
    def failure(self) -> BaseException | None:
        """Why `status` is "broken"."""
        return self._state.failure

    @property
    def progress(self) -> float:
        """How much of the model is loaded, from 0 to 1."""
        return self._state.progress

    @property
    def info(self) -> ModelInfo:
        """Facts about the model. Raises `EngineLoading` while it loads, `LoadError` if it did not load, and
        `EngineBroken` or `EngineClosed` after the engine has ended."""
        return self._state.ready_runtime().model.info

    @property
    def capabilities(self) -> Capabilities:
        """What the model and its context can do. Raises the same errors as `info`."""
        return self._state.ready_runtime().context.capabilities

    @property
    def has_projector(self) -> bool:
        """Whether prompts may have images. Raises the same errors as `info`."""
        return self._state.ready_runtime().projector is not None

    @property
    def placement(self) -> Placement | None:
        """Which devices hold which part of the model; None if that is not known. Raises the same errors as `info`."""
        return self._state.ready_runtime().placement

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The adapters that requests can choose from. Raises the same errors as `info`."""
        self._state.ready_runtime()
        return self._adapters.infos()

    def statistics(self) -> EngineStatistics:
        """How busy the engine is. Never raises."""
        state = self._state
        statistics = EngineStatistics(
            state.status,
            state.config.slots,
            self._dispatcher.n_in_flight,
            state.last_statistics if state.loop is None else state.loop.statistics,
            preparing=self._dispatcher.n_preparing,
            requests=self._dispatcher.statistics(),
        )
        images = state.images
        if images is None:
            return statistics
        return replace(
            statistics, images_encoded=images.n_encoded, images_found=images.n_found, image_bytes=images.n_bytes
        )

    async def wait_ready(self, at_most: float | None = None) -> None:
        """Wait until the model is loaded, for at most `at_most` seconds; None means `config.load_wait`, as for a
        request. Raises `EngineLoading` if it takes longer, `LoadError` if the model did not load, `EngineBroken` if the
        engine broke, and `EngineClosed` if the engine is closed or closing."""
        await self._state.wait_ready(at_most)

    # -- generating ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        request: GenerateRequest | Chat | Infill | str | Sequence[int | Part],
        /,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Continue a prompt. Nothing happens before the generation is entered, started or iterated.

        `request` is a whole request, or a prompt: text, a list of tokens, a list of texts and images, a conversation,
        or a gap in a text. With a prompt, `options` are fields of `GenerateRequest` and `SamplingParams` by name.
        Raises `InvalidRequest` for a value outside its range, and TypeError for a name that is no field.
        """
        if not isinstance(request, GenerateRequest):
            request = make_request(as_prompt(request), options)
        elif options:
            raise TypeError("options go into the request")
        return Generation(self._dispatcher, request)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Generation:
        """Continue a conversation, of which the chat template in the model's file makes a prompt.

        The content of a message is text, or a list of parts: `{"type": "text", "text": ...}` and
        `{"type": "image", "image": ...}`. The rest is as in `generate`.
        """
        chat = Chat(
            messages=tuple(messages),
            tools=None if tools is None else tuple(tools),
            documents=None if documents is None else tuple(documents),
            add_generation_prompt=add_generation_prompt,
            variables=template_variables or {},
        )
        return self.generate(chat, **options)

    # -- embedding ----------------------------------------------------------------------------------------------------

    async def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = False,
        dimensions: int | None = None,
        truncate: bool = False,
        adapters: Sequence[AdapterChoice] | None = None,
    ) -> NDArray[np.float32]:
        """One embedding per text, shape (len(texts), n) with n the model's `embedding_size`, or `dimensions`.

        The options are fields of `EmbedRequest`. Raises TypeError if `texts` is a single text, and otherwise what
        `Generation.start` raises. If one text fails, no embedding is returned.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError("embed takes a list of texts")
        choices = None if adapters is None else tuple(adapters)
        requests = [
            EmbedRequest(content=text, normalize=normalize, dimensions=dimensions, truncate=truncate, adapters=choices)
            for text in texts
        ]
        vectors = [np.asarray(embedded.vector) for embedded in await self.embed_requests(requests)]
        return (
            np.stack(vectors) if vectors else np.empty((0, dimensions or self.capabilities.embedding_size), np.float32)
        )

    async def embed_request(self, request: EmbedRequest) -> Embedded:
        """The embedding of one request, float32, shape (n,), and what it cost. Raises what `Generation.start`
        raises."""
        return shaped(await embed_one(self._dispatcher, request), request)

    async def embed_requests(self, requests: Sequence[EmbedRequest]) -> list[Embedded]:
        """The embeddings of many requests, in their order, as `embed_request` returns them. If one fails, its error is
        raised and no embedding is returned."""
        embedded = await self._embed_all(requests)
        return [shaped(one, request) for one, request in zip(embedded, requests, strict=True)]

    async def rerank(
        self, query: str, documents: Sequence[str] | None = None, *, truncate: bool = False
    ) -> NDArray[np.float32]:
        """How well each document answers the query: float32, shape (len(documents),). These are the model's own scores,
        of which only the order means something.

        Raises TypeError if `documents` is missing or a single text, or if `query` is a `RerankRequest`, which belongs
        to `rerank_request`. Raises `Unsupported` if the model was not made for reranking, and otherwise what
        `Generation.start` raises.
        """
        if isinstance(query, RerankRequest):
            raise TypeError("rerank takes a query and documents: give a RerankRequest to rerank_request")
        if documents is None or isinstance(documents, (str, bytes)):
            raise TypeError("rerank takes a query and a list of documents")
        return await self.rerank_request(RerankRequest(query=query, documents=tuple(documents), truncate=truncate))

    async def rerank_request(self, request: RerankRequest) -> NDArray[np.float32]:
        """The scores of a whole request, as `rerank` returns them."""
        pairs = [
            PairRequest(request.query, document, request.truncate, request.adapters, f"documents[{index}]")
            for index, document in enumerate(request.documents)
        ]
        embedded = await self._embed_all(pairs)
        return np.array([np.asarray(one.vector, np.float32).flat[0] for one in embedded], np.float32)

    async def _embed_all(self, requests: Sequence[EmbedRequest | PairRequest]) -> list[Embedded]:
        await self.wait_ready()
        n_slots, max_queue = self.capabilities.n_embed_slots, self.config.max_queue
        window = n_slots + (n_slots if max_queue is None else min(n_slots, max_queue))
        return await embed_all(self._dispatcher, requests, window=window)

    # -- adapters and tokens ------------------------------------------------------------------------------------------

    async def load_adapter(
        self, path: str | os.PathLike[str], *, name: str | None = None, scale: float = 0.0
    ) -> AdapterInfo:
        """Load a LoRA adapter while other requests run.

        `name` is what requests choose it by; the default is the name of the file without its ending. `scale` applies to
        requests that choose no adapters. Raises `LoadError` for the file, `InvalidRequest` for a name that is taken or
        a scale that is not finite, and what `wait_ready` raises.
        """
        await self.wait_ready()
        return await load_adapter(self._adapters, self._state, self._lifecycle.helpers, path, name or "", scale)

    def unload_adapter(self, name: str) -> AdapterInfo:
        """Let no further request choose an adapter. It is freed after the last request that has it ended. Raises
        `UnknownAdapter`, and the same errors as `info`."""
        self._state.ready_runtime()
        uid, adapter, info = self._adapters.remove(name)
        self._lifecycle.mailbox.put(Retire(uid, adapter))
        return info

    async def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The tokens of `text`. Raises `InvalidRequest` for a text that the model cannot take, and what `wait_ready`
        raises."""
        await self.wait_ready()
        model = self._state.ready_runtime().model
        call = partial(tokenize, model, text, param="content", add_special=add_special, parse_special=parse_special)
        return await self._lifecycle.helpers.run(call, kind_for(len(text)))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`. Bytes that are no UTF-8 become U+FFFD. Raises `InvalidRequest` for a token outside the
        vocabulary, and what `wait_ready` raises."""
        await self.wait_ready()
        call = partial(self._state.ready_runtime().model.detokenize, tokens)
        data = await self._lifecycle.helpers.run(call, kind_for(len(tokens)))
        return data.decode(errors="replace")

    async def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes of each token, which may be no whole character; of a special token, its name. Raises
        `InvalidRequest` for a token outside the vocabulary, and what `wait_ready` raises."""
        await self.wait_ready()
        call = partial(pieces_of, self._state.ready_runtime().model, tokens)
        return await self._lifecycle.helpers.run(call, kind_for(len(tokens)))

    async def render(self, chat: Chat) -> str:
        """The prompt that the model's chat template makes of a conversation. `<__media__>` stands for each image.

        Raises `Unsupported` for a model without a template, and for images if it has no projector; `InvalidRequest` for
        a conversation that the template refuses; and what `wait_ready` raises.
        """
        await self.wait_ready()
        call = partial(rendered_text, GenerateRequest(prompt=chat), self._state.ready_runtime())
        return await self._lifecycle.helpers.run(call, kind_for(n_characters(GenerateRequest(prompt=chat))))

    # -- ending -------------------------------------------------------------------------------------------------------

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - running out of time is no error
        """Take no more requests. Wait at most `timeout` seconds for those in flight, those still in preparation
        included, then end the rest with `EngineClosed`."""
        await self._lifecycle.drain(timeout)
