"""Embeddings and scores: requests with one result each, and lists of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import trio
from numpy.typing import NDArray

from trio_runner.core.pooling import normalize as normalize_vector
from trio_runner.engine.dispatcher import Dispatcher
from trio_runner.engine.requests import PairRequest, n_characters
from trio_runner.errors import EngineBusy
from trio_runner.events import Embedded, Event, Finished
from trio_runner.request import EmbedRequest


class Embedding:
    """One embedding request in flight. The rules of `Generation` hold; there is one result, or an error."""

    def __init__(self, dispatcher: Dispatcher, request: EmbedRequest | PairRequest) -> None:
        self.request = request
        self._dispatcher = dispatcher
        self._uid: int | None = None
        self._result: Embedded | Exception | None = None
        self._arrived = trio.Event()

    async def start(self) -> None:
        """Check the request and join the queue. Raises what `Generation.start` raises."""
        self._uid = await self._dispatcher.submit(self, self.request)

    async def result(self) -> Embedded:
        """Wait for the result. Raises any `RunnerError` that ended the request."""
        await self._arrived.wait()
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None
        return self._result

    def close(self) -> None:
        """Cancel the request, synchronously. Idempotent."""
        if self._uid is not None and self._result is None:
            self._dispatcher.cancel(self._uid)

    def deliver(self, event: Event | Embedded) -> None:
        """Take the result. Called by the dispatcher."""
        if isinstance(event, Embedded):
            self._settle(event)
        elif isinstance(event, Finished) and event.error is not None:
            self._settle(event.error)

    def fail(self, error: Exception) -> None:
        """Take the error that ended the request. Called by the dispatcher."""
        self._settle(error)

    def _settle(self, result: Embedded | Exception) -> None:
        self._result = result
        self._arrived.set()


async def embed_one(dispatcher: Dispatcher, request: EmbedRequest) -> Embedded:
    """The embedding of one request. It is cancelled if this is."""
    embedding = Embedding(dispatcher, request)
    try:
        await embedding.start()
        embedded = await embedding.result()
    finally:
        embedding.close()
    return embedded


async def embed_all(
    dispatcher: Dispatcher, requests: Sequence[EmbedRequest | PairRequest], *, window: int
) -> list[Embedded]:
    """The results of all requests, in their order, or the first error. At most `window` requests are in flight.

    Without a window, a long list would fill the queue or starve the requests of others. The longest texts run first,
    since texts that share a batch wait for the longest of them.
    """
    results: dict[int, Embedded] = {}
    in_flight: deque[tuple[int, Embedding]] = deque()

    async def take_first() -> None:
        index, embedding = in_flight[0]
        results[index] = await embedding.result()
        in_flight.popleft()

    async def start(embedding: Embedding) -> None:
        """If others have filled the queue meanwhile, requests before this one make room in it."""
        while True:
            try:
                await embedding.start()
            except EngineBusy:
                if not in_flight:
                    raise
            else:
                return
            await take_first()

    longest_first = sorted(range(len(requests)), key=lambda index: n_characters(requests[index]), reverse=True)
    try:
        for index in longest_first:
            if len(in_flight) == window:
                await take_first()
            embedding = Embedding(dispatcher, requests[index])
            await start(embedding)
            in_flight.append((index, embedding))
        while in_flight:
            await take_first()
    finally:
        for _, embedding in in_flight:
            embedding.close()
    return [results[index] for index in range(len(requests))]


def shaped(embedded: Embedded, request: EmbedRequest) -> Embedded:
    """An embedding as float32, shape (n,), cut to `request.dimensions` and then normalised, if the request asks for
    it."""
    vector: NDArray[np.float32] = np.asarray(embedded.vector, dtype=np.float32)[: request.dimensions]
    return Embedded(normalize_vector(vector) if request.normalize else vector, embedded.usage)
