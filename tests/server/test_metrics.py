"""/metrics as Prometheus reads it, of an engine with the toy model and known requests."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import trio
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from tests.engine.toys import Gate, Toy, prompts, until_idle
from tests.server.client import Answer, Server, post, request, serving, until
from tests.server.fake_engine import FakeEngine
from trio_runner.core.prompt import common_prefix
from trio_runner.info import EngineStatistics, SchedulerStatistics
from trio_runner.server.metric_table import LLAMA_SERVER_METRICS, METRICS, PREFIX

VLLM = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries_total": "counter",
    "prefix_cache_hits_total": "counter",
    "prompt_tokens_total": "counter",
    "generation_tokens_total": "counter",
    "request_success_total": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
}
"""What dashboards for vLLM ask for, without its prefix."""
OURS = {
    "cancel_seconds": "histogram",
    "cancelled_total": "counter",
    "paused": "gauge",
    "preempted_total": "counter",
    "batch_aborted_total": "counter",
}
LLAMA_SERVER = {
    "llamacpp:prompt_tokens_total": "counter",
    "llamacpp:prompt_seconds_total": "counter",
    "llamacpp:tokens_predicted_total": "counter",
    "llamacpp:tokens_predicted_seconds_total": "counter",
    "llamacpp:prompt_tokens_seconds": "gauge",
    "llamacpp:predicted_tokens_seconds": "gauge",
    "llamacpp:requests_processing": "gauge",
    "llamacpp:requests_deferred": "gauge",
    "llamacpp:n_decode_total": "counter",
    "llamacpp:n_busy_slots_per_decode": "gauge",
}
LABELS = {"request_success_total": "finished_reason", "cancelled_total": "phase", "cancel_seconds": "phase"}

Samples = Mapping[str, float]


def samples(answer: Answer) -> dict[str, float]:
    """The values by name. Where there is a label besides model_name and le, its value stands behind the name."""
    found: dict[str, float] = {}
    for family in parser.text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            if "le" in sample.labels:
                continue
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            name = " ".join([sample.name.removeprefix(PREFIX), *labels.values()])
            assert name not in found
            found[name] = sample.value
    return found


def changed(before: Samples, after: Samples) -> dict[str, float]:
    """The counts and counters that are higher than before, by how much. Sums of seconds are left out."""
    timed = re.compile(r"seconds_sum|seconds_total|^process_")
    return {
        name: value - before[name]
        for name, value in after.items()
        if value != before[name] and re.search("_(total|count|sum)", name) and not timed.search(name)
    }


async def scraped(server: Server) -> dict[str, float]:
    answer = await server.ask(request("GET", "/metrics"))
    assert answer.status == 200
    return samples(answer)


async def test_every_name_that_dashboards_ask_for_is_there(toy: Toy) -> None:
    async with toy.engine() as engine, serving(engine) as server:
        answer = await server.ask(request("GET", "/metrics"))
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = {family.name: family for family in parser.text_string_to_metric_families(answer.body.decode())}
        expected = {**{PREFIX + name: kind for name, kind in (VLLM | OURS).items()}, **LLAMA_SERVER}
        for name, kind in expected.items():
            family = families[name.removesuffix("_total") if kind == "counter" else name]
            assert family.type == kind, name
            names = {sample.name for sample in family.samples}
            assert names == ({f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name})
            label = LABELS.get(name.removeprefix(PREFIX))
            for sample in family.samples:
                own = {"model_name"} if name.startswith(PREFIX) else set()
                assert sample.labels.keys() - {"le"} == own | ({label} if label else set())
                assert sample.labels.get("model_name") in ("toy", None)
        assert families["process_cpu_seconds"].samples[0].value > 0
        assert families["process_resident_memory_bytes"].samples[0].value > 1 << 20


def test_every_metric_is_explained_and_has_one_name() -> None:
    names = [entry.name for entry in (*METRICS, *LLAMA_SERVER_METRICS)]
    assert len(set(names)) == len(names)
    for entry in (*METRICS, *LLAMA_SERVER_METRICS):
        assert entry.doc.endswith(".")
        assert entry.name.endswith("_total") == (entry.kind == "counter")


async def test_after_known_requests_the_numbers_are_what_they_must_be(toy: Toy) -> None:
    [first, second] = prompts(2, 20)
    async with toy.engine(slots=2) as engine, serving(engine) as server:
        before = await scraped(server)
        assert not changed(dict.fromkeys(before, 0.0), before)
        for prompt, n_predict in ((first, 5), (second, 3), (first, 1)):
            body = {"prompt": prompt, "n_predict": n_predict, "cache_prompt": True}
            assert len((await server.ask(post("/completion", body))).text) == n_predict
        assert (await server.ask(post("/embedding", {"content": "12345"}))).status == 200
        after = await scraped(server)
        n_prompt = 2 * len(first) + len(second)
        n_found = common_prefix(first.encode(), second.encode()) + len(first) - 1
        assert changed(before, after) == {
            "prefix_cache_queries_total": n_prompt,
            "prefix_cache_hits_total": n_found,
            "prompt_tokens_total": n_prompt + 5,
            "generation_tokens_total": 9,
            "request_success_total length": 3,
            "time_to_first_token_seconds_count": 3,
            "inter_token_latency_seconds_count": 6,
            "e2e_request_latency_seconds_count": 3,
            "request_queue_time_seconds_count": 3,
            "request_prefill_time_seconds_count": 3,
            "request_decode_time_seconds_count": 3,
            "request_prompt_tokens_count": 3,
            "request_prompt_tokens_sum": n_prompt,
            "request_generation_tokens_count": 3,
            "request_generation_tokens_sum": 9,
            "embedding_latency_seconds_count": 1,
            "batch_total": 10,
            "llamacpp:prompt_tokens_total": n_prompt - n_found,
            "llamacpp:tokens_predicted_total": 9,
            "llamacpp:n_decode_total": 10,
        }
        # The toy says that each step takes a millisecond.
        assert after["llamacpp:prompt_seconds_total"] == pytest.approx(0.001 * (n_prompt - n_found))
        assert after["llamacpp:tokens_predicted_seconds_total"] == pytest.approx(0.006)
        assert after["llamacpp:prompt_tokens_seconds"] == pytest.approx(1000)
        assert after["llamacpp:predicted_tokens_seconds"] == pytest.approx(9 / 0.006)
        assert after["llamacpp:n_busy_slots_per_decode"] == 1
        # The token that is sampled last is never decoded. The last prompt was forked from the first.
        assert after["prompt_cache_tokens"] == (len(first) + 4) + (len(second) + 2) + len(first)
        # Since the last scrape there was nothing.
        again = await scraped(server)
        assert again["llamacpp:prompt_tokens_seconds"] == again["llamacpp:predicted_tokens_seconds"] == 0
        assert not changed(after, again)


async def test_buckets_rise_to_the_count(toy: Toy) -> None:
    async with toy.engine() as engine, serving(engine) as server:
        await server.ask(post("/completion", {"prompt": prompts(1, 20)[0], "n_predict": 8}))
        answer = await server.ask(request("GET", "/metrics"))
        families = {family.name: family for family in parser.text_string_to_metric_families(answer.body.decode())}
        tokens = families[f"{PREFIX}request_generation_tokens"].samples
        buckets = {sample.labels["le"]: sample.value for sample in tokens if "le" in sample.labels}
        assert (buckets["5.0"], buckets["10.0"], buckets["+Inf"]) == (0, 1, 1)
        for family in families.values():
            counts = [sample.value for sample in family.samples if "le" in sample.labels]
            if family.type == "histogram" and "phase" not in family.samples[0].labels:
                assert counts == sorted(counts)
                assert counts[-1] == next(sample.value for sample in family.samples if sample.name.endswith("_count"))


async def test_requests_that_run_wait_and_are_closed(toy: Toy) -> None:
    toy.on_decode = gate = Gate(toy)
    async with toy.engine(slots=1) as engine, serving(engine) as server:
        running = await server.connect()
        await running.stream.send_all(post("/completion", {"prompt": prompts(1, 20)[0]}))
        await gate.reached(1)
        waiting = await server.connect()
        await waiting.stream.send_all(post("/completion", {"prompt": "another"}))
        await until(lambda: engine.statistics().generations == 2)
        gate.let(3)
        await gate.reached(4)
        told = await scraped(server)
        assert (told["num_requests_running"], told["num_requests_waiting"]) == (1, 1)
        assert (told["llamacpp:requests_processing"], told["llamacpp:requests_deferred"]) == (1, 1)
        assert told["kv_cache_usage_perc"] == (10 + 2) / engine.capabilities.n_ctx
        waiting.reset()
        await until(lambda: engine.statistics().generations == 1)
        running.reset()
        await until(lambda: engine.statistics().generations == 0)
        gate.open()
        await until_idle(engine)
        told = await scraped(server)
        assert told["kv_cache_usage_perc"] == told["num_requests_running"] == told["num_requests_waiting"] == 0
        assert told["request_success_total abort"] == 2
        assert told["batch_aborted_total"] == 1
        for phase, n in (("preparing", 0), ("waiting", 1), ("prefill", 0), ("decode", 1)):
            assert told[f"cancelled_total {phase}"] == n
            assert phase == "preparing" or told[f"cancel_seconds_count {phase}"] == n


async def test_openmetrics_for_those_who_ask_for_it(toy: Toy) -> None:
    async with toy.engine() as engine, serving(engine) as server:
        await server.ask(post("/completion", {"prompt": "hello", "n_predict": 4}))
        accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
        answer = await server.ask(request("GET", "/metrics", b"", accept))
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        families = openmetrics_parser.text_string_to_metric_families(answer.body.decode())  # type: ignore[no-untyped-call]
        assert f"{PREFIX}time_to_first_token_seconds" in {family.name for family in families}


@pytest.mark.parametrize("accept", ["", "*/*", "text/html", "application/openmetrics-text; version=x", ";;q=,,", "é"])
async def test_any_accept_header_gets_an_answer(accept: str) -> None:
    engine = FakeEngine()
    engine.status = "loading"
    engine.snapshot = EngineStatistics("loading", 4, 0, SchedulerStatistics())
    async with serving(engine) as server:
        answer = await server.ask(request("GET", "/metrics", b"", f"Accept: {accept}"))
        assert answer.status == 200
        assert b"\ntrio_runner_ready{" in answer.body


async def test_the_api_key_is_wanted(toy: Toy) -> None:
    async with toy.engine() as engine, serving(engine, api_key="s3cret") as server:
        assert (await server.ask(request("GET", "/metrics"))).status == 401
        assert (await server.ask(request("GET", "/metrics", b"", "Authorization: Bearer s3cret"))).status == 200


async def test_only_get(toy: Toy) -> None:
    async with toy.engine() as engine, serving(engine) as server:
        assert (await server.ask(request("HEAD", "/metrics"))).status == 200
        refusal = await server.ask(post("/metrics", {}))
        assert (refusal.status, refusal.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


async def test_two_engines_in_one_process_do_not_collide() -> None:
    one, two = Toy(), Toy()
    async with one.engine() as first, two.engine() as second, serving(first) as here, serving(second) as there:
        await here.ask(post("/completion", {"prompt": prompts(1, 20)[0], "n_predict": 4}))
        assert (await scraped(here))["generation_tokens_total"] == 4
        assert (await scraped(there))["generation_tokens_total"] == 0


async def test_a_server_that_loads_and_one_that_closes(toy: Toy) -> None:
    loading = trio.Event()
    toy.on_load = lambda progress, cancelled: trio.from_thread.run(loading.wait)
    async with toy.engine(wait=False) as engine, serving(engine, drain_timeout=5) as server:
        client = await server.connect()
        await client.stream.send_all(post("/completion", {"prompt": prompts(1, 20)[0], "n_predict": 4}))
        await until(lambda: engine.statistics().preparing == 1)
        told = await scraped(server)
        assert (told["ready"], told["num_requests_preparing"], told["kv_cache_usage_perc"]) == (0, 1, 0)
        loading.set()
        assert len((await client.answer()).text) == 4
        told = await scraped(server)
        assert (told["ready"], told["num_requests_preparing"], told["generation_tokens_total"]) == (1, 0, 4)
