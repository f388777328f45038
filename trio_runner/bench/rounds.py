"""The rounds: every scenario on every server, in turn.

In one round, all servers are measured in the same scenario, one after the other. The next round begins with another
server, so that other work of the machine disturbs all of them alike.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final, TypeVar

import trio

from trio_runner.bench import crowd, leaving, speed, survivors
from trio_runner.bench.figures import Measured
from trio_runner.bench.processes import foreign_seconds
from trio_runner.bench.prompts import Prompts
from trio_runner.bench.scenarios import Load, Scenario, Turn
from trio_runner.bench.server import Overdue, Server, Unavailable

T = TypeVar("T")

logger = logging.getLogger(__name__)

SCENARIOS: Final[dict[str, Scenario]] = {
    "throughput": speed.throughput,
    "ttft": speed.ttft,
    "shared-prefix": speed.shared_prefix,
    "gaps": speed.gaps,
    "cancel-prefill": leaving.cancel_prefill,
    "cancel-decode": leaving.cancel_decode,
    "cancel-unread": leaving.cancel_unread,
    "cancel-queued": leaving.cancel_queued,
    "retry": leaving.retry,
    "storm": leaving.storm,
    "slow-reader": crowd.slow_reader,
    "embeddings": crowd.embeddings,
    "overload": crowd.overload,
    "survivors": survivors.survivors,
}

ROUND_SECONDS: Final = 3600.0
"""Seconds after which a round is given up. No round should take nearly as long."""
DISTURBING_CORES: Final = 0.15
"""Cores that other programs may use without a remark in the report."""
SWITCH_SECONDS: Final = 0.001
"""Seconds after which a thread that times something gets the interpreter; Python's default is 5 ms."""


@dataclass(slots=True)
class Outcome:
    """All rounds of one scenario on one server. A round that failed is empty, and `notes` say why."""

    scenario: str
    server: Server
    rounds: list[Measured] = field(default_factory=list)
    unavailable: str | None = None
    """Why the server cannot do this scenario; None if it can."""

    @property
    def notes(self) -> list[str]:
        """The remarks of all rounds, each once."""
        return list(dict.fromkeys(note for measured in self.rounds for note in measured.notes))


async def run_rounds(
    servers: Sequence[Server],
    names: Sequence[str],
    *,
    repeat: int,
    seed: int,
    load: Load,
    progress: Callable[[str], None] = lambda _: None,
    keep: Callable[[Sequence[Outcome]], None] = lambda _: None,
) -> list[Outcome]:
    """Measure the scenarios `names` on all servers, `repeat` times. Returns the outcomes by scenario, then by server.

    A failure is noted in its outcome and never raised. `keep` is called with the outcomes so far after every turn, so
    that they can be saved before a later one fails.
    """
    for server in servers:
        progress(f"warming up {server.dialect.name} at {server.url}")
        await _round(_warm_up, _turn(server, load, Random(seed)))
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # nothing of it is freed; so no collection looks through it while a stream is timed
    outcomes: list[Outcome] = []
    for name in names:
        of_scenario = [Outcome(name, server) for server in servers]
        outcomes += of_scenario
        for number in range(repeat):
            first = number % len(servers)
            for outcome in of_scenario[first:] + of_scenario[:first]:
                if outcome.unavailable is None:
                    progress(
                        f"{name}, round {number + 1} of {repeat}: {outcome.server.dialect.name} at {outcome.server.url}"
                    )
                    turn = _turn(outcome.server, load, Random(f"{seed}/{name}/{number}"))
                    await _measure(outcome, number + 1, turn, servers)
                    keep(outcomes)
    return outcomes


async def _measure(outcome: Outcome, number: int, turn: Turn, servers: Sequence[Server]) -> None:
    disturbances = []
    for server in servers:
        # A server that still works for clients that have disconnected would slow down the next server.
        if server is not turn.server and isinstance(busy := await _attempt(server.quiet), Overdue):
            disturbances.append(f"{server.url} was {busy}")
    pids = [os.getpid(), *(server.pid for server in servers)]
    before, started = foreign_seconds(pids), time.perf_counter()
    measured = await _round(SCENARIOS[outcome.scenario], turn)
    after, ended = foreign_seconds(pids), time.perf_counter()
    if isinstance(measured, Unavailable):
        outcome.unavailable = str(measured)
        return
    if isinstance(measured, Exception):
        failure, measured = measured, Measured()
        measured.note(f"round {number} failed: {type(failure).__name__}: {failure}")
    n_cores = 0.0 if before is None or after is None else (after - before) / (ended - started)
    if n_cores > DISTURBING_CORES:
        disturbances.append(f"other programs used {n_cores:.1f} of {os.cpu_count()} cores")
    for disturbance in disturbances:
        measured.note(f"round {number} was disturbed: {disturbance}")
    outcome.rounds.append(measured)


def _turn(server: Server, load: Load, random: Random) -> Turn:
    return Turn(server, load, random, Prompts(random, server.count_tokens if server.tokenizes else None))


async def _round(scenario: Scenario, turn: Turn) -> Measured | Exception:
    async def measure() -> Measured:
        await turn.server.quiet()
        return await scenario(turn)

    return await _attempt(measure)


async def _attempt(action: Callable[[], Awaitable[T]]) -> T | Exception:
    """Return what `action` returns, or the first exception that it raises."""
    failures: list[Exception] = []
    try:
        with trio.fail_after(ROUND_SECONDS):
            return await action()
    except* Exception as group:  # even a bug of ours costs this round only
        logger.info("a round failed", exc_info=group)
        failures += _leaves(group)
    return next((error for error in failures if isinstance(error, Unavailable)), failures[0])


def _leaves(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    found: list[Exception] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def _warm_up(turn: Turn) -> Measured:
    """Run once without measuring: the first prompt and tokens of a server touch memory for the first time."""
    await speed.ttft(turn)
    return Measured()
