"""What all scenarios share: their sizes, their turns, and streams. `rounds.SCENARIOS` is the table of the scenarios."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Final, TypeAlias

import trio

from trio_runner.bench.client import CutShort, Stream
from trio_runner.bench.dialects import Request
from trio_runner.bench.figures import Measured
from trio_runner.bench.prompts import Prompts
from trio_runner.bench.server import Server, Unavailable

N_SHORT: Final = 16
"""Tokens of a prompt whose length does not matter."""
MS: Final = 1000.0
"""Milliseconds in a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The sizes of everything in the scenarios."""

    long_prompt: int = 1900
    """Tokens of a long prompt."""
    prefix: int = 1500
    """Tokens of the beginning that several prompts share."""
    tokens: int = 64
    """Tokens of a stream."""
    streams: tuple[int, ...] = (1, 4, 8)
    """Numbers of streams whose throughput is measured."""
    beside: int = 3
    """Streams that run while something else is measured, if there are slots for them."""
    storm: int = 300
    """Connections of a storm."""
    crowd: int = 16
    """Connections of a storm at the same time."""
    cancellations: int = 100
    """Clients that disconnect beside the survivors."""
    clients: int = 200
    """Requests at once in the overload."""
    endless: int = 2000
    """Tokens of a stream that is not meant to end by itself."""
    late: int = 340
    """Tokens of a stream whose client does not read until it is paused. A server of ours pauses after 256."""
    unread: int = 1500
    """Tokens after which a server must have noticed a client that does not read."""

    @property
    def stretch(self) -> int:
        """Tokens of a stream whose rate is measured. It runs for seconds, so the rate is known to about a percent."""
        return 4 * self.tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's turn at a scenario. All servers of a round get the same `random`."""

    server: Server
    load: Load
    random: Random
    prompts: Prompts

    async def request(
        self, n_prompt: int, max_tokens: int, *, reuse: bool = False, stream: bool = True, n_top: int = 0
    ) -> Request:
        """A request for a completion of a new prompt of `n_prompt` tokens."""
        prompt = await self.prompts.make(n_prompt)
        return Request(prompt=prompt, max_tokens=max_tokens, reuse=reuse, stream=stream, n_top=n_top)

    def beside(self, n_others: int) -> int:
        """How many streams can run beside `n_others` more. Raises `Unavailable` if none can."""
        n_streams = min(self.load.beside, self.server.slots - n_others)
        if n_streams < 1:
            raise Unavailable(f"needs {1 + n_others} slots, the server has {self.server.slots}")
        return n_streams


Scenario: TypeAlias = Callable[[Turn], Awaitable[Measured]]
"""Measures something on the server of a turn. Raises `Unavailable` if the server cannot do it."""


async def first_token(server: Server, request: Request) -> float:
    """Seconds to the first token of `request`, which should end after it."""
    return (await server.complete(request)).ttft


async def complete_all(server: Server, requests: Sequence[Request]) -> list[Stream]:
    """Complete all requests at the same time. Returns their streams in the order of `requests`."""
    streams: dict[int, Stream] = {}

    async def complete(index: int, request: Request) -> None:
        streams[index] = await server.complete(request)

    async with trio.open_nursery() as nursery:
        for index, request in enumerate(requests):
            nursery.start_soon(complete, index, request)
    return [streams[index] for index in range(len(requests))]


@asynccontextmanager
async def running(turn: Turn, n_streams: int, *, max_tokens: int | None = None) -> AsyncIterator[list[Stream]]:
    """Yield streams that have begun. They are read in the background until the block ends."""
    requests = [await turn.request(N_SHORT, max_tokens or turn.load.endless) for _ in range(n_streams)]
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        streams = [await stack.enter_async_context(turn.server.requesting(request)) for request in requests]
        for stream in streams:
            nursery.start_soon(stream.finish)
        await grown(streams, 1)
        yield streams
        nursery.cancel_scope.cancel()


async def grown(streams: Sequence[Stream], n_pieces: int) -> None:
    """Wait until each stream has `n_pieces` more pieces than now. Another task must read them.

    Raises `CutShort` if one of them ends before.
    """
    targets = [len(stream.pieces) + n_pieces for stream in streams]
    while any(len(stream.pieces) < target for stream, target in zip(streams, targets, strict=True)):
        if any(stream.total is not None for stream in streams):
            raise CutShort("a stream ended too early")
        await trio.sleep(0.005)
