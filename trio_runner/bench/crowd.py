"""Scenarios with others beside: a client that does not read, embeddings beside streams, too many requests at once."""

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
"""Embeddings of one round, on the idle server and beside streams."""
EMBEDDED_TOKENS: Final = 64
"""Tokens of an embedded text."""
N_ANSWER: Final = 16
"""Tokens of each answer in the overload."""
HEALTH_SECONDS: Final = 0.02
"""Seconds between two requests for /health, whether the first one has been answered or not."""
HEALTH_TIMEOUT: Final = 30.0
"""Seconds after which an unanswered request for /health counts as failed."""


# ---- a client that does not read -------------------------------------------------------------------------------------


async def slow_reader(turn: Turn) -> Measured:
    """Streams alone, beside one more stream that is read, and beside one more that is never read."""
    measured, server = Measured(), turn.server
    n_streams = turn.beside(1)
    companies: dict[str, Callable[[], AbstractAsyncContextManager[object]]] = {
        "alone": nullcontext,
        "reading": partial(running, turn, 1),
        "deaf": partial(_deaf, turn, measured),
    }
    stretches: dict[str, list[tuple[float, float]]] = {company: [] for company in companies}
    order = turn.random.sample(list(companies), 3)
    for company in order + order[::-1]:  # so that a machine that becomes slower slows all three alike
        requests = [await turn.request(N_SHORT, turn.load.stretch) for _ in range(n_streams)]
        async with companies[company]():
            stretches[company].append(together(await complete_all(server, requests)))
        await server.quiet()
    rates = {
        company: sum(n_tokens for n_tokens, _ in pooled) / sum(seconds for _, seconds in pooled)
        for company, pooled in stretches.items()
    }
    measured.add(Metric(f"{n_streams} streams, alone", "tokens/s"), rates["alone"])
    measured.add(Metric(f"{n_streams} streams, beside one that reads", "tokens/s"), rates["reading"])
    measured.add(Metric(f"{n_streams} streams, beside one that never reads", "tokens/s"), rates["deaf"])
    measured.add(Metric("beside one that never reads / alone", "x"), rates["deaf"] / rates["alone"])
    measured.add(Metric("beside one that never reads / one that reads", "x"), rates["deaf"] / rates["reading"])
    return measured


@asynccontextmanager
async def _deaf(turn: Turn, measured: Measured) -> AsyncIterator[None]:
    """A client that never reads. When the block begins, the server has noticed it, if it does so at all."""
    server, load = turn.server, turn.load
    before = None if server.pid is None else holdings(server.pid)
    request = await turn.request(N_SHORT, load.unread + 2 * load.stretch)
    async with server.requesting(request, receive_buffer=SMALL_BUFFER), watching(server) as watch:
        tells, paused = await watch.look() is not None, False
        async with trio.open_nursery() as nursery:

            async def accompany() -> None:  # while this one reads its tokens, the other is sent as many
                await server.complete(await turn.request(N_SHORT, load.unread))
                nursery.cancel_scope.cancel()

            nursery.start_soon(accompany)
            if tells:
                await watch.until(lambda statistics: statistics["paused"] > 0, math.inf)
                paused = True
                nursery.cancel_scope.cancel()
        yield
        if not tells:
            measured.note("the server does not tell whether it pauses a client that never reads")
        elif not paused:
            measured.note(f"the client that never reads was not paused within {load.unread:,} tokens")
        elif not (await watch.look() or {}).get("paused"):
            measured.note("the client that never reads was gone at the end")
        after = None if server.pid is None else holdings(server.pid)
        if before is not None and after is not None:
            measured.add(Metric("memory more than before it came", "MiB"), after.memory - before.memory)


# ---- embeddings ------------------------------------------------------------------------------------------------------


async def embeddings(turn: Turn) -> Measured:
    """An embedding on the idle server, and beside running streams."""
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
        busy = await _embed(turn, streams)
    measured.add(Metric(f"{EMBEDDED_TOKENS} tokens, beside {n_streams} streams", "ms"), *busy)
    return measured


async def _embed(turn: Turn, beside: Sequence[Stream] = ()) -> list[float]:
    """Milliseconds of each of `N_EMBEDDINGS` embeddings, or of fewer if one of the streams `beside` them ends."""
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


# ---- too many requests -----------------------------------------------------------------------------------------------


async def overload(turn: Turn) -> Measured:
    """Far more requests at once than slots: whether each is answered, and how fast /health answers meanwhile."""
    measured, server = Measured(), turn.server
    requests = [await turn.request(N_SHORT, N_ANSWER) for _ in range(turn.load.clients)]
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
        for request in requests:  # all connect before the first one sends, so that the requests come at once
            connection = connections.enter_context(await Connection.open(server.address))
            streams.append(Stream(connection, server.dialect, request))
        over = threading.Event()
        async with trio.open_nursery() as nursery:
            poll = HealthPoll(server.address)
            nursery.start_soon(partial(trio.to_thread.run_sync, trio.run, poll.run, over, abandon_on_cancel=True))
            started = time.perf_counter()
            try:
                async with trio.open_nursery() as clients:
                    for stream in streams:
                        clients.start_soon(client, stream)
            finally:
                over.set()
            ended = time.perf_counter()
    measured.add(Metric("requests at once", ""), len(requests))
    measured.add(Metric("answered", ""), len(first))
    measured.add(Metric("503 with Retry-After", ""), results.pop("503", 0))
    measured.add(Metric("anything else", ""), sum(results.values()))
    measured.add(Metric("until all were answered", "s"), ended - started)
    measured.add(Metric("first token of those answered", "ms"), *first)
    measured.add(Metric("/health meanwhile", "ms"), *poll.latencies)
    measured.add(Metric("/health failed", ""), poll.n_failed)
    for result, n in results.items():
        measured.note(f"{n} x {result}")
    return measured


class HealthPoll:
    """Requests /health at fixed times over new connections, as a supervisor does, also while earlier requests wait.

    So a server that hangs for a while is late for every request of that time. It runs in a thread of its own, so that
    the other clients delay what it times only by the interpreter's switch interval.
    """

    def __init__(self, address: Address) -> None:
        self.latencies: list[float] = []
        """Milliseconds of each answer, from the moment at which its request was due."""
        self.n_failed = 0
        """Requests that failed, or had no answer in time."""
        self._address = address

    async def run(self, over: threading.Event) -> None:
        """Send requests until `over` is set, then wait for their answers."""
        started = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in itertools.count():
                due = started + number * HEALTH_SECONDS
                await trio.sleep(max(due - time.perf_counter(), 0))
                if over.is_set():
                    break
                nursery.start_soon(self._request, due)

    async def _request(self, due: float) -> None:
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
