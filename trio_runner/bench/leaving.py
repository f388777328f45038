"""Clients that go away: what becomes of their slots, of the others, and of the server."""

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

from trio_runner.bench.client import Connection, CutShort, Farewell, Refused, Stream
from trio_runner.bench.dialects import Ask
from trio_runner.bench.figures import Measured, Metric
from trio_runner.bench.processes import Holdings, holdings
from trio_runner.bench.scenarios import MS, N_SHORT, Turn, complete_all, first_token, running
from trio_runner.bench.server import Server, watching

N_IDLE: Final = 3
"""Requests whose median stands for the idle server."""
N_VICTIMS: Final = 5
"""In one round, where it does not take long to see what becomes of them."""
N_VICTIM_PIECES: Final = 8
MAX_DELAY: Final = 1.0
"""Seconds until a client of the storm leaves, at most."""
PATIENCE: Final = 20.0
"""Seconds that a client of the storm gives a server that does nothing."""
SETTLE_SECONDS: Final = 15.0
"""For threads that are kept for a while in case they are needed again."""
SMALL_BUFFER: Final = 4096

Leave: TypeAlias = Callable[[Turn], Awaitable[float]]
"""Brings a client into some state, makes it go away, and returns when it did."""


# ---- one client, and the next on its slot ----------------------------------------------------------------------------


async def cancel_prefill(turn: Turn) -> Measured:
    """The client goes away at a random moment of a long prefill."""
    alone = await first_token(turn.server, await turn.ask(turn.load.long_prompt, 1))

    async def leave(turn: Turn) -> float:
        ask = await turn.ask(turn.load.long_prompt, turn.load.endless)
        async with turn.server.asking(ask) as victim:
            await trio.sleep(alone * turn.random.uniform(0.1, 0.8))
            return victim.leave()

    return await _cancelled(turn, leave)


async def cancel_decode(turn: Turn) -> Measured:
    """The client goes away between two tokens."""

    async def leave(turn: Turn) -> float:
        ask = await turn.ask(N_SHORT, turn.load.endless)
        async with turn.server.asking(ask) as victim:
            await victim.read(N_VICTIM_PIECES + turn.random.randrange(N_VICTIM_PIECES))
            return victim.leave()

    return await _cancelled(turn, leave)


async def cancel_unread(turn: Turn) -> Measured:
    """The client goes away while it waits for the whole answer; or never reads one, where every answer is a stream."""
    alone = await first_token(turn.server, await turn.ask(N_SHORT, 1))

    async def leave(turn: Turn) -> float:
        ask = await turn.ask(N_SHORT, turn.load.endless, stream=False)
        async with turn.server.asking(ask) as victim:
            await trio.sleep(alone + turn.random.uniform(0.1, 0.5))
            return victim.leave()

    return await _cancelled(turn, leave)


async def _cancelled(turn: Turn, leave: Leave) -> Measured:
    """All slots but one are kept busy by others. The reference is a server in the same state with that slot idle."""
    measured, server = Measured(), turn.server
    n_others = server.slots - 1
    async with running(turn, n_others) as others, watching(server) as watch:
        idle = await _idle(turn)
        if await watch.look() is not None:
            for _ in range(N_VICTIMS):
                left = await leave(turn)
                gone = await watch.until(lambda statistics: statistics["running"] <= n_others)
                measured.add(Metric("until its slot is free", "ms"), (gone - left) * MS)
        ask = await turn.ask(N_SHORT, 1)
        left = await leave(turn)
        successor = await server.complete(ask)
        measured.add(Metric("next request's first token", "ms"), (successor.first - left) * MS)
        measured.add(Metric("next request's first token - idle", "ms"), (successor.first - left - idle) * MS)
        if any(stream.total is not None for stream in others):
            measured.note("the streams beside ended before the next request had its first token")
    if n_others:
        measured.note(f"{n_others} streams run beside, also in the idle server's reference")
    return measured


async def cancel_queued(turn: Turn) -> Measured:
    """The client goes away while it waits behind running streams; the next comes when one of them has ended."""
    measured, server = Measured(), turn.server
    victim_ask = await turn.ask(turn.load.long_prompt, turn.load.endless)
    async with watching(server) as watch:
        if await watch.look() is not None:
            async with running(turn, server.slots):
                for _ in range(N_VICTIMS):
                    async with server.asking(victim_ask) as victim:
                        await watch.until(lambda statistics: statistics["waiting"] >= 1)
                        await trio.sleep(turn.random.uniform(0, 0.1))
                        left = victim.leave()
                        gone = await watch.until(lambda statistics: not statistics["waiting"])
                        measured.add(Metric("until it has left the queue", "ms"), (gone - left) * MS)
    await server.quiet()
    async with running(turn, server.slots - 1):
        idle = await _idle(turn)
        ask = await turn.ask(N_SHORT, 1)
        async with server.asking(await turn.ask(N_SHORT, turn.load.tokens)) as before:
            await before.read(1)
            async with server.asking(victim_ask) as victim:
                await before.read(turn.load.tokens // 4)
                victim.leave()
            await before.finish()
        free = time.perf_counter()
        successor = await server.complete(ask)
        measured.add(Metric("next request's first token", "ms"), (successor.first - free) * MS)
        measured.add(Metric("next request's first token - idle", "ms"), (successor.first - free - idle) * MS)
    return measured


async def retry(turn: Turn) -> Measured:
    """The client goes away at a random moment of a long prefill and comes back with the same prompt."""
    measured, server, n_prompt = Measured(), turn.server, turn.load.long_prompt
    alone = await first_token(server, await turn.ask(n_prompt, 1))
    ask = await turn.ask(n_prompt, 1, reuse=True)
    share = turn.random.uniform(0.2, 0.8)
    async with server.asking(ask) as victim:
        await trio.sleep(alone * share)
        victim.leave()
    await server.quiet()
    async with watching(server) as watch:
        statistics = await watch.look() or {}
    again = await server.complete(ask)
    measured.add(Metric("its first token", "ms"), again.ttft * MS)
    measured.add(Metric("its first token / an idle server's for a new prompt", "x"), again.ttft / alone)
    measured.add(Metric("missing, by the clock", "tokens"), n_prompt * (1 - share))
    decoded = again.total.decoded_tokens if again.total is not None else None
    if decoded is None:
        measured.note("the server does not say how much of a prompt it found in its cache")
        return measured
    measured.add(Metric("decoded by the retry", "tokens"), decoded)
    if server.slots == 1 and "cached_tokens" in statistics:
        missing = max(n_prompt - statistics["cached_tokens"], 1)  # the last token is always decoded
        measured.add(Metric("missing, by the server's count", "tokens"), missing)
        measured.add(Metric("decoded twice", "tokens"), decoded - missing)
    return measured


async def _idle(turn: Turn) -> float:
    return median([await first_token(turn.server, await turn.ask(N_SHORT, 1)) for _ in range(N_IDLE)])


# ---- many clients ----------------------------------------------------------------------------------------------------


async def storm(turn: Turn) -> Measured:
    """Clients that connect and leave at random points, and what the server still holds when all of them are gone."""
    measured, server = Measured(), turn.server
    pool = [await turn.ask(n, turn.load.endless) for n in (N_SHORT, turn.load.long_prompt // 4, turn.load.long_prompt)]
    alone = await first_token(server, replace(pool[-1], max_tokens=1))
    weather = _Storm(server, turn.random, pool, alone)
    await weather.run(2 * turn.load.crowd, turn.load.crowd)  # threads and pools that stay have then been made
    await server.quiet()
    before = await _held(server, None)
    weather.answers.clear()
    started = time.perf_counter()
    await weather.run(turn.load.storm, turn.load.crowd)
    ended = time.perf_counter()
    await server.quiet()
    measured.add(Metric("connections", ""), turn.load.storm)
    measured.add(Metric("time for all of them", "s"), ended - started)
    measured.add(Metric("until the server is quiet again", "ms"), (time.perf_counter() - ended) * MS)
    if unasked := {answer: n for answer, n in weather.answers.items() if answer != "200"}:
        measured.note("answers other than 200: " + ", ".join(f"{n} x {answer}" for answer, n in unasked.items()))
    await first_token(server, replace(pool[0], max_tokens=1))
    async with watching(server) as watch:
        if (statistics := await watch.look()) is not None:
            measured.add(Metric("slots still taken", ""), statistics["running"])
            measured.add(Metric("generations still open", ""), statistics.get("generations", 0))
    after = await _held(server, before)
    if before is None or after is None:
        measured.note("what the server's process holds cannot be seen from here")
    else:
        measured.add(Metric("threads more than before", ""), after.threads - before.threads)
        measured.add(Metric("descriptors more than before", ""), after.descriptors - before.descriptors)
        measured.add(Metric("memory more than before", "MiB"), after.rss - before.rss)
    return measured


async def _held(server: Server, before: Holdings | None) -> Holdings | None:
    """What the process holds; if that is more than `before`, once it is not or some time has passed."""
    if server.pid is None:
        return None
    held = holdings(server.pid)
    with trio.move_on_after(SETTLE_SECONDS):
        while (
            held is not None
            and before is not None
            and (held.threads > before.threads or held.descriptors > before.descriptors)
        ):
            await trio.sleep(0.1)
            held = holdings(server.pid)
    return held


class _Storm:
    """Rounds of connecting and leaving, several at a time."""

    def __init__(self, server: Server, random: Random, pool: Sequence[Ask], alone: float) -> None:
        self.answers: Counter[str] = Counter()
        """How often each status came, or the other end hung up."""
        self._server = server
        self._random = random
        self._pool = pool
        self._delay = min(alone, MAX_DELAY)
        self._points = (self._half_a_head, self._half_a_body, self._unanswered, self._mid_stream, self._never_reading)

    async def run(self, n_rounds: int, n_at_once: int) -> None:
        left = itertools.repeat(None, n_rounds)

        async def client() -> None:
            for _ in left:
                with trio.move_on_after(PATIENCE):
                    try:
                        await self._random.choice(self._points)(self._random.choice(("fin", "reset")))
                    except Refused as refusal:
                        self.answers[str(refusal.status)] += 1
                    except (CutShort, OSError, trio.BrokenResourceError) as error:
                        self.answers[type(error).__name__] += 1

        async with trio.open_nursery() as nursery:
            for _ in range(n_at_once):
                nursery.start_soon(client)

    async def _half_a_head(self, how: Farewell) -> None:
        await self._partial(how, lambda head, body: head[: self._random.randrange(len(head))])

    async def _half_a_body(self, how: Farewell) -> None:
        await self._partial(how, lambda head, body: head + body[: self._random.randrange(len(body))])

    async def _partial(self, how: Farewell, cut: Callable[[bytes, bytes], bytes]) -> None:
        dialect = self._server.dialect
        with await Connection.open(self._server.address) as connection:
            whole = connection.encode("POST", dialect.path, dialect.body(self._random.choice(self._pool)))
            head, mark, body = whole.partition(b"\r\n\r\n")
            await connection.send(cut(head + mark, body))
            await trio.sleep(self._random.uniform(0, 0.02))
            connection.leave(how)

    async def _unanswered(self, how: Farewell) -> None:
        """Queued or in its prefill, as it happens."""
        async with self._server.asking(self._random.choice(self._pool)) as stream:
            await trio.sleep(self._random.uniform(0, self._delay))
            stream.leave(how)

    async def _mid_stream(self, how: Farewell) -> None:
        async with self._server.asking(self._pool[0]) as stream:
            await stream.read(1 + self._random.randrange(N_VICTIM_PIECES))
            self.answers["200"] += 1
            stream.leave(how)

    async def _never_reading(self, how: Farewell) -> None:
        async with self._server.asking(self._pool[0], receive_buffer=SMALL_BUFFER) as stream:
            await trio.sleep(self._random.uniform(0, self._delay))
            stream.leave(how)


async def survivors(turn: Turn) -> Measured:
    """Greedy streams beside clients that come and leave: does anybody's text change?"""
    measured, server = Measured(), turn.server
    n_survivors = turn.beside(1)
    asks = [await turn.ask(N_SHORT * (1 + index), turn.load.tokens) for index in range(n_survivors)]
    undisturbed = [await server.complete(replace(ask, n_top=2)) for ask in asks]
    pool = [await turn.ask(n, turn.load.endless) for n in (N_SHORT, turn.load.long_prompt // 4, turn.load.long_prompt)]
    alone = await first_token(server, replace(pool[-1], max_tokens=1))
    left = itertools.repeat(None, turn.load.cancellations)
    texts: list[tuple[int, str]] = []
    async with trio.open_nursery() as nursery:
        n_leaving = server.slots - n_survivors + 1  # one of them has to wait
        done = 0

        async def come_and_go() -> None:
            nonlocal done
            for _ in left:
                async with server.asking(turn.random.choice(pool)) as victim:
                    await trio.sleep(turn.random.uniform(0, alone))
                    victim.leave()
            done += 1

        for _ in range(n_leaving):
            nursery.start_soon(come_and_go)
        while done < n_leaving:
            texts += [(index, stream.text) for index, stream in enumerate(await complete_all(server, asks))]
    measured.add(Metric("cancellations", ""), turn.load.cancellations)
    measured.add(Metric("texts compared", ""), len(texts))
    differing = [(index, text) for index, text in texts if text != undisturbed[index].text]
    measured.add(Metric("texts that differ", ""), len(differing))
    for index, text in differing:
        _explain_difference(measured, undisturbed[index], text)
    return measured


def _explain_difference(measured: Measured, undisturbed: Stream, text: str) -> None:
    """Batches of another size compute slightly other logits: what is close to a tie may turn, nothing else."""
    same = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(undisturbed.text, text, strict=False))
    )
    n_bytes = len(undisturbed.text[:same].encode())
    position = 0
    for index, choice in enumerate(undisturbed.choices):
        position += len(choice.piece)
        if position > n_bytes and len(choice.top) >= 2:
            margin = choice.top[0] - choice.top[1]
            measured.add(Metric("margin of the two best tokens at the first difference", "nats"), margin)
            measured.note(f"a text differs from token {index} on, where the two best were {margin:.4f} nats apart")
            return
    measured.note(f"a text differs from character {same} on; the server reports no alternatives there")
