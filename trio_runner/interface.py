"""The interface of an engine: what everything outside the engine's own room may know of it.

The HTTP server, the command line and the facades are written against these protocols, never against a class. So an
engine may run in this process or in another one, and a test may bring its own.

`Generation` and `Engine` in engine/ say what each member promises, once for both.
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
from trio_runner.request import AdapterChoice, Chat, EmbedRequest, GenerateRequest, Infill, Part, RerankRequest


class GenerationInterface(Protocol):
    """One request in flight: an async iterator of events, and an async context manager that closes it."""

    @property
    def usage(self) -> Usage | None: ...

    async def start(self) -> None: ...

    def close(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Event: ...

    def receive_nowait(self, at_most: int | None = None) -> list[Event]: ...

    async def collect(self) -> str: ...


class EngineInterface(Protocol):
    """One loaded model, ready for any number of concurrent requests. Used on one trio thread."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def status(self) -> Status: ...

    @property
    def failure(self) -> BaseException | None: ...

    @property
    def progress(self) -> float: ...

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

    async def wait_ready(self, at_most: float | None = None) -> None: ...

    def generate(
        self,
        request: GenerateRequest | Chat | Infill | str | Sequence[int | Part],
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

    async def rerank(
        self, query: str, documents: Sequence[str] | None = None, *, truncate: bool = False
    ) -> NDArray[np.float32]: ...

    async def rerank_request(self, request: RerankRequest) -> NDArray[np.float32]: ...

    async def load_adapter(
        self, path: str | os.PathLike[str], *, name: str | None = None, scale: float = 0.0
    ) -> AdapterInfo: ...

    def unload_adapter(self, name: str) -> AdapterInfo: ...

    async def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]: ...

    async def detokenize(self, tokens: Sequence[int]) -> str: ...

    async def pieces(self, tokens: Sequence[int]) -> list[bytes]: ...

    async def render(self, chat: Chat) -> str: ...

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - running out of time is no error
        """Take no more requests. Wait at most `timeout` seconds for those in flight, those still in preparation
        included, then end the rest with `EngineClosed`."""
