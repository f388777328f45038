"""Scenarios with clients that disconnect: what happens to their slots, to other clients, and to the server."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from random import Random
from statistics import median
from typing import Final, TypeAlias

import trio

from trio_runner.bench.client import Connection, CutShort, Ending, Refused
from trio_runner.bench.dialects import Request
from trio_runner.bench.figures import Measured, Metric
from trio_runner.bench.processes import Holdings, holdings
from trio_runner.bench.scenarios import MS, N_SHORT, Turn, first_token, running
from trio_runner.bench.server import QUIET_SECONDS, Overdue, Server, watching

N_IDLE: Final = 3
"""Requests before, and as many after, whose median first token is the reference of an idle server."""
N_VICTIMS: Final = 5
"""Clients that disconnect in one round, if the server tells at once what happens to their slots."""
N_VICTIM_PIECES: Final = 8
"""Pieces of text that a client reads before it disconnects, at least, and less than twice as many."""
MAX_DELAY: Final = 1.0
"""Seconds after which one of many clients disconnects, at most."""
N_STORM_PIECES: Final = 4
"""Pieces of text after which one of many clients disconnects, at most."""
CLIENT_SECONDS: Final = 20.0
"""Seconds after which a client of the storm gives up."""
SETTLE_SECONDS: Final = 12.0
"""Seconds without a change after which a process has settled. trio keeps idle threads for 10 seconds."""
SMALL_BUFFER: Final = 4096
"""Bytes of the receive buffer of a client that does not read."""

Disconnect: TypeAlias = Callable[[Turn], Awaitable[float]]
"""Brings a client into some state, disconnects it, and returns the moment of that."""


# ---- one client, and the next on its slot ----------------------------------------------------------------------------


async def cancel_prefill(turn: Turn) -> Measured:
    """A client disconnects at a random moment of a long prefill."""
    alone = await first_token(turn.server, await turn.request(turn.load.long_prompt, 1))

    async def disconnect(turn: Turn) -> float:
        request = await turn.request(turn.load.long_prompt, turn.load.endless)
        async with turn.server.requesting(request) as victim:
            await trio.sleep(alone * turn.random.uniform(0.1, 0.8))
            return victim.disconnect()

    return await _cancelled(turn, disconnect)


async def cancel_decode(turn: Turn) -> Measured:
    """A client disconnects between two tokens."""

    async def disconnect(turn: Turn) -> float:
        request = await turn.request(N_SHORT, turn.load.endless)
        async with turn.server.requesting(request) as victim:
            await victim.read(N_VICTIM_PIECES + turn.random.randrange(N_VICTIM_PIECES))
            return victim.disconnect()

    return await _cancelled(turn, disconnect)


async def cancel_unread(turn: Turn) -> Measured:
    """A client disconnects while it waits for the whole answer, or has read nothing if every answer is a stream."""
    alone = await first_token(turn.server, await turn.request(N_SHORT, 1))

    async def disconnect(turn: Turn) -> float:
        request = await turn.request(N_SHORT, turn.load.endless, stream=False)
        async with turn.server.requesting(request) as victim:
            await trio.sleep(alone + turn.random.uniform(0.1, 0.5))
            return victim.disconnect()

    return await _cancelled(turn, disconnect)


async def _cancelled(turn: Turn, disconnect: Disconnect) -> Measured:
    """Measure how soon a slot is free while streams use all others. The reference is the same with an idle slot."""
    measured, server = Measured(), turn.server
    n_others = server.slots - 1
    async with running(turn, n_others) as others, watching(server) as watch:
        idle = await _idle(turn)
        if await watch.look() is not None:
            for _ in range(N_VICTIMS):
                disconnected = await disconnect(turn)
                free = await watch.until(lambda statistics: statistics["running"] <= n_others)
                measured.add(Metric("until its slot is free", "ms"), (free - disconnected) * MS)
        request = await turn.request(N_SHORT, 1)
        disconnected = await disconnect(turn)
        successor = await server.complete(request)
        if any(stream.total is not None for stream in others):
            measured.note("the streams beside ended before the next request had its first token")
        else:
            idle += await _idle(turn)
        _add_successor(measured, successor.first - disconnected, idle)
    if n_others:
        measured.note(f"{n_others} streams run beside, also for the reference of the idle server")
    return measured


def _add_successor(measured: Measured, seconds: float, idle: Sequence[float]) -> None:
    measured.add(Metric("next request's first token", "ms"), seconds * MS)
    measured.add(Metric("next request's first token - idle", "ms", difference=True), (seconds - median(idle)) * MS)


async def cancel_queued(turn: Turn) -> Measured:
    """A client disconnects while it waits behind running streams; the next comes when one of them has ended."""
    measured, server = Measured(), turn.server
    victim_request = await turn.request(turn.load.long_prompt, turn.load.endless)
    async with watching(server) as watch:
        if await watch.look() is not None:
            async with running(turn, server.slots):
                for _ in range(N_VICTIMS):
                    async with server.requesting(victim_request) as victim:
                        await watch.until(lambda statistics: statistics["waiting"] >= 1)
                        await trio.sleep(turn.random.uniform(0, 0.1))
                        disconnected = victim.disconnect()
                        # `waiting` is counted once in a step; `generations`, which the queue's bound counts, is exact.
                        free = await watch.until(lambda statistics: statistics["generations"] <= server.slots)
                        measured.add(Metric("until it has left the queue", "ms"), (free - disconnected) * MS)
                        await watch.until(lambda statistics: not statistics["waiting"])
    await server.quiet()
    async with running(turn, server.slots - 1):
        idle = await _idle(turn)
        request = await turn.request(N_SHORT, 1)
        async with server.requesting(await turn.request(N_SHORT, turn.load.tokens)) as before:
            await before.read(1)
            async with server.requesting(victim_request) as victim:
                await before.read(turn.load.tokens // 4)
                victim.disconnect()
            await before.finish()
        free = time.perf_counter()
        successor = await server.complete(request)
        idle += await _idle(turn)
        _add_successor(measured, successor.first - free, idle)
    return measured


async def retry(turn: Turn) -> Measured:
    """A client disconnects at a random moment of a long prefill and comes again with the same prompt."""
    measured, server, n_prompt = Measured(), turn.server, turn.load.long_prompt
    alone = await first_token(server, await turn.request(n_prompt, 1))
    request = await turn.request(n_prompt, 1, reuse=True)
    share = turn.random.uniform(0.2, 0.8)
    async with server.requesting(request) as victim:
        await trio.sleep(alone * share)
        victim.disconnect()
    await server.quiet()
    again = await server.complete(request)
    measured.add(Metric("its first token", "ms"), again.ttft * MS)
    measured.add(Metric("its first token / an idle server's for a new prompt", "x"), again.ttft / alone)
    measured.add(Metric("missing, by the clock", "tokens"), n_prompt * (1 - share))
    decoded = again.total.decoded_tokens if again.total is not None else None
    if decoded is None:
        measured.note("the server does not tell how much of a prompt it found in its cache")
        return measured
    measured.add(Metric("decoded by the retry", "tokens"), decoded)
    return measured


async def _idle(turn: Turn) -> list[float]:
    """Seconds to the first tokens of `N_IDLE` short requests, one after the other."""
    return [await first_token(turn.server, await turn.request(N_SHORT, 1)) for _ in range(N_IDLE)]


# ---- many clients ----------------------------------------------------------------------------------------------------


async def storm(turn: Turn) -> Measured:
    """Clients connect and disconnect at random moments: what the server still holds when all of them are gone."""
    measured, server, n_clients = Measured(), turn.server, turn.load.storm
    pool, delay = await leaving_requests(turn)
    clients = _Clients(server, turn.random, pool, delay)
    await clients.run(2 * turn.load.crowd, turn.load.crowd)  # the server now has all that it creates once and keeps
    await server.quiet()
    before = await settled(server)
    clients.answers.clear()
    started = time.perf_counter()
    await clients.run(n_clients // 2, turn.load.crowd)
    halfway = None if server.pid is None else holdings(server.pid)
    await clients.run(n_clients - n_clients // 2, turn.load.crowd)
    ended = time.perf_counter()
    measured.add(Metric("connections", ""), n_clients)
    measured.add(Metric("time for all of them", "s"), ended - started)
    measured.note("of the clients, " + ", ".join(f"{n:,} x {what}" for what, n in sorted(clients.answers.items())))
    try:
        await server.quiet()
        measured.add(Metric("until the server is quiet again", "ms"), (time.perf_counter() - ended) * MS)
    except Overdue as overdue:
        measured.note(str(overdue))
    for what, n_held in (await server.held()).items():
        measured.add(Metric(what, ""), n_held)
    after = await settled(server)
    if before is None or halfway is None or after is None:
        measured.note("the threads, descriptors and memory of the server's process cannot be seen from here")
    else:
        measured.add(Metric("threads more than before", ""), after.threads - before.threads)
        measured.add(Metric("descriptors more than before", ""), after.descriptors - before.descriptors)
        measured.add(Metric("memory more than before", "MiB"), after.memory - before.memory)
        measured.add(Metric("memory more than halfway", "MiB"), after.memory - halfway.memory)
    with trio.move_on_after(CLIENT_SECONDS) as timeout:
        seconds = await first_token(server, replace(pool[0], max_tokens=1))
        measured.add(Metric("first token afterwards", "ms"), seconds * MS)
    if timeout.cancelled_caught:
        measured.note(f"no first token within {CLIENT_SECONDS:g} s afterwards")
    return measured


async def leaving_requests(turn: Turn) -> tuple[list[Request], float]:
    """The requests of many clients that disconnect, and the seconds after which they do so, at most."""
    n_long = turn.load.long_prompt
    pool = [await turn.request(n, turn.load.endless) for n in (N_SHORT, max(n_long // 4, 1), n_long)]
    return pool, min(await first_token(turn.server, replace(pool[-1], max_tokens=1)), MAX_DELAY)


async def settled(server: Server) -> Holdings | None:
    """What the process holds when nothing has changed for `SETTLE_SECONDS`, or after a minute.

    None if the process cannot be seen from here.
    """
    if server.pid is None:
        return None
    held, since = holdings(server.pid), trio.current_time()
    with trio.move_on_after(QUIET_SECONDS):
        while held is not None and trio.current_time() - since < SETTLE_SECONDS:
            await trio.sleep(0.1)
            before, held = held, holdings(server.pid)
            if held is not None and (held.threads, held.descriptors) != (before.threads, before.descriptors):
                since = trio.current_time()
    return held


class _Clients:
    """The clients of a storm, which connect and disconnect, several at a time."""

    def __init__(self, server: Server, random: Random, pool: Sequence[Request], delay: float) -> None:
        self.answers: Counter[str] = Counter()
        """Clients by what happened to them: the moment at which they disconnected, or the answer they got instead."""
        self._server = server
        self._random = random
        self._pool = pool
        self._delay = delay
        self._points = (self._half_a_head, self._half_a_body, self._unanswered, self._mid_stream, self._never_reading)

    async def run(self, n_rounds: int, n_at_once: int) -> None:
        """Let `n_rounds` clients come and go, `n_at_once` at a time."""
        remaining = itertools.repeat(None, n_rounds)

        async def client() -> None:
            for _ in remaining:
                with trio.move_on_after(CLIENT_SECONDS) as timeout:
                    point = self._random.choice(self._points)
                    try:
                        await point(self._random.choice(("fin", "reset")))
                        self.answers[point.__name__.strip("_").replace("_", " ")] += 1
                    except Refused as refusal:
                        self.answers[str(refusal.status)] += 1
                    except (CutShort, OSError, trio.BrokenResourceError) as error:
                        self.answers[type(error).__name__] += 1
                if timeout.cancelled_caught:
                    self.answers[f"nothing for {CLIENT_SECONDS:g} s"] += 1

        async with trio.open_nursery() as nursery:
            for _ in range(n_at_once):
                nursery.start_soon(client)

    async def _half_a_head(self, how: Ending) -> None:
        await self._partial(how, lambda head, body: head[: self._random.randrange(len(head))])

    async def _half_a_body(self, how: Ending) -> None:
        await self._partial(how, lambda head, body: head + body[: self._random.randrange(len(body))])

    async def _partial(self, how: Ending, cut: Callable[[bytes, bytes], bytes]) -> None:
        dialect = self._server.dialect
        with await Connection.open(self._server.address) as connection:
            whole = connection.encode("POST", dialect.path, dialect.body(self._random.choice(self._pool)))
            head, mark, body = whole.partition(b"\r\n\r\n")
            await connection.send(cut(head + mark, body))
            await trio.sleep(self._random.uniform(0, 0.02))
            connection.disconnect(how)

    async def _unanswered(self, how: Ending) -> None:
        """While it is queued or in its prefill."""
        async with self._server.requesting(self._random.choice(self._pool)) as stream:
            await trio.sleep(self._random.uniform(0, self._delay))
            stream.disconnect(how)

    async def _mid_stream(self, how: Ending) -> None:
        async with self._server.requesting(self._pool[0]) as stream:
            await stream.read(1 + self._random.randrange(N_STORM_PIECES))
            stream.disconnect(how)

    async def _never_reading(self, how: Ending) -> None:
        async with self._server.requesting(self._pool[0], receive_buffer=SMALL_BUFFER) as stream:
            await trio.sleep(self._random.uniform(0, self._delay))
            stream.disconnect(how)
