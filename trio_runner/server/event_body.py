"""The body of a streamed answer."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol

from quart.wrappers.response import ResponseBody

from trio_runner.errors import RunnerError
from trio_runner.events import Event, Finished
from trio_runner.interface import GenerationInterface

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 16
"""Bytes after which a chunk is complete. Two hundred events with a hundred alternatives each, written at once, would
keep everybody else waiting for a tenth of a second."""


class EventWriter(Protocol):
    """How a dialect writes the events of one answer."""

    def event(self, event: Event) -> bytes:
        """What `event` adds to the body; maybe nothing."""

    def failure(self, error: Exception) -> bytes:
        """The end of a body that cannot go on."""


class EventBody(ResponseBody):
    """The events of a started generation as chunks of bytes. Closes the generation in the end,
    whatever the reason.

    Everything that has arrived while the last chunk was being sent becomes one chunk, up to `CHUNK_BYTES`. So a slow
    reader costs fewer sends instead of more memory. No more than that is taken from the generation, because what is
    taken counts as read. A failure is written into the body: the status is long sent.
    """

    def __init__(self, generation: GenerationInterface, writer: EventWriter) -> None:
        self._generation = generation
        self._writer = writer
        self._ended = False

    async def __aenter__(self) -> AsyncIterator[bytes]:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._generation.close()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._ended:
            if chunk := await self._next_chunk():
                return chunk
        raise StopAsyncIteration

    async def _next_chunk(self) -> bytes:
        chunk = bytearray()
        try:
            chunk += self._write(await anext(self._generation))
            while len(chunk) < CHUNK_BYTES and (events := self._generation.receive_nowait(at_most=1)):
                chunk += self._write(events[0])
        except StopAsyncIteration:
            self._ended = True
        except Exception as error:
            if not isinstance(error, RunnerError):
                log.exception("an answer ended early")
            self._ended = True
            chunk += self._writer.failure(error)
        return bytes(chunk)

    def _write(self, event: Event) -> bytes:
        self._ended = isinstance(event, Finished)
        return self._writer.event(event)
