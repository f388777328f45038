"""The rounds: their order, and what a failure costs."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

import pytest

from tests.bench.fake_server import fake_server
from tests.bench.loads import LOAD
from trio_runner.bench import rounds
from trio_runner.bench.dialects import Request
from trio_runner.bench.figures import Measured, Metric
from trio_runner.bench.rounds import SCENARIOS, Outcome, run_rounds
from trio_runner.bench.scenarios import Turn
from trio_runner.bench.server import Unavailable

COUNT = Metric("count", "")


async def test_the_servers_take_turns_in_going_first() -> None:
    said: list[str] = []
    async with fake_server("runner") as (_, one), fake_server("llama") as (_, other):
        await run_rounds([one, other], ["ttft"], repeat=3, seed=1, load=LOAD, progress=said.append)
    order = ["one" if line.endswith(one.url) else "other" for line in said if line.startswith("ttft")]
    assert order == ["one", "other", "other", "one", "one", "other"]


async def test_both_servers_get_the_same_prompts() -> None:
    async with fake_server("runner") as (first, one), fake_server("llama") as (second, other):
        await run_rounds([one, other], ["ttft"], repeat=2, seed=1, load=LOAD)
    prompts = [fields["prompt"] for fields in first.requests]
    assert prompts == [fields["prompt"] for fields in second.requests]
    assert len(set(prompts)) == len(prompts) - 3  # the warm ones


async def test_a_server_that_is_gone_is_noted() -> None:
    async with fake_server("runner") as (_, server):
        pass
    [outcome] = await run_rounds([server], ["ttft"], repeat=2, seed=1, load=LOAD)
    assert len(outcome.rounds) == 2
    assert [note.split(":")[:2] for note in outcome.notes] == [
        [f"round {number} failed", " ConnectionRefusedError"] for number in (1, 2)
    ]


async def test_streams_that_end_too_early_cost_a_round() -> None:
    async with fake_server("runner") as (_, server):
        load = dataclasses.replace(LOAD, endless=LOAD.tokens)
        [outcome] = await run_rounds([server], ["gaps"], repeat=2, seed=1, load=load)
    assert outcome.unavailable is None
    assert outcome.notes == [f"round {number} failed: CutShort: a stream ended too early" for number in (1, 2)]


async def test_a_round_that_fails_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    results: Iterator[Measured | Exception] = iter(
        [Measured({COUNT: [1]}), LookupError("oh"), Measured({COUNT: [3]}), Unavailable("no more")]
    )

    async def scenario(turn: Turn) -> Measured:
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    kept: list[list[tuple[str, int]]] = []

    def keep(outcomes: Sequence[Outcome]) -> None:
        kept.append([(outcome.scenario, len(outcome.rounds)) for outcome in outcomes])

    monkeypatch.setitem(SCENARIOS, "throughput", scenario)
    async with fake_server("runner") as (_, server):
        names = ["throughput", "ttft"]
        odd, ttft = await run_rounds([server], names, repeat=5, seed=1, load=LOAD, keep=keep)
    assert [measured.samples for measured in odd.rounds] == [{COUNT: [1]}, {}, {COUNT: [3]}]
    assert odd.notes == ["round 2 failed: LookupError: oh"]
    assert odd.unavailable == "no more"
    assert len(ttft.rounds) == 5
    assert kept[:5] == [[("throughput", n)] for n in (1, 2, 3, 3)] + [[("throughput", 3), ("ttft", 1)]]
    assert len(kept) == 9


async def test_a_server_that_is_not_measured_must_be_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_runner.bench.server.QUIET_SECONDS", 0.3)
    endless = Request(prompt="a", max_tokens=10**6)
    async with (
        fake_server("runner") as (_, one),
        fake_server("llama") as (_, other),
        other.requesting(endless) as stream,
    ):
        await stream.read(1)
        ours, theirs = await run_rounds([one, other], ["ttft"], repeat=1, seed=1, load=LOAD)
    assert ours.rounds[0].samples
    assert ours.notes == [f"round 1 was disturbed: {other.url} was still busy after 0.3 s"]
    assert theirs.notes == ["round 1 failed: Overdue: still busy after 0.3 s"]


async def test_other_work_of_the_machine_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(step=1000.0)
    monkeypatch.setattr(rounds, "foreign_seconds", lambda pids: next(seconds))
    async with fake_server("runner") as (_, server):
        [outcome] = await run_rounds([server], ["ttft"], repeat=1, seed=1, load=LOAD)
    [note] = outcome.notes
    assert re.fullmatch(r"round 1 was disturbed: other programs used \d+\.\d of \d+ cores", note)
