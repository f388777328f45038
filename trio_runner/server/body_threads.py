"""Threads that read long bodies and write long answers, while the event loop serves others."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import TypeVar, cast

import trio
from quart import request

LARGE = 1 << 15
"""Bytes of a body, or characters or tokens of an answer, from which on a helper thread reads or writes it. On the event
loop, this many take some milliseconds, for which everybody else waits. A thread helps only if no call into C takes
long, since that keeps the interpreter to itself; `dialects.json_in` and `dialects.json_out` see to it."""

S = TypeVar("S", bound=Sized)
T = TypeVar("T")


class BodyThreads:
    """Two threads for all requests together; more would compete for the interpreter. One reads bodies and does other
    conversions, which tokenize and detokenize need. The other writes long answers."""

    def __init__(self) -> None:
        self._reader, self._writer = trio.CapacityLimiter(1), trio.CapacityLimiter(1)

    async def read_body(self, parse: Callable[[bytes], T]) -> T:
        """What `parse` makes of the body of the current request. Raises what `parse` raises."""
        # Quart would keep the body beside what is read from it, for as long as the answer takes.
        return await self.convert(cast(bytes, await request.get_data(cache=False)), parse)

    async def convert(self, data: S, into: Callable[[S], T]) -> T:
        """What `into` makes of `data`: on a thread if `data` is large. Raises what `into` raises."""
        if len(data) < LARGE:
            return into(data)
        return await trio.to_thread.run_sync(into, data, limiter=self._reader, abandon_on_cancel=True)

    async def write(self, write: Callable[[], bytes]) -> bytes:
        """The answer that `write` returns, which may take seconds. Raises what `write` raises."""
        return await trio.to_thread.run_sync(write, limiter=self._writer, abandon_on_cancel=True)
