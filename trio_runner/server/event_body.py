"""The body of a streamed answer."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import trio
from quart.wrappers.response import ResponseBody

from trio_runner.errors import RunnerError
from trio_runner.events import Finished

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 16
"""Bytes after which a chunk is complete. Two hundred events with a hundred alternatives each, written at once, would
keep everybody else waiting for a tenth of a second."""
KEEP_ALIVE_SECONDS = 10.0
"""Seconds of silence after which a stream says that it is still there. Clients and proxies give up after a minute or
more, some after half of one."""


E_contra = TypeVar("E_contra", contravariant=True)
E = TypeVar("E")


class EventSource(Protocol[E]):
    """What a body is made from: a `GenerationInterface`, which gives events, or `Choices`, which gives them with the
    number of their choice."""

    async def __anext__(self) -> E: ...

    def receive_nowait(self, at_most: int | None = None) -> list[E]: ...

    def close(self) -> None: ...


class EventWriter(Protocol[E_contra]):
    """How a dialect writes the events of one answer."""

    def event(self, event: E_contra, /) -> bytes:
        """What `event` adds to the body; maybe nothing."""

    def failure(self, error: Exception) -> bytes:
        """The end of a body that cannot go on."""


class EventBody(ResponseBody, Generic[E]):
    """The events of a source that is started, as chunks of bytes. Closes the source in the end, whatever the reason.

    Everything that has arrived while the last chunk was being sent becomes one chunk, up to `CHUNK_BYTES`. So a slow
    reader costs fewer sends instead of more memory. No more than that is taken from the source, because what is taken
    counts as read. A failure is written into the body: the status is long sent.

    With `keep_alive`, these bytes are sent whenever nothing else was sent for `KEEP_ALIVE_SECONDS`. They must mean
    nothing in the format of the body, such as a comment. Some clients and proxies give up on a connection that is
    silent while it waits for a slot or for a long prompt.

    With `opening`, these bytes are sent at once. The head of an answer goes out with the first bytes of its body, so
    without an opening the client waits for its status until the first event.
    """

    def __init__(
        self, source: EventSource[E], writer: EventWriter[E], *, keep_alive: bytes = b"", opening: bytes = b""
    ) -> None:
        self._source = source
        self._writer = writer
        self._keep_alive = keep_alive
        self._opening = opening
        self._ended = False

    async def __aenter__(self) -> AsyncIterator[bytes]:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._source.close()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._opening:
            opening, self._opening = self._opening, b""
            return opening
        while not self._ended:
            if chunk := await self._next_chunk():
                return chunk
        raise StopAsyncIteration

    async def _next_chunk(self) -> bytes:
        chunk = bytearray()
        try:
            if not self._keep_alive:
                chunk += self._write(await anext(self._source))
            else:
                with trio.move_on_after(KEEP_ALIVE_SECONDS) as waiting:
                    chunk += self._write(await anext(self._source))
                if waiting.cancelled_caught:  # no event is lost: see `Generation.__anext__`
                    return self._keep_alive
            while len(chunk) < CHUNK_BYTES and (events := self._source.receive_nowait(at_most=1)):
                chunk += self._write(events[0])
        except StopAsyncIteration:
            self._ended = True
        except Exception as error:
            if not isinstance(error, RunnerError):
                log.exception("an answer ended early")
            self._ended = True
            chunk += self._writer.failure(error)
        return bytes(chunk)

    def _write(self, event: E) -> bytes:
        self._ended = isinstance(event, Finished)
        return self._writer.event(event)
