"""Several generations of one request, read as one stream: the choices of OpenAI's `n`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import trio

from trio_runner.config import EngineConfig
from trio_runner.errors import InvalidRequest
from trio_runner.events import Event
from trio_runner.request import GenerateRequest
from trio_runner.server.event_body import EventSource


def check_room(requests: Sequence[GenerateRequest], config: EngineConfig, param: str) -> None:
    """Raise `InvalidRequest` about `param` if slots and queue together can never hold `requests`, which are of one
    priority. To say that the server is busy would make the client ask again."""
    if config.max_queue is None:
        return
    is_background = requests[0].priority == "background"  # which has half of the queue
    room = config.slots + (config.max_queue // 2 if is_background else config.max_queue)
    if len(requests) > room:
        text = f"{param}: {len(requests)} answers at once are more than the {room} that fit"
        raise InvalidRequest(text, param=param)


class Choice(EventSource[Event], Protocol):
    """What choices are made from: generations, or what behaves like them."""

    async def start(self) -> None: ...


class Choices:
    """An async iterator of (number of the choice, event) over generations that nobody else reads.

    The events of one choice are in their order. The first error of any of them ends the whole, after the events that
    came before it.
    """

    def __init__(self, generations: Sequence[Choice]) -> None:
        self._generations = tuple(generations)
        self.n_started = 0
        """Generations that have started. If `start` raises, this is the number of the one that could not."""
        self._open = set(range(len(self._generations)))
        self._arrived: deque[tuple[int, Event]] = deque()
        self._error: Exception | None = None

    async def start(self) -> None:
        """Start all generations. If one of them cannot be started, closes all, and raises what its `start` raises."""
        try:
            for generation in self._generations:
                await generation.start()
                self.n_started += 1
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all generations, synchronously. Idempotent."""
        for generation in self._generations:
            generation.close()

    def __aiter__(self) -> Choices:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        """The next event of any choice. Raises StopAsyncIteration after the last one. If this is cancelled, no event
        is lost."""
        if len(self._generations) == 1:
            return 0, await anext(self._generations[0])
        while not self._arrived and self._error is None and self._open:
            async with trio.open_nursery() as nursery:
                for index in sorted(self._open):
                    nursery.start_soon(self._read, index, nursery.cancel_scope)
        if self._arrived:
            return self._arrived.popleft()
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    async def _read(self, index: int, reading: trio.CancelScope) -> None:
        """Wait for the next event of one choice, and stop the wait for the others."""
        try:
            self._arrived.append((index, await anext(self._generations[index])))
        except StopAsyncIteration:
            self._open.discard(index)
        except Exception as error:
            self._error = self._error or error
        reading.cancel()

    def receive_nowait(self, at_most: int | None = None) -> list[tuple[int, Event]]:
        """The events that have arrived, at most `at_most` of them; maybe none. Never waits. An error is kept for the
        next `__anext__`."""
        events: list[tuple[int, Event]] = []
        while self._arrived and (at_most is None or len(events) < at_most):
            events.append(self._arrived.popleft())
        for index in sorted(self._open):
            room = None if at_most is None else at_most - len(events)
            if room == 0:
                break
            events += [(index, event) for event in self._generations[index].receive_nowait(room)]
        return events
