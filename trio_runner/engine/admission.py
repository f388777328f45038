"""Admission: how many requests may wait, and when a refused request should come back."""

from __future__ import annotations

from collections import Counter
from typing import Literal, TypeAlias

import trio

from trio_runner.engine.requests import AnyRequest
from trio_runner.engine.state import MAX_RETRY_AFTER, MIN_RETRY_AFTER, EngineState
from trio_runner.errors import EngineBusy
from trio_runner.events import Usage
from trio_runner.request import GenerateRequest

SHARE_OF_LAST = 0.1
"""Weight of the last request in the moving average of seconds: the average is over about ten requests."""

Queue: TypeAlias = Literal["generation", "embedding"]
"""Generations and embeddings have a queue each, so that neither takes a place from the other. Most embeddings have
slots of their own as well; see `core.sequence.takes_embed_slot`."""


def queue_of(request: AnyRequest) -> Queue:
    """The queue that a request waits in."""
    return "generation" if isinstance(request, GenerateRequest) else "embedding"


class Admission:
    """Counts the requests in flight, from the moment they are asked for. All on one trio thread."""

    def __init__(self, state: EngineState) -> None:
        self.seconds: dict[Queue, float] = {}
        """Seconds for which a request had rows in batches: a moving average of the requests that ended without an
        error. Read by tests."""
        self.n_refused = 0
        """Requests that found the queue full."""
        self._state = state
        self._n_admitted: Counter[Queue] = Counter()
        self._idle = trio.Event()

    def admit(self, request: AnyRequest) -> Queue:
        """Give the request a place until `leave`. Raises `EngineBusy` if the queue is full."""
        queue = queue_of(request)
        max_queue = self._state.config.max_queue
        if max_queue is not None:
            if isinstance(request, GenerateRequest) and request.priority == "background":
                max_queue //= 2  # the other half is for requests that a person waits for
            n_slots = self._n_slots(queue)
            n_waiting = self._n_admitted[queue] - n_slots
            n_excess = n_waiting - max_queue + 1
            if n_excess > 0:
                self.n_refused += 1
                raise EngineBusy(
                    f"the queue is full: {n_slots} requests are running and {n_waiting} waiting",
                    retry_after=self._seconds_until_ended(queue, n_excess, n_slots),
                )
        self._n_admitted[queue] += 1
        return queue

    def leave(self, queue: Queue) -> None:
        """Give back a place: the request has ended, or was never submitted."""
        self._n_admitted[queue] -= 1
        if not self._n_admitted.total():
            self._idle.set()
            self._idle = trio.Event()

    def learn(self, queue: Queue, usage: Usage) -> None:
        """Take the seconds of a request that has ended into the average. Requests that never ran do not count."""
        seconds = usage.prompt_seconds + usage.completion_seconds
        if seconds > 0:
            average = self.seconds.get(queue, seconds)
            self.seconds[queue] = average + SHARE_OF_LAST * (seconds - average)

    async def wait_until_idle(self) -> None:
        """Wait until no request has a place."""
        while self._n_admitted.total():
            await self._idle.wait()

    def _n_slots(self, queue: Queue) -> int:
        """Requests of a queue that run at once. Before the model is loaded, the slots for embeddings are a guess."""
        runtime = self._state.runtime
        if queue == "generation" or runtime is None:
            return self._state.config.slots
        return runtime.context.capabilities.n_embed_slots

    def _seconds_until_ended(self, queue: Queue, n_requests: int, n_slots: int) -> float:
        seconds = self.seconds.get(queue, 0.0) * n_requests / n_slots
        if self._state.status == "loading":
            seconds = self._state.seconds_to_load()
        return min(max(seconds, MIN_RETRY_AFTER), MAX_RETRY_AFTER)
