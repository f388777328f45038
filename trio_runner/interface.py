"""The interface of an engine: what everything outside the engine's own room may know of it.

The HTTP server, the command line and the facades are written against these protocols, never against a class. So an
engine may run in this process or in another one, and a test may bring its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from trio_runner.config import EngineConfig
from trio_runner.events import Embedded, Event, Usage
from trio_runner.info import AdapterInfo, Capabilities, EngineStatistics, ModelInfo, Placement, Status
from trio_runner.options import ChatOptions, GenerateOptions
from trio_runner.request import AdapterChoice, Chat, EmbedRequest, GenerateRequest, Part, RerankRequest


class GenerationInterface(Protocol):
    """One request in flight: an async iterator of events, and an async context manager that closes it.

    One task reads. The last event is `Finished`, unless the generation was closed before. Iteration raises the
    `RunnerError` that ended the request, if one did.

    Use the block, or call `close` in a `finally` clause: leaving or cancelling a loop closes nothing.
    """

    @property
    def usage(self) -> Usage | None:
        """What the request cost, once `Finished` was read; None before."""

    async def start(self) -> None:
        """Check the request and join the queue. Waits for a model that is still loading. Does nothing the second time.

        Raises a `RequestError` if the request is at fault, and `EngineBusy`, `EngineClosed`, `EngineBroken` or
        `LoadError` if the engine cannot take it. If this raises or is cancelled, nothing of the request is left.
        """

    def close(self) -> None:
        """Cancel the request, synchronously. Reading raises `trio.ClosedResourceError` from then on. Idempotent."""

    async def __aenter__(self) -> Self:
        """Start the request. Raises what `start` raises."""

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the generation."""

    def __aiter__(self) -> Self:
        """Itself."""

    async def __anext__(self) -> Event:
        """The next event. Starts the request if need be.

        Raises StopAsyncIteration after `Finished`, `trio.ClosedResourceError` after `close`, the error that ended the
        request, and what `start` raises. If this is cancelled, no event is lost.
        """

    def receive_nowait(self, at_most: int | None = None) -> list[Event]:
        """The events that have arrived, at most `at_most` of them; maybe none. Never waits.

        An error that ended the request is kept for the next `__anext__`. Raises `trio.ClosedResourceError` after
        `close`.
        """

    async def collect(self) -> str:
        """Read to the end and return the whole text. Closes the generation on the way out. Raises the error that ended
        the request, and what `start` raises."""


class EngineInterface(Protocol):
    """One loaded model, ready for any number of concurrent requests. Used on one trio thread.

    An engine breaks if its model does not load or if it fails for good, and stays broken.
    """

    @property
    def config(self) -> EngineConfig:
        """How the engine runs."""

    @property
    def status(self) -> Status:
        """What the engine is doing: "loading", "ready", "closing", "closed" or "broken"."""

    @property
    def failure(self) -> BaseException | None:
        """Why `status` is "broken"; None otherwise."""

    @property
    def progress(self) -> float:
        """How much of the model is loaded, from 0 to 1."""

    @property
    def info(self) -> ModelInfo:
        """Facts about the model. Raises `EngineBusy` while it loads, `LoadError` if it did not load, and `EngineBroken`
        or `EngineClosed` after the engine has ended."""

    @property
    def capabilities(self) -> Capabilities:
        """What the model and its context can do. Raises the same errors as `info`."""

    @property
    def has_projector(self) -> bool:
        """Whether prompts may have images. Raises the same errors as `info`."""

    @property
    def placement(self) -> Placement | None:
        """Which devices hold which part of the model; None if that is not known. Raises the same errors as `info`."""

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The adapters that requests can choose from. Raises the same errors as `info`."""

    def statistics(self) -> EngineStatistics:
        """How busy the engine is. Never raises."""

    async def wait_ready(self) -> None:
        """Wait until the model is loaded. Raises `LoadError` if it did not load, `EngineBroken` if the engine broke,
        and `EngineClosed` if the engine is closed or closing."""

    def generate(
        self,
        request: GenerateRequest | Chat | str | Sequence[int | Part],
        /,
        **options: Unpack[GenerateOptions],
    ) -> GenerationInterface:
        """Continue a prompt. Nothing happens before the generation is entered, started or iterated.

        `request` is a whole request, or a prompt: text, a list of tokens, a list of texts and images, or a
        conversation. With a prompt, `options` are fields of `GenerateRequest` and `SamplingParams` by name. Raises
        `InvalidRequest` for a value outside its range, and TypeError for a name that is no field.
        """

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> GenerationInterface:
        """Continue a conversation, of which the chat template in the model's file makes a prompt.

        The content of a message is text, or a list of parts: `{"type": "text", "text": ...}` and
        `{"type": "image", "image": ...}`. The rest is as in `generate`.
        """

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
        `GenerationInterface.start` raises. If one text fails, no embedding is returned.
        """

    async def embed_request(self, request: EmbedRequest) -> Embedded:
        """The embedding of one request, float32, shape (n,), and what it cost. Raises what `GenerationInterface.start`
        raises."""

    async def embed_requests(self, requests: Sequence[EmbedRequest]) -> list[Embedded]:
        """The embeddings of many requests, in their order. If one fails, its error is raised and no embedding is
        returned."""

    async def rerank(self, query: str, documents: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        """How well each document answers the query: float32, shape (len(documents),). These are the model's own scores,
        of which only the order means something.

        Raises TypeError if `documents` is a single text, or if `query` is a `RerankRequest`, which belongs to
        `rerank_request`. Raises `Unsupported` if the model was not made for reranking, and otherwise what
        `GenerationInterface.start` raises.
        """

    async def rerank_request(self, request: RerankRequest) -> NDArray[np.float32]:
        """The scores of a whole request, as `rerank` returns them."""

    async def load_adapter(
        self, path: str | os.PathLike[str], *, name: str | None = None, scale: float = 0.0
    ) -> AdapterInfo:
        """Load a LoRA adapter while other requests run.

        `name` is what requests choose it by; the default is the name of the file without its ending. `scale` applies to
        requests that choose no adapters. Raises `LoadError` for the file, `InvalidRequest` for a name that is taken or
        a scale that is not finite, and what `wait_ready` raises.
        """

    def unload_adapter(self, name: str) -> AdapterInfo:
        """Let no further request choose an adapter. It is freed after the last request that has it ended. Raises
        `UnknownAdapter`, and the same errors as `info`."""

    async def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The tokens of `text`. Raises `InvalidRequest` for a text that the model cannot take, and what `wait_ready`
        raises."""

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`. Bytes that are no UTF-8 become U+FFFD. Raises `InvalidRequest` for a token outside the
        vocabulary, and what `wait_ready` raises."""

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - running out of time is no error
        """Take no more requests. Wait at most `timeout` seconds for those in flight, those still in preparation
        included, then end the rest with `EngineClosed`."""
