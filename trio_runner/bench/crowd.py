"""Company: a reader that does not read, embeddings behind streams, and far too many clients."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from contextlib import AsyncExitStack, ExitStack
from typing import Final

import trio

from trio_runner.bench.client import Address, Connection, CutShort, Refused, Stream, fetch
from trio_runner.bench.figures import Measured, Metric
from trio_runner.bench.leaving import SMALL_BUFFER
from trio_runner.bench.processes import holdings
from trio_runner.bench.scenarios import MS, N_SHORT, Turn, grown, running
from trio_runner.bench.server import Unavailable
from trio_runner.bench.speed import rate

N_EMBEDDINGS: Final = 10
EMBEDDED_TOKENS: Final = 64
N_ANSWER: Final = 16
HEALTH_SECONDS: Final = 0.01
HEALTH_TIMEOUT: Final = 30.0


async def slow_reader(turn: Turn) -> Measured:
    """Streams beside one more that reads, and beside one more that never does."""
    measured, server = Measured(), turn.server
    n_streams = turn.beside(1)
    rates, growth = {}, 0.0
    for company in turn.random.sample(["alone", "reading", "deaf"], 3):
        async with running(turn, n_streams + (company == "reading")) as streams, AsyncExitStack() as stack:
            if company == "deaf":
                ask = await turn.ask(N_SHORT, turn.load.endless)
                await stack.enter_async_context(server.asking(ask, receive_buffer=SMALL_BUFFER))
            watched = streams[:n_streams]
            await grown(watched, 1)
            before = holdings(server.pid) if server.pid is not None else None
            started = time.perf_counter()
            await grown(watched, 2 * turn.load.tokens)
            ended = time.perf_counter()
            after = holdings(server.pid) if server.pid is not None else None
            rates[company] = rate(watched, started, ended)
            if company == "deaf" and before is not None and after is not None:
                growth = after.rss - before.rss
                measured.add(Metric("server's memory, beside one that never reads", "MiB"), growth)
        await server.quiet()
    measured.add(Metric(f"{n_streams} streams, nobody else", "tokens/s"), rates["alone"])
    measured.add(Metric(f"{n_streams} streams, beside one that reads", "tokens/s"), rates["reading"])
    measured.add(Metric(f"{n_streams} streams, beside one that never reads", "tokens/s"), rates["deaf"])
    measured.add(Metric("beside one that never reads / one that reads", "x"), rates["deaf"] / rates["reading"])
    return measured


async def embeddings(turn: Turn) -> Measured:
    """An embedding on the idle server, and behind running streams."""
    measured = Measured()
    idle = await _embed(turn)
    measured.add(Metric(f"{EMBEDDED_TOKENS} tokens, idle server", "ms"), *idle)
    n_streams = turn.beside(0)
    async with running(turn, n_streams):
        behind = await _embed(turn)
    measured.add(Metric(f"{EMBEDDED_TOKENS} tokens, beside {n_streams} streams", "ms"), *behind)
    return measured


async def _embed(turn: Turn) -> list[float]:
    latencies, dialect = [], turn.server.dialect
    for _ in range(N_EMBEDDINGS):
        text = await turn.prompts.make(EMBEDDED_TOKENS)
        with await Connection.open(turn.server.address) as connection:
            started = time.perf_counter()
            try:
                await fetch(connection, "POST", dialect.embedding_path, dialect.embedding_body(text))
            except Refused as refusal:
                raise Unavailable(f"no embeddings: {refusal}") from refusal
            latencies.append((time.perf_counter() - started) * MS)
    return latencies


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
            nursery.start_soon(trio.to_thread.run_sync, poll.run, over)
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
    measured.add(Metric("/health unanswered", ""), poll.n_failed)
    for result, n in results.items():
        measured.note(f"{n} x {result}")
    return measured


class _HealthPoll:
    """Asks for /health over new connections, as whoever looks after a server does.

    From a thread of its own, so that our clients do not delay what is timed by more than the interpreter's switch.
    """

    def __init__(self, address: Address) -> None:
        self.latencies: list[float] = []
        """Milliseconds."""
        self.n_failed = 0
        self._address = address

    def run(self, over: threading.Event) -> None:
        while not over.is_set():
            connection = http.client.HTTPConnection(self._address.host, self._address.port, timeout=HEALTH_TIMEOUT)
            started = time.perf_counter()
            try:
                connection.request("GET", "/health")
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                self.n_failed += 1
            finally:
                connection.close()
            self.latencies.append((time.perf_counter() - started) * MS)
            over.wait(HEALTH_SECONDS)
