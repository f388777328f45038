"""Company: a reader that does not read, embeddings behind streams, and far too many clients."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, nullcontext
from functools import partial
from typing import Final

import trio

from trio_runner.bench.client import Address, Connection, CutShort, Refused, Stream, fetch
from trio_runner.bench.figures import Measured, Metric
from trio_runner.bench.leaving import SMALL_BUFFER
from trio_runner.bench.processes import holdings
from trio_runner.bench.scenarios import MS, N_SHORT, Turn, complete_all, running
from trio_runner.bench.server import Unavailable, watching
from trio_runner.bench.speed import together

N_EMBEDDINGS: Final = 10
EMBEDDED_TOKENS: Final = 64
N_ANSWER: Final = 16
HEALTH_SECONDS: Final = 0.02
"""From one look at /health to the next, whatever becomes of the one before."""
HEALTH_TIMEOUT: Final = 30.0


# ---- a reader that does not read -------------------------------------------------------------------------------------


async def slow_reader(turn: Turn) -> Measured:
    """Streams beside nobody else, beside one more that reads, and beside one more that never does."""
    measured, server = Measured(), turn.server
    n_streams = turn.beside(1)
    companies: dict[str, Callable[[], AbstractAsyncContextManager[object]]] = {
        "alone": nullcontext,
        "reading": partial(running, turn, 1),
        "deaf": partial(_deaf, turn, measured),
    }
    stretches: dict[str, list[tuple[float, float]]] = {company: [] for company in companies}
    order = turn.random.sample(list(companies), 3)
    for company in order + order[::-1]:  # so that a machine that gets slower does so for all three alike
        asks = [await turn.ask(N_SHORT, turn.load.stretch) for _ in range(n_streams)]
        async with companies[company]():
            stretches[company].append(together(await complete_all(server, asks)))
        await server.quiet()
    rates = {
        company: sum(n_tokens for n_tokens, _ in pooled) / sum(seconds for _, seconds in pooled)
        for company, pooled in stretches.items()
    }
    measured.add(Metric(f"{n_streams} streams, nobody else", "tokens/s"), rates["alone"])
    measured.add(Metric(f"{n_streams} streams, beside one that reads", "tokens/s"), rates["reading"])
    measured.add(Metric(f"{n_streams} streams, beside one that never reads", "tokens/s"), rates["deaf"])
    measured.add(Metric("beside one that never reads / nobody else", "x"), rates["deaf"] / rates["alone"])
    measured.add(Metric("beside one that never reads / one that reads", "x"), rates["deaf"] / rates["reading"])
    return measured


@asynccontextmanager
async def _deaf(turn: Turn, measured: Measured) -> AsyncIterator[None]:
    """A client that never reads, and that the server has felt when the block begins."""
    server, load = turn.server, turn.load
    before = None if server.pid is None else holdings(server.pid)
    ask = await turn.ask(N_SHORT, load.unread + 2 * load.stretch)
    async with server.asking(ask, receive_buffer=SMALL_BUFFER), watching(server) as watch:
        tells, paused = await watch.look() is not None, False
        async with trio.open_nursery() as nursery:

            async def accompany() -> None:  # for as many tokens as this one reads, the other was sent
                await server.complete(await turn.ask(N_SHORT, load.unread))
                nursery.cancel_scope.cancel()

            nursery.start_soon(accompany)
            if tells:
                await watch.until(lambda statistics: statistics["paused"] > 0, math.inf)
                paused = True
                nursery.cancel_scope.cancel()
        yield
        if not tells:
            measured.note("the server does not say whether it pauses one that never reads")
        elif not paused:
            measured.note(f"one that never reads was not paused within {load.unread:,} tokens")
        elif not (await watch.look() or {}).get("paused"):
            measured.note("one that never reads was no longer there at the end")
        after = None if server.pid is None else holdings(server.pid)
        if before is not None and after is not None:
            measured.add(Metric("memory more than before it came", "MiB"), after.memory - before.memory)


# ---- embeddings ------------------------------------------------------------------------------------------------------


async def embeddings(turn: Turn) -> Measured:
    """An embedding on the idle server, and behind running streams."""
    measured = Measured()
    try:
        idle = await _embed(turn)
    except Refused as refusal:
        if refusal.status == 503:
            raise
        raise Unavailable(f"no embeddings: {refusal}") from refusal
    measured.add(Metric(f"{EMBEDDED_TOKENS} tokens, idle server", "ms"), *idle)
    n_streams = turn.beside(0)
    async with running(turn, n_streams) as streams:
        behind = await _embed(turn, streams)
    measured.add(Metric(f"{EMBEDDED_TOKENS} tokens, beside {n_streams} streams", "ms"), *behind)
    return measured


async def _embed(turn: Turn, beside: Sequence[Stream] = ()) -> list[float]:
    """Milliseconds of each of some embeddings; of fewer, if streams that they are `beside` end."""
    latencies, dialect = [], turn.server.dialect
    for _ in range(N_EMBEDDINGS):
        text = await turn.prompts.make(EMBEDDED_TOKENS)
        with await Connection.open(turn.server.address) as connection:
            started = time.perf_counter()
            await fetch(connection, "POST", dialect.embedding_path, dialect.embedding_body(text))
            latencies.append((time.perf_counter() - started) * MS)
        if any(stream.total is not None for stream in beside):
            break
    return latencies


# ---- too many --------------------------------------------------------------------------------------------------------


async def overload(turn: Turn) -> Measured:
    """Far more requests at once than slots: is everyone told something, and does /health still answer?"""
    measured, server = Measured(), turn.server
    asks = [await turn.ask(N_SHORT, N_ANSWER) for _ in range(turn.load.clients)]
    results: Counter[str] = Counter()
    first: list[float] = []

    async def client(stream: Stream) -> None:
        try:
            await stream.send()
            await stream.finish()
            first.append(stream.ttft * MS)
        except Refused as refusal:
            told = refusal.status == 503 and refusal.retry_after is not None
            results["503" if told else f"{refusal.status} without Retry-After"] += 1
        except (CutShort, OSError, trio.BrokenResourceError) as error:
            results[f"{type(error).__name__}: {error}"] += 1

    with ExitStack() as connections:
        streams = []
        for ask in asks:  # all are connected before the first one asks, for the requests to come at once
            connection = connections.enter_context(await Connection.open(server.address))
            streams.append(Stream(connection, server.dialect, ask))
        over = threading.Event()
        async with trio.open_nursery() as nursery:
            poll = _HealthPoll(server.address)
            look = partial(trio.to_thread.run_sync, trio.run, poll.run, over, abandon_on_cancel=True)
            nursery.start_soon(look)
            started = time.perf_counter()
            try:
                async with trio.open_nursery() as clients:
                    for stream in streams:
                        clients.start_soon(client, stream)
            finally:
                over.set()
            ended = time.perf_counter()
    measured.add(Metric("requests at once", ""), len(asks))
    measured.add(Metric("answered", ""), len(first))
    measured.add(Metric("503 with Retry-After", ""), results.pop("503", 0))
    measured.add(Metric("anything else", ""), sum(results.values()))
    measured.add(Metric("until all were told", "s"), ended - started)
    measured.add(Metric("first token of those answered", "ms"), *first)
    measured.add(Metric("/health meanwhile", "ms"), *poll.latencies)
    measured.add(Metric("/health failed", ""), poll.n_failed)
    for result, n in results.items():
        measured.note(f"{n} x {result}")
    return measured


class _HealthPoll:
    """Asks for /health over new connections, as whoever looks after a server does: by the clock, also while earlier
    questions are unanswered. A server that does not answer for a while is late for all that came in that while.

    From a thread of its own, so that our clients do not delay what is timed by more than the interpreter's switch.
    """

    def __init__(self, address: Address) -> None:
        self.latencies: list[float] = []
        """Milliseconds from the moment at which the question was due."""
        self.n_failed = 0
        self._address = address

    async def run(self, over: threading.Event) -> None:
        started = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in itertools.count():
                due = started + number * HEALTH_SECONDS
                await trio.sleep(max(due - time.perf_counter(), 0))
                if over.is_set():
                    break
                nursery.start_soon(self._ask, due)

    async def _ask(self, due: float) -> None:
        with trio.move_on_after(HEALTH_TIMEOUT) as timeout:
            try:
                with await Connection.open(self._address) as connection:
                    await fetch(connection, "GET", "/health")
            except (Refused, CutShort, OSError, ValueError):
                self.n_failed += 1
                return
        if timeout.cancelled_caught:
            self.n_failed += 1
        else:
            self.latencies.append((time.perf_counter() - due) * MS)
