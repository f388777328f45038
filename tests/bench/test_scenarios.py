"""Every scenario on every kind of server, and whether it notices what it is for."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio
from trio.testing import MockClock

from tests.bench.fake_server import DEADLINE, fake_server, listening
from tests.bench.loads import LOAD
from tests.engine.toys import Toy
from tests.server.client import serving
from trio_runner.bench import crowd, leaving, survivors
from trio_runner.bench.client import Address
from trio_runner.bench.dialects import DIALECTS, DialectName, Runner
from trio_runner.bench.figures import Measured, Metric
from trio_runner.bench.processes import Holdings
from trio_runner.bench.prompts import Prompts
from trio_runner.bench.rounds import SCENARIOS, run_rounds
from trio_runner.bench.scenarios import Load, Turn
from trio_runner.bench.server import Server, meet

ALL = {
    "throughput": ["1 stream", "4 streams"],
    "ttft": ["cold, 16 tokens", "cold, 200 tokens", "warm, 200 tokens"],
    "shared-prefix": ["4 clients, 120 of 152 tokens shared", "4 streams over it", "prompt tokens decoded, in all"],
    "gaps": [
        "3 streams, undisturbed",
        "3 streams, beside a prompt of 200",
        "p99 beside it / undisturbed median",
        "the prompt's first token, idle server",
        "the prompt's first token, beside 3 streams",
        "the prompt's first token, beside / idle",
    ],
    "cancel-prefill": ["next request's first token", "next request's first token - idle"],
    "cancel-decode": ["next request's first token", "next request's first token - idle"],
    "cancel-unread": ["next request's first token", "next request's first token - idle"],
    "cancel-queued": ["next request's first token", "next request's first token - idle"],
    "retry": [
        "its first token",
        "its first token / an idle server's for a new prompt",
        "missing, by the clock",
        "decoded by the retry",
    ],
    "storm": ["connections", "time for all of them", "until the server is quiet again", "first token afterwards"],
    "slow-reader": [
        "3 streams, alone",
        "3 streams, beside one that reads",
        "3 streams, beside one that never reads",
        "beside one that never reads / alone",
        "beside one that never reads / one that reads",
    ],
    "embeddings": ["64 tokens, idle server", "64 tokens, beside 3 streams"],
    "overload": [
        "requests at once",
        "answered",
        "503 with Retry-After",
        "anything else",
        "until all were answered",
        "first token of those answered",
        "/health meanwhile",
        "/health failed",
    ],
    "survivors": [
        "cancellations",
        "of those, queued",
        "of those, in its prefill",
        "of those, decoding",
        "streams compared",
        "tokens compared",
        "identical in every bit",
        "not identical",
        "of those, with another text",
    ],
}
"""The metrics of each scenario on every server."""

TOLD: dict[tuple[str, DialectName], list[str]] = {
    ("cancel-prefill", "runner"): ["until its slot is free"],
    ("cancel-decode", "runner"): ["until its slot is free"],
    ("cancel-unread", "runner"): ["until its slot is free"],
    ("cancel-queued", "runner"): ["until it has left the queue"],
    ("storm", "runner"): ["slots still taken", "requests still waiting", "generations still open"],
    ("storm", "llama"): ["slots still taken"],
}
"""The metrics that only servers with statistics have."""


async def measure(name: str, server: Server, load: Load = LOAD) -> dict[str, list[float]]:
    prompts = Prompts(Random(1), server.count_tokens if server.tokenizes else None)
    measured: Measured = await SCENARIOS[name](Turn(server, load, Random(1), prompts))
    return {metric.name: samples for metric, samples in measured.samples.items()}


@pytest.mark.parametrize("name", list(SCENARIOS))
@pytest.mark.parametrize("dialect", list(DIALECTS))
async def test_every_scenario_on_every_server(name: str, dialect: DialectName) -> None:
    async with fake_server(dialect) as (_, server):
        [outcome] = await run_rounds([server], [name], repeat=1, seed=1, load=LOAD)
    if (name, dialect) == ("embeddings", "llama"):
        assert outcome.unavailable is not None
        assert outcome.unavailable.startswith("no embeddings: 501")
        return
    assert outcome.unavailable is None
    expected = set(ALL[name]) | set(TOLD.get((name, dialect), []))
    [measured] = outcome.rounds
    assert {metric.name for metric in measured.samples} == expected, measured.notes
    assert all(measured.samples.values())


async def test_throughput_is_the_servers_pace() -> None:
    async with fake_server("runner") as (fake, server):
        fake.step = 0.01
        measured = await measure("throughput", server)
    assert 50 < measured["1 stream"][0] < 101
    assert 200 < measured["4 streams"][0] < 404


async def test_a_warm_prompt_is_quicker() -> None:
    async with fake_server("llama") as (fake, server):
        fake.prefill_step = 0.001
        measured = await measure("ttft", server)
    assert measured["cold, 200 tokens"][0] > 200
    assert measured["warm, 200 tokens"][0] < 100


async def test_a_shared_prefix_is_decoded_once() -> None:
    async with fake_server("runner", slots=1) as (_, server):
        measured = await measure("shared-prefix", server)
    assert measured["prompt tokens decoded, in all"] == [152 + 3 * 32]


@pytest.mark.parametrize("name", ["cancel-prefill", "cancel-decode", "cancel-unread", "cancel-queued"])
async def test_a_client_that_disconnects_is_noticed_at_once(name: str) -> None:
    async with fake_server("runner", slots=2) as (fake, server):
        fake.prefill_step = 0.0002
        measured = await measure(name, server)
    [latencies] = [samples for metric, samples in measured.items() if metric.startswith("until it")]
    assert len(latencies) == 5
    assert statistics.median(latencies) < 50
    assert fake.n_disconnected >= 5


async def test_a_retry_decodes_the_rest_of_the_prompt() -> None:
    async with fake_server("runner", slots=1) as (fake, server):
        fake.prefill_step = 0.001
        measured = await measure("retry", server)
    [decoded] = measured["decoded by the retry"]
    assert 0 < decoded < 180


async def test_a_storm_that_leaves_nothing_behind() -> None:
    async with fake_server("runner") as (fake, server):
        measured = await measure("storm", server)
    assert measured["slots still taken"] == measured["requests still waiting"] == [0]
    assert measured["generations still open"] == [0]
    assert measured["connections"] == [30]
    assert fake.n_disconnected > 5


async def test_leaks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_runner.bench.server.QUIET_SECONDS", 0.3)
    async with fake_server("runner") as (fake, server):

        async def settled(server: Server) -> None:  # called just before the storm
            fake.leaks = True

        monkeypatch.setattr(leaving, "settled", settled)
        [outcome] = await run_rounds([server], ["storm"], repeat=1, seed=1, load=LOAD)
    samples = {metric.name: values for metric, values in outcome.rounds[0].samples.items()}
    assert samples["generations still open"][0] > 5
    assert samples["slots still taken"] == [0]
    assert "until the server is quiet again" not in samples
    assert "still busy after 0.3 s" in outcome.notes


async def test_holdings_of_the_process_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([Holdings(5, 8, 50.0), Holdings(9, 9, 64.0), Holdings(6, 8, 62.5)])
    monkeypatch.setattr(leaving, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(leaving, "holdings", lambda pid: next(held))
    async with fake_server("runner") as (_, server):
        measured = await measure("storm", dataclasses.replace(server, pid=1))
    assert measured["threads more than before"] == [1]
    assert measured["descriptors more than before"] == [0]
    assert measured["memory more than before"] == [12.5]
    assert measured["memory more than halfway"] == [-1.5]


async def test_a_process_has_settled_when_nothing_changes(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(pid: int) -> Holdings:  # a thread ends after 11 seconds, another one 11 seconds later
        return Holdings(7 - min(int(trio.current_time() - started) // 11, 2), 3, 1.0)

    started = trio.current_time()
    monkeypatch.setattr(leaving, "holdings", held)
    held_at_last = await leaving.settled(Server("", Address("", 0), Runner(), 4, pid=1))
    assert held_at_last == Holdings(5, 3, 1.0)
    assert trio.current_time() - started > 22 + 11


async def test_an_overload_counts_the_refused() -> None:
    async with fake_server("runner", max_queue=5) as (_, server):
        measured = await measure("overload", server)
    assert measured["answered"][0] >= 9
    assert measured["answered"][0] + measured["503 with Retry-After"][0] == 20
    assert measured["503 with Retry-After"][0] > 0
    assert measured["anything else"] == [0]
    assert measured["/health failed"] == [0]


async def test_an_unhealthy_answer_is_a_failure() -> None:
    async with fake_server("runner") as (fake, server):
        fake.health = 503
        measured = await measure("overload", server)
    assert measured["/health failed"][0] > 0
    assert not measured["/health meanwhile"]


async def test_health_is_requested_at_fixed_times() -> None:
    """Not only after the answer to the request before: every request counts that a stuck server leaves waiting."""
    n_asked, answer, over = 0, trio.Event(), threading.Event()

    async def handle(stream: trio.SocketStream) -> None:
        nonlocal n_asked
        async with stream:
            await stream.receive_some()
            n_asked += 1
            if n_asked == 5:
                answer.set()
            await answer.wait()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    async with listening(handle) as address, trio.open_nursery() as nursery:
        poll = crowd.HealthPoll(address)
        nursery.start_soon(trio.to_thread.run_sync, trio.run, poll.run, over)
        await answer.wait()
        over.set()
    assert poll.n_failed == 0
    assert len(poll.latencies) >= 5
    assert max(poll.latencies) > 4 * crowd.HEALTH_SECONDS * 1000 - 1


@pytest.mark.parametrize("pauses", [True, False])
async def test_a_client_that_never_reads_is_noticed_before_anything_is_measured(pauses: bool) -> None:
    async with fake_server("runner") as (fake, server):
        fake.pauses = pauses
        [outcome] = await run_rounds([server], ["slow-reader"], repeat=1, seed=1, load=LOAD)
    [ratio] = outcome.rounds[0].samples[Metric("beside one that never reads / alone", "x")]
    if pauses:
        assert not outcome.notes
    else:
        assert outcome.notes == ["the client that never reads was not paused within 300 tokens"]
        assert ratio < 0.5


async def test_the_memory_for_a_client_that_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    held = itertools.cycle([Holdings(1, 1, 50.0), Holdings(1, 1, 53.0)])
    monkeypatch.setattr(crowd, "holdings", lambda pid: next(held))
    async with fake_server("runner") as (_, server):
        measured = await measure("slow-reader", dataclasses.replace(server, pid=1))
    assert measured["memory more than before it came"] == [3, 3]


async def test_leaving_the_queue_is_seen_before_the_step_ends() -> None:
    async with fake_server("runner", slots=2) as (fake, server):
        fake.statistics_step = 0.2
        measured = await measure("cancel-queued", server)
    assert statistics.median(measured["until it has left the queue"]) < 50


@pytest.mark.parametrize("dialect", list(DIALECTS))
async def test_survivors_whose_bits_change_are_found(dialect: DialectName) -> None:
    async with fake_server(dialect) as (fake, server):
        measured = await measure("survivors", server)
        assert measured["not identical"] == [0]
        assert measured["identical in every bit"] == measured["streams compared"]
        assert min(measured["tokens compared"][0] / LOAD.tokens, measured["streams compared"][0]) > 2
        fake.bits_break = True
        measured = await measure("survivors", server)
    [n_differing] = measured["not identical"]
    assert n_differing > 0
    assert measured["of those, with another text"] == [0]
    assert measured["first token that differs"] == [3] * int(n_differing)
    assert measured["greatest difference"] == [pytest.approx(1e-9)] * int(n_differing)


async def test_survivors_whose_texts_change_are_found() -> None:
    async with fake_server("llama") as (fake, server):
        fake.texts_break = True
        measured = await measure("survivors", server)
    assert measured["of those, with another text"] == measured["not identical"]
    assert min(measured["first token that differs"]) == 3


async def test_survivors_run_alone_on_a_server_that_is_started_for_them() -> None:
    n_started = 0

    @asynccontextmanager
    async def fresh() -> AsyncIterator[Server]:
        nonlocal n_started
        n_started += 1
        async with fake_server("runner") as (_, another):
            yield another

    async with fake_server("runner") as (fake, server):
        fake.bits_break = True
        measured = await measure("survivors", dataclasses.replace(server, fresh=fresh))
    assert n_started == 2
    assert measured["not identical"][0] > 0


@pytest.mark.parametrize("dialect", list(DIALECTS))
async def test_survivors_of_a_server_of_ours_are_paused_too(
    dialect: DialectName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real server with the toy, whose every token depends on all that its slot holds."""
    toy = Toy()
    toy.info = {"chat_template": "{{ messages[0].content }}"}
    load = dataclasses.replace(LOAD, late=600, endless=900)
    ends_early = dialect == "runner"  # the toy has no token that the load generator knows as an end
    if ends_early:
        monkeypatch.setattr(survivors, "LATE_SECONDS", 0.5)
    async with (
        toy.engine(slots=3, context_length=1000, max_backlog=8) as engine,
        serving(engine, deadline=DEADLINE) as served,
    ):
        server = await meet(f"http://{served.host}:{served.port}", dialect, slots=3)
        measured = await measure("survivors", server, load)
    assert measured["not identical"] == [0]
    assert measured["identical in every bit"][0] >= 3 + (dialect != "runner")
    assert ends_early or measured["streams that were paused"] == [1]
    assert measured.keys() >= {"preemptions", "batches aborted"}
    assert measured["tokens found in the prompt cache"][0] > 0


async def test_texts_are_compared_where_there_are_no_log_probabilities() -> None:
    async with fake_server("openai") as (fake, server):
        fake.tells_logprobs = False
        [outcome] = await run_rounds([server], ["survivors"], repeat=1, seed=1, load=LOAD)
    samples = {metric.name: values for metric, values in outcome.rounds[0].samples.items()}
    assert samples["texts that are identical"] == samples["texts compared"]
    assert samples["texts compared"][0] > 0
    assert "identical in every bit" not in samples
    assert "the server reports no log-probabilities: only texts are compared" in outcome.notes


async def test_scenarios_that_need_more_slots_are_unavailable() -> None:
    async with fake_server("runner", slots=1) as (_, server):
        names = ["gaps", "slow-reader", "survivors"]
        outcomes = await run_rounds([server], names, repeat=2, seed=1, load=LOAD)
    assert [outcome.unavailable for outcome in outcomes] == ["needs 2 slots, the server has 1"] * 3


async def test_embeddings_that_wait_for_the_streams_are_not_counted() -> None:
    """An embedding that ends after the streams did not run beside them."""
    async with fake_server("runner") as (fake, server):
        fake.embeddings_wait = True
        measured = await measure("embeddings", server, dataclasses.replace(LOAD, endless=60))
    assert len(measured["64 tokens, idle server"]) == 10
    assert len(measured["64 tokens, beside 3 streams"]) == 1


async def test_gaps_are_many_and_from_before_and_after() -> None:
    async with fake_server("runner") as (fake, server):
        fake.step = 0.002
        measured = await measure("gaps", server)
    assert len(measured["3 streams, undisturbed"]) >= 3 * 3 * LOAD.tokens
    assert min(measured["3 streams, undisturbed"]) > 0
    assert len(measured["the prompt's first token, idle server"]) == 2
