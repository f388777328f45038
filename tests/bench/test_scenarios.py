"""Every scenario against every dialect, and what each of them would notice."""

from __future__ import annotations

import re
import statistics
from random import Random

import pytest

from tests.bench.fake_server import END_TOKEN, fake_server
from trio_runner.bench.dialects import DIALECTS, DialectName, Runner
from trio_runner.bench.figures import Measured
from trio_runner.bench.prompts import Prompts
from trio_runner.bench.rounds import SCENARIOS, run_rounds
from trio_runner.bench.scenarios import Load, Turn
from trio_runner.bench.server import Server, Unavailable, meet, parse_url

LOAD = Load(
    long_prompt=200,
    prefix=120,
    tokens=12,
    streams=(1, 4, 8),
    storm=30,
    crowd=8,
    cancellations=12,
    clients=20,
    endless=4000,
)
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
    "storm": ["connections", "time for all of them", "until the server is quiet again"],
    "slow-reader": [
        "3 streams, nobody else",
        "3 streams, beside one that reads",
        "3 streams, beside one that never reads",
        "beside one that never reads / one that reads",
    ],
    "embeddings": ["64 tokens, idle server", "64 tokens, beside 3 streams"],
    "overload": [
        "requests at once",
        "answered",
        "503 with Retry-After",
        "anything else",
        "until all were told",
        "first token of those answered",
        "/health meanwhile",
        "/health unanswered",
    ],
    "survivors": ["cancellations", "texts compared", "texts that differ"],
}
"""The metrics that every server has."""

OF_THE_RUNNER = {
    "cancel-prefill": ["until its slot is free"],
    "cancel-decode": ["until its slot is free"],
    "cancel-unread": ["until its slot is free"],
    "cancel-queued": ["until it has left the queue"],
    "storm": ["slots still taken", "generations still open"],
}
"""And those that need /statistics."""


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
    expected = set(ALL[name]) | set(OF_THE_RUNNER.get(name, []) if dialect == "runner" else [])
    [measured] = outcome.rounds
    assert {metric.name for metric in measured.samples} == expected, measured.notes
    assert all(measured.samples.values())


async def test_throughput_is_what_the_server_does() -> None:
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


async def test_what_a_shared_prefix_costs() -> None:
    async with fake_server("runner", slots=1) as (_, server):
        measured = await measure("shared-prefix", server)
    assert measured["prompt tokens decoded, in all"] == [152 + 3 * 32]


@pytest.mark.parametrize("name", ["cancel-prefill", "cancel-decode", "cancel-unread", "cancel-queued"])
async def test_who_leaves_is_noticed_at_once(name: str) -> None:
    async with fake_server("runner", slots=2) as (fake, server):
        fake.prefill_step = 0.0002
        measured = await measure(name, server)
    [gone] = [samples for metric, samples in measured.items() if metric.startswith("until it")]
    assert len(gone) == 5
    assert statistics.median(gone) < 50
    assert fake.left >= 5


async def test_a_retry_decodes_what_was_missing() -> None:
    async with fake_server("runner", slots=1) as (fake, server):
        fake.prefill_step = 0.001
        measured = await measure("retry", server)
    [decoded] = measured["decoded by the retry"]
    assert 0 < decoded < 180
    assert measured["missing, by the server's count"] == [decoded]
    assert measured["decoded twice"] == [0]


@pytest.mark.parametrize("leaks", [False, True])
async def test_a_storm_finds_what_leaks(leaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_runner.bench.server.QUIET_SECONDS", 0.3)
    async with fake_server("runner") as (fake, server):
        fake.leaks = leaks
        if leaks:
            with pytest.raises(Unavailable, match="still busy after"):
                await measure("storm", server)
        else:
            measured = await measure("storm", server)
            assert measured["slots still taken"] == [0]
            assert measured["generations still open"] == [0]
            assert measured["connections"] == [30]
            assert fake.left > 5


async def test_an_overload_tells_who_was_refused() -> None:
    async with fake_server("runner", max_queue=5) as (_, server):
        measured = await measure("overload", server)
    assert measured["answered"][0] >= 9
    assert measured["answered"][0] + measured["503 with Retry-After"][0] == 20
    assert measured["503 with Retry-After"][0] > 0
    assert measured["anything else"] == [0]
    assert measured["/health unanswered"] == [0]


@pytest.mark.parametrize("dialect", ["runner", "llama", "openai"])
async def test_survivors_whose_texts_change_are_found(dialect: DialectName) -> None:
    async with fake_server(dialect) as (fake, server):
        measured = await measure("survivors", server)
        assert measured["texts that differ"] == [0]
        fake.texts_break = True
        fake.left = 0
        [outcome] = await run_rounds([server], ["survivors"], repeat=1, seed=1, load=LOAD)
    samples = {metric.name: values for metric, values in outcome.rounds[0].samples.items()}
    [n_differing] = samples["texts that differ"]
    assert n_differing > 0
    margins = samples["margin of the two best tokens at the first difference"]
    assert margins == [pytest.approx(0.9)] * int(n_differing)
    assert any(re.match(r"a text differs from token \d+ on, where the two best were 0.9000", n) for n in outcome.notes)


async def test_too_few_slots() -> None:
    async with fake_server("runner", slots=1) as (_, server):
        names = ["gaps", "slow-reader", "survivors"]
        outcomes = await run_rounds([server], names, repeat=2, seed=1, load=LOAD)
    assert [outcome.unavailable for outcome in outcomes] == ["needs 2 slots, the server has 1"] * 3


# ---- rounds ----------------------------------------------------------------------------------------------------------


async def test_the_rounds_alternate() -> None:
    said: list[str] = []
    async with fake_server("runner") as (_, one), fake_server("llama") as (_, other):
        await run_rounds([one, other], ["ttft"], repeat=3, seed=1, load=LOAD, progress=said.append)
    order = ["one" if line.endswith(one.url) else "other" for line in said if line.startswith("ttft")]
    assert order == ["one", "other", "other", "one", "one", "other"]


async def test_both_servers_get_the_same_prompts() -> None:
    async with fake_server("runner") as (first, one), fake_server("llama") as (second, other):
        await run_rounds([one, other], ["ttft"], repeat=2, seed=1, load=LOAD)
    prompts = [fields["prompt"] for fields in first.asked]
    assert prompts == [fields["prompt"] for fields in second.asked]
    assert len(set(prompts)) == len(prompts) - 3  # the warm ones


async def test_a_server_that_is_gone_is_a_note_and_no_crash() -> None:
    async with fake_server("runner") as (_, server):
        pass
    [outcome] = await run_rounds([server], ["ttft"], repeat=2, seed=1, load=LOAD)
    assert len(outcome.rounds) == 2
    [note] = outcome.notes
    assert note.startswith("a round failed: ConnectionRefusedError")


# ---- getting acquainted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", list(DIALECTS))
async def test_a_server_is_recognised(dialect: DialectName) -> None:
    async with fake_server(dialect, slots=3) as (_, known):
        server = await meet(known.url)
    assert server.dialect.name == dialect
    assert server.slots == (4 if dialect == "openai" else 3)
    assert server.tokenizes == (dialect != "openai")
    assert server.dialect.model == ("fake" if dialect == "openai" else "")
    assert server.address == known.address
    if isinstance(server.dialect, Runner):
        assert server.dialect.forbidden == (1, END_TOKEN)


async def test_nobody_there() -> None:
    async with fake_server("runner") as (_, server):
        pass
    with pytest.raises(Unavailable, match="refused"):
        await meet(server.url)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080"),
        ("127.0.0.1:8080", "127.0.0.1:8080"),
        ("http://localhost/", "localhost:80"),
        ("http://[::1]:99", "[::1]:99"),
    ],
)
def test_urls(url: str, text: str) -> None:
    assert str(parse_url(url)) == text


@pytest.mark.parametrize("url", ["https://127.0.0.1", "http://", "http://127.0.0.1:x", "http://127.0.0.1/v1", ""])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"HOST|[Pp]ort"):
        parse_url(url)
