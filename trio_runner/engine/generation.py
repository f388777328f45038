"""The reader's side of a request: where its events arrive, and how it is let go.

Rule 1: letting go is synchronous. `close` awaits nothing, takes no lock and starts no task, so that it works in a
`finally` and under cancellation alike. It is never done for you outside of a block: whoever iterates without one may
give up on one event, by a deadline say, and go on with the next.
Rule 2: the reader's pace is the reader's problem. Events are put down here without waiting; a reader that falls too
far behind has its sequence paused, and only that one.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Protocol

import trio

from trio_runner.engine.prepare import AnyRequest, PairRequest
from trio_runner.events import Embedded, Event, Finished, Usage
from trio_runner.request import EmbedRequest, GenerateRequest


class Reader(Protocol):
    """Who is told about a sequence. All of it happens on the trio thread, and none of it may raise or wait."""

    def deliver(self, event: Event | Embedded) -> None: ...

    def fail(self, error: Exception) -> None:
        """The sequence ends with `error`; nothing is delivered after that."""


class Desk(Protocol):
    """What a generation needs of its engine."""

    @property
    def max_backlog(self) -> int: ...

    async def submit(self, reader: Reader, request: AnyRequest) -> int: ...

    def cancel(self, uid: int) -> None: ...

    def pause(self, uid: int) -> None: ...

    def still_reading(self, uid: int) -> None: ...

    def resume(self, uid: int) -> None: ...


class Generation:
    """One request in flight: an async iterator of events, and a context manager that lets go of it.

        async with engine.generate("Once upon a time") as generation:
            async for event in generation:
                print(event.text, end="")

    One task reads. The last event is `Finished`, unless the generation is closed before; an error ends the iteration
    by being raised: any `RunnerError`.
    """

    usage: Usage | None = None
    """What it cost, once `Finished` was read."""

    def __init__(self, desk: Desk, request: GenerateRequest) -> None:
        """Not to be called: `Engine.generate` does."""
        self.request = request
        self._desk = desk
        self._uid: int | None = None
        self._started = self._closed = self._paused = self._ended = False
        self._starting = trio.CancelScope()
        self._error: Exception | None = None
        self._send, self._receive = trio.open_memory_channel[Event](math.inf)

    async def start(self) -> None:
        """Check the request and join the queue; entering the context does the same. Waits for a model that is still
        loading. Does nothing the second time.

        Raises whatever is wrong with the request (`RequestError`) or the engine (`EngineBusy`, `EngineClosed`,
        `EngineBroken`, `LoadError`). Cancelled or failed, it leaves nothing behind.
        """
        if self._started:
            return
        self._started = True
        try:
            with self._starting:
                self._uid = await self._desk.submit(self, self.request)
        except BaseException:
            self.close()
            raise
        if self._closed and self._uid is not None:
            self._desk.cancel(self._uid)

    def close(self) -> None:
        """Let go: a waiting sequence is forgotten, a running one gives its slot back by the next step, with what it
        has decoded. Nothing is delivered after this returns; reading raises `trio.ClosedResourceError`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._starting.cancel()
        if self._uid is not None and not self._ended:
            self._desk.cancel(self._uid)
        # In this order: a task that is reading hears that it was closed, not that the text was complete.
        self._receive.close()
        self._send.close()

    async def __aenter__(self) -> Generation:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Event:
        await self.start()
        if self._error is not None:
            self._raise_error()
        try:
            event = await self._receive.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        self._catch_up()
        if isinstance(event, Finished):
            self.usage = event.usage
            if event.error is not None:
                self._error = event.error
                self._raise_error()
        return event

    def receive_nowait(self, at_most: int | None = None) -> list[Event]:
        """The events that are here already, maybe none, and no more than `at_most`. An error that ended the generation
        is kept for the next `__anext__`, so that nothing that came before it is lost."""
        events: list[Event] = []
        while self._error is None and (at_most is None or len(events) < at_most):
            try:
                event = self._receive.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                break
            if isinstance(event, Finished):
                self.usage = event.usage
                if event.error is not None:
                    self._error = event.error
                    break
            events.append(event)
        self._catch_up()
        return events

    async def collect(self) -> str:
        """Run to the end and return the whole text; lets go on the way out."""
        async with self:
            return "".join([event.text async for event in self])

    # -- Reader: called by the engine --------------------------------------------------------------------------------

    def deliver(self, event: Event | Embedded) -> None:
        assert not isinstance(event, Embedded)
        self._send.send_nowait(event)
        if isinstance(event, Finished):
            self._ended = True
            self._send.close()
        elif not self._paused and self._n_unread > self._desk.max_backlog and self._uid is not None:
            self._paused = True
            self._desk.pause(self._uid)

    def fail(self, error: Exception) -> None:
        self.deliver(Finished("error", Usage(), error=error))

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def _n_unread(self) -> int:
        return self._receive.statistics().current_buffer_used

    def _catch_up(self) -> None:
        if not self._paused or self._ended or self._uid is None:
            return
        # Resuming far below the bound, rather than at it, keeps a slow reader from flapping.
        if self._n_unread <= self._desk.max_backlog // 4:
            self._paused = False
            self._desk.resume(self._uid)
        else:
            self._desk.still_reading(self._uid)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        assert error is not None
        raise error


class Embedding:
    """One vector on its way. Same rules; there is one event, or an error."""

    def __init__(self, desk: Desk, request: EmbedRequest | PairRequest) -> None:
        self.request = request
        self._desk = desk
        self._uid: int | None = None
        self._result: Embedded | Exception | None = None
        self._arrived = trio.Event()

    async def start(self) -> None:
        """As `Generation.start`."""
        self._uid = await self._desk.submit(self, self.request)

    async def result(self) -> Embedded:
        """Wait for the vector. Raises as a generation does."""
        await self._arrived.wait()
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None
        return self._result

    def close(self) -> None:
        """As `Generation.close`."""
        if self._uid is not None and self._result is None:
            self._desk.cancel(self._uid)

    def deliver(self, event: Event | Embedded) -> None:
        if isinstance(event, Embedded):
            self._settle(event)
        elif isinstance(event, Finished) and event.error is not None:
            self._settle(event.error)

    def fail(self, error: Exception) -> None:
        self._settle(error)

    def _settle(self, result: Embedded | Exception) -> None:
        self._result = result
        self._arrived.set()
