"""Scenarios of speed: throughput, time to the first token, and gaps between tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from itertools import pairwise
from statistics import mean

import trio

from trio_runner.bench.client import CutShort, Stream
from trio_runner.bench.dialects import Request
from trio_runner.bench.figures import Measured, Metric, figures
from trio_runner.bench.processes import cpu_seconds
from trio_runner.bench.scenarios import MS, N_SHORT, Turn, complete_all, first_token, grown, running
from trio_runner.bench.server import Server

N_CLIENTS = 4
"""Clients whose prompts share a beginning."""
LOOK_SECONDS = 0.05
"""Seconds between two looks at the CPU time of a server."""
N_SUFFIX = 32
"""Tokens after the shared beginning."""


async def throughput(turn: Turn) -> Measured:
    """Tokens per second of all streams together, and CPU time of the server's process, while all of them decode."""
    measured = Measured()
    for n_streams in turn.load.streams:
        if n_streams > turn.server.slots:
            measured.note(f"no {n_streams} streams: slots are {turn.server.slots}")
            continue
        requests = [await turn.request(N_SHORT, turn.load.stretch) for _ in range(n_streams)]
        title = f"{n_streams} streams" if n_streams > 1 else "1 stream"
        streams, seconds = await _complete_and_watch(turn.server, requests)
        _add_rate(measured, title, streams)
        if seconds is not None:
            measured.add(Metric(f"{title}, CPU time a token", "ms"), seconds * MS)
    return measured


async def _complete_and_watch(server: Server, requests: Sequence[Request]) -> tuple[list[Stream], float | None]:
    """Complete all requests at the same time. Returns their streams, and the CPU seconds of the server's process for
    each token while all of them decode; None if they cannot be seen."""
    looks: list[tuple[float, list[int]]] = []

    async def look(streams: Sequence[Stream]) -> None:
        """Note the CPU seconds, and the pieces of each stream, from when all have begun until the first ends."""
        while all(stream.ended is None for stream in streams):
            if all(stream.moments for stream in streams):
                seconds = None if server.pid is None else cpu_seconds(server.pid)
                if seconds is None:
                    return
                looks.append((seconds, [len(stream.pieces) for stream in streams]))
            await trio.sleep(LOOK_SECONDS)

    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        streams = [await stack.enter_async_context(server.requesting(request)) for request in requests]
        nursery.start_soon(look, streams)
        for stream in streams:
            nursery.start_soon(stream.finish)
    if len(looks) < 2:
        return streams, None
    (before, pieces_before), (after, pieces_after) = looks[0], looks[-1]
    n_tokens = sum(
        (late - early) * stream.tokens_per_piece
        for stream, early, late in zip(streams, pieces_before, pieces_after, strict=True)
    )
    return streams, (after - before) / n_tokens if n_tokens and after > before else None


async def ttft(turn: Turn) -> Measured:
    """Time to the first token on an idle server, for new prompts and for one that it has just answered."""
    measured, server, n_long = Measured(), turn.server, turn.load.long_prompt
    for n_prompt in (N_SHORT, n_long):
        seconds = await first_token(server, await turn.request(n_prompt, 1))
        measured.add(Metric(f"cold, {n_prompt:,} tokens", "ms"), seconds * MS)
    request = await turn.request(n_long, 1, reuse=True)
    await server.complete(request)
    measured.add(Metric(f"warm, {n_long:,} tokens", "ms"), await first_token(server, request) * MS)
    return measured


async def shared_prefix(turn: Turn) -> Measured:
    """Several clients at once whose prompts begin alike: how often the beginning is decoded, how fast they go on."""
    measured, n_prefix = Measured(), turn.load.prefix
    prefix = await turn.prompts.make(n_prefix)
    prompts = [await turn.prompts.make(n_prefix + N_SUFFIX, prefix=prefix) for _ in range(N_CLIENTS)]
    requests = [Request(prompt=prompt, max_tokens=turn.load.tokens, reuse=True) for prompt in prompts]
    streams = await complete_all(turn.server, requests)
    title = f"{N_CLIENTS} clients, {n_prefix:,} of {n_prefix + N_SUFFIX:,} tokens shared"
    measured.add(Metric(title, "ms"), *(stream.ttft * MS for stream in streams))
    _add_rate(measured, f"{N_CLIENTS} streams over it", streams)
    decoded = [stream.total.decoded_tokens for stream in streams if stream.total is not None]
    if len(known := [n for n in decoded if n is not None]) == N_CLIENTS:
        measured.add(Metric("prompt tokens decoded, in all", "tokens"), sum(known))
    else:
        measured.note("the server does not tell how much of a prompt it found in its cache")
    return measured


async def gaps(turn: Turn) -> Measured:
    """Gaps between the tokens of running streams, undisturbed and while a long prompt arrives."""
    measured, server, n_long = Measured(), turn.server, turn.load.long_prompt
    n_streams = turn.beside(1)
    # The references are measured before and after: the machine's speed drifts, and longer streams are slower.
    idle = [await first_token(server, await turn.request(n_long, 1))]
    request = await turn.request(n_long, 1)
    async with running(turn, n_streams) as streams:
        undisturbed = await _undisturbed(streams, 2 * turn.load.tokens)
        long = await server.complete(request)
        await grown(streams, 1)
        beside = list(_gaps(streams, long.sent, long.first))
        undisturbed += await _undisturbed(streams, 2 * turn.load.tokens)
    await server.quiet()
    idle.append(await first_token(server, await turn.request(n_long, 1)))
    calm = f"{n_streams} streams"
    measured.add(Metric(f"{calm}, undisturbed", "ms"), *(gap * MS for gap in undisturbed))
    measured.add(Metric(f"{calm}, beside a prompt of {n_long:,}", "ms"), *(gap * MS for gap in beside))
    slowdown = figures(beside).p99 / figures(undisturbed).median
    measured.add(Metric("p99 beside it / undisturbed median", "x"), slowdown)
    measured.add(Metric("the prompt's first token, idle server", "ms"), *(seconds * MS for seconds in idle))
    measured.add(Metric(f"the prompt's first token, beside {calm}", "ms"), long.ttft * MS)
    measured.add(Metric("the prompt's first token, beside / idle", "x"), long.ttft / mean(idle))
    return measured


async def _undisturbed(streams: Sequence[Stream], n_pieces: int) -> list[float]:
    """Seconds between the next `n_pieces` pieces of each stream."""
    started = max(stream.moments[-1] for stream in streams)
    await grown(streams, n_pieces)
    return list(_gaps(streams, started, min(stream.moments[-1] for stream in streams)))


def _add_rate(measured: Measured, title: str, streams: Sequence[Stream]) -> None:
    try:
        n_tokens, seconds = together(streams)
    except CutShort as error:
        measured.note(f"{title}: {error}")
    else:
        measured.add(Metric(title, "tokens/s"), n_tokens / seconds)


def together(streams: Sequence[Stream]) -> tuple[float, float]:
    """Tokens of all streams while all of them ran, and the seconds of that time.

    Raises `CutShort` if the first stream ended before the last one began.
    """
    started = max(stream.first for stream in streams)
    ended = min(stream.moments[-1] for stream in streams)
    if ended <= started:
        raise CutShort("they never ran all at once")
    n_tokens = sum(
        stream.tokens_per_piece * sum(started < moment <= ended for moment in stream.moments) for stream in streams
    )
    return n_tokens, ended - started


def _gaps(streams: Sequence[Stream], started: float, ended: float) -> Iterator[float]:
    """The gaps that end after `started` and begin before `ended`, in seconds.

    Tokens that arrive together count as one. A client notices no gap between them, and counting gaps of zero would make
    long gaps look rarer than they are.
    """
    for stream in streams:
        moments = dict.fromkeys(stream.moments)
        yield from (after - before for before, after in pairwise(moments) if after > started and before < ended)
