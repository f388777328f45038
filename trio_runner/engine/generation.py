"""The reader's side of a request: where its events arrive, and how it is closed.

Rule 1: closing is synchronous. `close` awaits nothing, takes no lock and starts no task, so it works in a `finally`
block and under cancellation.
Rule 2: only a block closes a generation by itself. Without a block, a reader may give up on one event, for example by a
deadline, and go on with the next one. The garbage collector closes nothing either: it runs at any time and on any
thread, differently in every interpreter, and a program that starts a generation and reads it later would lose it. A
generation that is not read ends anyway: it is paused after `max_backlog` events, and ended `stall_timeout` seconds
later.
Rule 3: the reader's pace is the reader's problem. Events are queued here without waiting. A reader that falls too far
behind has its own sequence paused, and no other.
"""

from __future__ import annotations

import math
from types import TracebackType

import trio

from trio_runner.engine.dispatcher import Dispatcher
from trio_runner.events import Embedded, Event, Finished, Usage
from trio_runner.request import GenerateRequest


class Generation:
    """One request in flight: an async iterator of events, and an async context manager that closes it.

        async with engine.generate("Once upon a time") as generation:
            async for event in generation:
                print(event.text, end="")

    One task reads. The last event is `Finished`, unless the generation is closed before. Iteration raises the
    `RunnerError` that ended the request, if one did.

    Use the block, or call `close` in a `finally` clause. A loop that is left or cancelled without either closes
    nothing: the request keeps its slot until its text ends, or until `max_backlog` events have been left
    unread for `stall_timeout` seconds. This is so under trio, and under asyncio or another host too.
    """

    usage: Usage | None = None
    """What the request cost, once `Finished` was read; None before."""

    def __init__(self, dispatcher: Dispatcher, request: GenerateRequest) -> None:
        """Not for users: `Engine.generate` makes generations."""
        self.request = request
        self._dispatcher = dispatcher
        self._uid: int | None = None
        self._started = self._closed = self._paused = self._ended = False
        self._starting = trio.CancelScope()
        self._error: Exception | None = None
        self._send, self._receive = trio.open_memory_channel[Event](math.inf)

    async def start(self) -> None:
        """Check the request and join the queue. Entering the block does the same. Waits for a model that is still
        loading. Does nothing the second time.

        Raises a `RequestError` if the request is at fault, and `EngineBusy`, `EngineClosed`, `EngineBroken` or
        `LoadError` if the engine cannot take it. If this raises or is cancelled, nothing of the request is left.
        """
        if self._started:
            return
        self._started = True
        try:
            with self._starting:
                self._uid = await self._dispatcher.submit(self, self.request)
        except BaseException:
            self.close()
            raise
        if self._closed and self._uid is not None:
            self._dispatcher.cancel(self._uid)

    def close(self) -> None:
        """Cancel the request, synchronously. Idempotent.

        A waiting sequence is dropped. A running one gives back its slot by the next step, and what it has decoded stays
        in the prompt cache. No event arrives after this returns: reading raises `trio.ClosedResourceError`.
        """
        if self._closed:
            return
        self._closed = True
        self._starting.cancel()
        if self._uid is not None and not self._ended:
            self._dispatcher.cancel(self._uid)
        # In this order, so that a task that is reading gets ClosedResourceError, and not the end of the text.
        self._receive.close()
        self._send.close()

    async def __aenter__(self) -> Generation:
        """Start the request. Raises what `start` raises."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the generation."""
        self.close()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Event:
        """The next event. Starts the request if need be.

        Raises StopAsyncIteration after `Finished`, `trio.ClosedResourceError` after `close`, the error that ended the
        request, and what `start` raises. If this is cancelled, no event is lost.
        """
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
        """The events that have arrived, at most `at_most` of them; maybe none. Never waits.

        An error that ended the request is kept for the next `__anext__`, so that no event before it is lost. Raises
        `trio.ClosedResourceError` after `close`.
        """
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
        """Read to the end and return the whole text. Closes the generation on the way out. Raises the error that ended
        the request, and what `start` raises."""
        async with self:
            return "".join([event.text async for event in self])

    # -- called by the dispatcher -------------------------------------------------------------------------------------

    def deliver(self, event: Event | Embedded) -> None:
        """Queue an event. Pauses the sequence if too many are unread."""
        assert not isinstance(event, Embedded)
        self._send.send_nowait(event)
        if isinstance(event, Finished):
            self._ended = True
            self._send.close()
        elif not self._paused and self._n_unread > self._dispatcher.max_backlog and self._uid is not None:
            self._paused = True
            self._dispatcher.pause(self._uid)

    def fail(self, error: Exception) -> None:
        """Queue the error that ended the request, behind the events before it."""
        self.deliver(Finished("error", Usage(), error=error))

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def _n_unread(self) -> int:
        return self._receive.statistics().current_buffer_used

    def _catch_up(self) -> None:
        if not self._paused or self._ended or self._uid is None:
            return
        # Resuming far below the bound, not just below it, saves a slow reader two mails for every few events.
        if self._n_unread <= self._dispatcher.max_backlog // 4:
            self._paused = False
            self._dispatcher.resume(self._uid)
        else:
            self._dispatcher.extend_stall_deadline(self._uid)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        assert error is not None
        raise error
