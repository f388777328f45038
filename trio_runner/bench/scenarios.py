"""What is done to a server, and how big: the vocabulary of the scenarios. `bench.SCENARIOS` is the table of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Final, TypeAlias

import trio

from trio_runner.bench.client import CutShort, Stream
from trio_runner.bench.dialects import Ask
from trio_runner.bench.figures import Measured
from trio_runner.bench.prompts import Prompts
from trio_runner.bench.server import Server, Unavailable

N_SHORT: Final = 16
"""Tokens of a prompt that is not what is measured."""
MS: Final = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How big things are."""

    long_prompt: int = 1900
    prefix: int = 1500
    """Tokens that several prompts share."""
    tokens: int = 64
    """Tokens of a stream."""
    streams: tuple[int, ...] = (1, 4, 8)
    beside: int = 3
    """Streams that run while something else happens, if there are slots for them."""
    storm: int = 300
    """Connections of a storm."""
    crowd: int = 16
    """Of those, how many at once."""
    cancellations: int = 100
    """Beside the survivors."""
    clients: int = 200
    """At once, in the overload."""
    endless: int = 2000
    """Tokens of a stream that is not meant to end by itself."""
    unread: int = 1500
    """Tokens after which a server has felt that nobody reads them."""

    @property
    def stretch(self) -> int:
        """Tokens of a stream whose rate is measured: seconds, for it to be known to a percent."""
        return 4 * self.tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's turn at a scenario. Each server of a round gets the same `random`."""

    server: Server
    load: Load
    random: Random
    prompts: Prompts

    async def ask(
        self, n_prompt: int, max_tokens: int, *, reuse: bool = False, stream: bool = True, n_top: int = 0
    ) -> Ask:
        """For a completion of a new prompt."""
        prompt = await self.prompts.make(n_prompt)
        return Ask(prompt=prompt, max_tokens=max_tokens, reuse=reuse, stream=stream, n_top=n_top)

    def beside(self, n_others: int) -> int:
        """How many streams can run beside `n_others` more. Raises `Unavailable` if none can."""
        n_streams = min(self.load.beside, self.server.slots - n_others)
        if n_streams < 1:
            raise Unavailable(f"needs {1 + n_others} slots, the server has {self.server.slots}")
        return n_streams


Scenario: TypeAlias = Callable[[Turn], Awaitable[Measured]]
"""Raises `Unavailable` if the server cannot do it."""


async def first_token(server: Server, ask: Ask) -> float:
    """Seconds to the first token of a request that ends after it."""
    return (await server.complete(ask)).ttft


async def complete_all(server: Server, asks: Sequence[Ask]) -> list[Stream]:
    """All at once."""
    streams: dict[int, Stream] = {}

    async def complete(index: int, ask: Ask) -> None:
        streams[index] = await server.complete(ask)

    async with trio.open_nursery() as nursery:
        for index, ask in enumerate(asks):
            nursery.start_soon(complete, index, ask)
    return [streams[index] for index in range(len(asks))]


@asynccontextmanager
async def running(turn: Turn, n_streams: int, *, max_tokens: int | None = None) -> AsyncIterator[list[Stream]]:
    """Streams that have begun, and are read in the background until the block ends."""
    asks = [await turn.ask(N_SHORT, max_tokens or turn.load.endless) for _ in range(n_streams)]
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        streams = [await stack.enter_async_context(turn.server.asking(ask)) for ask in asks]
        for stream in streams:
            nursery.start_soon(stream.finish)
        await grown(streams, 1)
        yield streams
        nursery.cancel_scope.cancel()


async def grown(streams: Sequence[Stream], n_pieces: int) -> None:
    """Wait until each of them, read by somebody else, has so many more pieces than now. Raises `CutShort` if one ends
    before."""
    targets = [len(stream.pieces) + n_pieces for stream in streams]
    while any(len(stream.pieces) < target for stream, target in zip(streams, targets, strict=True)):
        if any(stream.total is not None for stream in streams):
            raise CutShort("a stream ended too early")
        await trio.sleep(0.005)
