"""The rounds: every scenario on every server, in turn.

In one round all servers meet the same scenario one after the other, and the next round begins with another one of them,
so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

import trio

from trio_runner.bench import crowd, leaving, speed
from trio_runner.bench.client import CutShort, Refused
from trio_runner.bench.figures import Measured
from trio_runner.bench.prompts import Prompts
from trio_runner.bench.scenarios import Load, Scenario, Turn
from trio_runner.bench.server import Server, Unavailable

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
    "survivors": leaving.survivors,
}

ROUND_SECONDS: Final = 3600.0
"""After which a round is given up: much longer than any should take."""
SWITCH_SECONDS: Final = 0.001
"""After which a thread that times something gets the interpreter."""


@dataclass(slots=True)
class Outcome:
    """All rounds of one scenario on one server; a round that failed is empty, and `notes` say why."""

    scenario: str
    server: Server
    rounds: list[Measured] = field(default_factory=list)
    unavailable: str | None = None
    """Why there is nothing to measure."""

    @property
    def notes(self) -> list[str]:
        return list(dict.fromkeys(note for measured in self.rounds for note in measured.notes))


async def run_rounds(
    servers: Sequence[Server],
    names: Sequence[str],
    *,
    repeat: int,
    seed: int,
    load: Load,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """The outcomes by scenario, and by server within it. What a server does wrong is in its outcome, never raised."""
    for server in servers:
        progress(f"warming up {server.url}")
        await _round(_warm_up, _turn(server, load, Random(seed)))
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # what is here stays, and need not be looked through while a stream is timed
    outcomes = []
    for name in names:
        of_scenario = [Outcome(name, server) for server in servers]
        for number in range(repeat):
            first = number % len(servers)
            for outcome in of_scenario[first:] + of_scenario[:first]:
                if outcome.unavailable is None:
                    progress(f"{name}, round {number + 1} of {repeat}: {outcome.server.url}")
                    await _measure(outcome, SCENARIOS[name], Random(f"{seed}/{name}/{number}"), load)
        outcomes += of_scenario
    return outcomes


async def _measure(outcome: Outcome, scenario: Scenario, random: Random, load: Load) -> None:
    measured = await _round(scenario, _turn(outcome.server, load, random))
    if isinstance(measured, Unavailable):
        outcome.unavailable = str(measured)
    elif isinstance(measured, Exception):
        failed = Measured()
        failed.note(f"a round failed: {type(measured).__name__}: {measured}")
        outcome.rounds.append(failed)
    else:
        outcome.rounds.append(measured)


def _turn(server: Server, load: Load, random: Random) -> Turn:
    return Turn(server, load, random, Prompts(random, server.count_tokens if server.tokenizes else None))


async def _round(scenario: Scenario, turn: Turn) -> Measured | Exception:
    """What was measured, or the first thing that went wrong."""
    failures: list[Exception] = []
    try:
        with trio.fail_after(ROUND_SECONDS):
            await turn.server.quiet()
            return await scenario(turn)
    except* (
        Unavailable,
        Refused,
        CutShort,
        OSError,
        trio.BrokenResourceError,
        trio.TooSlowError,
        ValueError,
        ZeroDivisionError,
    ) as group:
        failures += _leaves(group)
    return next((error for error in failures if isinstance(error, Unavailable)), failures[0])


def _leaves(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    found: list[Exception] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def _warm_up(turn: Turn) -> Measured:
    """The first long prompt and the first tokens of a server meet memory that nobody has touched yet."""
    await speed.ttft(turn)
    return Measured()
