"""Company: a reader that does not read, embeddings behind streams, and far too many clients."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Final

import trio

from trio_runner.bench.client import Connection, CutShort, Refused, fetch
from trio_runner.bench.dialects import Ask
from trio_runner.bench.figures import Measured, Metric
from trio_runner.bench.leaving import SMALL_BUFFER
from trio_runner.bench.processes import holdings
from trio_runner.bench.scenarios import MS, N_SHORT, Turn, grown, running
from trio_runner.bench.server import Server, Unavailable
from trio_runner.bench.speed import rate

N_EMBEDDINGS: Final = 10
EMBEDDED_TOKENS: Final = 64
N_ANSWER: Final = 16
HEALTH_SECONDS: Final = 0.01


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
    health: list[float] = []
    first: list[float] = []

    async def client(ask: Ask) -> None:
        try:
            stream = await server.complete(ask)
        except Refused as refusal:
            told = refusal.status == 503 and refusal.retry_after is not None
            results["503" if told else f"{refusal.status} without Retry-After"] += 1
        except (CutShort, OSError, trio.BrokenResourceError) as error:
            results[f"{type(error).__name__}: {error}"] += 1
        else:
            results["answered"] += 1
            first.append(stream.ttft * MS)

    async with trio.open_nursery() as polling:
        polling.start_soon(_poll_health, server, health, results)
        started = time.perf_counter()
        async with trio.open_nursery() as clients:
            for ask in asks:
                clients.start_soon(client, ask)
        ended = time.perf_counter()
        polling.cancel_scope.cancel()
    measured.add(Metric("requests at once", ""), len(asks))
    measured.add(Metric("answered", ""), results.pop("answered", 0))
    measured.add(Metric("503 with Retry-After", ""), results.pop("503", 0))
    measured.add(Metric("anything else", ""), sum(results.values()))
    measured.add(Metric("until all were told", "s"), ended - started)
    measured.add(Metric("first token of those answered", "ms"), *first)
    measured.add(Metric("/health meanwhile", "ms"), *health)
    for result, n in results.items():
        measured.note(f"{n} x {result}")
    return measured


async def _poll_health(server: Server, latencies: list[float], results: Counter[str]) -> None:
    """Over new connections, as whoever looks after a server does."""
    while True:
        started = time.perf_counter()
        try:
            await server.get("/health")
        except (Refused, CutShort, OSError, ValueError) as error:
            results[f"/health: {error}"] += 1
        finally:  # one that is still waiting when all is over was slow as well
            latencies.append((time.perf_counter() - started) * MS)
        await trio.sleep(HEALTH_SECONDS)
