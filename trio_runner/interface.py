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
    """One request in flight: an async iterator of events and an async context manager that closes it.

    One task reads. The last event is `Finished`, unless the generation was closed before. An error ends the iteration:
    it is raised.
    """

    @property
    def usage(self) -> Usage | None:
        """What the request cost, once `Finished` was read."""

    async def start(self) -> None:
        """Check the request and join the queue. Does nothing the second time. Raises `RequestError`, `EngineBusy`,
        `EngineClosed`, `EngineBroken` or `LoadError`."""

    def close(self) -> None:
        """Cancel the request, synchronously. Reading raises `trio.ClosedResourceError` from then on. Idempotent."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Event: ...

    def receive_nowait(self, at_most: int | None = None) -> list[Event]:
        """The events that have arrived, at most `at_most` of them; maybe none. Never waits."""

    async def collect(self) -> str:
        """Run to the end and return the whole text. Closes the generation on the way out."""


class EngineInterface(Protocol):
    """One loaded model, ready for any number of concurrent requests. Used on one trio thread."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def status(self) -> Status: ...

    @property
    def failure(self) -> BaseException | None:
        """Why `status` is "broken"."""

    @property
    def progress(self) -> float:
        """How much of the model is loaded, from 0 to 1."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def has_projector(self) -> bool: ...

    @property
    def placement(self) -> Placement | None: ...

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]: ...

    def statistics(self) -> EngineStatistics: ...

    async def wait_ready(self) -> None: ...

    def generate(
        self,
        request: GenerateRequest | Chat | str | Sequence[int | Part],
        /,
        **options: Unpack[GenerateOptions],
    ) -> GenerationInterface: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> GenerationInterface: ...

    async def embed(
        self,
        texts: Sequence[str],
        *,
        normalize: bool = False,
        dimensions: int | None = None,
        truncate: bool = False,
        adapters: Sequence[AdapterChoice] | None = None,
    ) -> NDArray[np.float32]: ...

    async def embed_request(self, request: EmbedRequest) -> Embedded: ...

    async def embed_requests(self, requests: Sequence[EmbedRequest]) -> list[Embedded]: ...

    async def rerank(self, query: str, documents: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]: ...

    async def rerank_request(self, request: RerankRequest) -> NDArray[np.float32]: ...

    async def load_adapter(
        self, path: str | os.PathLike[str], *, name: str | None = None, scale: float = 0.0
    ) -> AdapterInfo: ...

    def unload_adapter(self, name: str) -> AdapterInfo: ...

    async def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]: ...

    async def detokenize(self, tokens: Sequence[int]) -> str: ...

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - running out of time is no error
        """Take no more requests, wait at most `timeout` seconds for those in flight, then end the rest."""
