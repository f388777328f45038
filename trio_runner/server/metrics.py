"""What `/metrics` tells Prometheus: the statistics of the engine under the names that dashboards ask for.

`METRICS` is the one table of them. Its names have the suffixes of vLLM's names and mean what those mean, so that a
dashboard needs another prefix and no more. `LLAMA_SERVER_METRICS` has the names of llama-server, as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, Literal, TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString
from quart import Response, request
from quart_trio import QuartTrio

from trio_runner.info import EngineStatistics, Histogram, SchedulerStatistics
from trio_runner.interface import EngineInterface

PREFIX: Final = "trio_runner_"
_FAMILIES: Final[Mapping[str, Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


@dataclass(frozen=True, slots=True)
class Scrape:
    """What is known when `/metrics` is asked for."""

    now: EngineStatistics
    before: SchedulerStatistics
    """The statistics of the scheduler when it was asked for last."""
    n_positions: int
    """Positions of the KV cache; 0 while the model loads."""


Value: TypeAlias = float | Histogram | Mapping[str, float] | Mapping[str, Histogram]
Read: TypeAlias = Callable[[Scrape], Value]


@dataclass(frozen=True, slots=True)
class Entry:
    """One metric. `read` takes its value from a scrape: one value or, with a `label`, one for each value of that."""

    name: str
    """The name as it is asked for. That of a histogram is without `_bucket`, `_sum` and `_count`."""
    kind: Literal["counter", "gauge", "histogram"]
    doc: str
    read: Read
    label: str = ""


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


METRICS: Final = (
    Entry("ready", "gauge", "1 if the model is loaded and requests are taken.", lambda s: s.now.status == "ready"),
    Entry("slots", "gauge", "Requests that can run at once, without embeddings.", lambda s: s.now.slots),
    Entry("num_requests_running", "gauge", "Requests in a slot.", lambda s: s.now.scheduler.n_running),
    Entry("num_requests_waiting", "gauge", "Requests that wait for a slot.", lambda s: s.now.scheduler.n_waiting),
    Entry(
        "num_requests_preparing",
        "gauge",
        "Requests that are tokenised, whose images are encoded, or that wait for the model to load.",
        lambda s: s.now.preparing,
    ),
    Entry(
        "paused",
        "gauge",
        "Requests in a slot that get no tokens because their client does not read.",
        lambda s: s.now.scheduler.n_paused,
    ),
    Entry(
        "kv_cache_usage_perc",
        "gauge",
        "Share of the KV cache that requests in a slot hold, from 0 to 1. What is kept for later prompts is free.",
        lambda s: _share(s.now.scheduler.n_used_tokens, s.n_positions),
    ),
    Entry(
        "prompt_cache_tokens",
        "gauge",
        "Tokens in free slots that are kept for later prompts.",
        lambda s: s.now.scheduler.n_cached_tokens - s.now.scheduler.n_used_tokens,
    ),
    Entry(
        "prefix_cache_queries_total",
        "counter",
        "Tokens of prompts that were looked up in the prompt cache.",
        lambda s: s.now.scheduler.n_looked_up,
    ),
    Entry(
        "prefix_cache_hits_total",
        "counter",
        "Tokens of prompts that were found there.",
        lambda s: s.now.scheduler.n_found,
    ),
    Entry(
        "prompt_tokens_total",
        "counter",
        "Tokens of prompts that were read, those found in the prompt cache included.",
        lambda s: s.now.scheduler.n_prompt_tokens,
    ),
    Entry("generation_tokens_total", "counter", "Tokens that were sampled.", lambda s: s.now.scheduler.n_sampled),
    Entry(
        "request_success_total",
        "counter",
        "Generations that ended: at a stop, at their length or deadline, by an error, or closed by the client (abort).",
        lambda s: s.now.requests.finished,
        "finished_reason",
    ),
    Entry(
        "refused_total",
        "counter",
        "Requests that were refused because the queue was full.",
        lambda s: s.now.requests.n_refused,
    ),
    Entry(
        "time_to_first_token_seconds",
        "histogram",
        "From the arrival of a generation to its first token.",
        lambda s: s.now.requests.first_token,
    ),
    Entry(
        "inter_token_latency_seconds",
        "histogram",
        "From one token of a generation to the next.",
        lambda s: s.now.requests.between_tokens,
    ),
    Entry(
        "e2e_request_latency_seconds",
        "histogram",
        "From the arrival of a generation to its end, if it was not closed before.",
        lambda s: s.now.requests.latency,
    ),
    Entry(
        "request_queue_time_seconds",
        "histogram",
        "From when a generation was prepared until its first rows began to be decoded.",
        lambda s: s.now.requests.queue,
    ),
    Entry(
        "request_prefill_time_seconds",
        "histogram",
        "From when its first rows began to be decoded to its first token.",
        lambda s: s.now.requests.prefill,
    ),
    Entry(
        "request_decode_time_seconds",
        "histogram",
        "From its first token to its last.",
        lambda s: s.now.requests.decode,
    ),
    Entry(
        "request_prompt_tokens",
        "histogram",
        "Tokens of the prompt of a generation.",
        lambda s: s.now.requests.prompt_tokens,
    ),
    Entry(
        "request_generation_tokens",
        "histogram",
        "Tokens that a generation sampled.",
        lambda s: s.now.requests.generated_tokens,
    ),
    Entry(
        "embedding_latency_seconds",
        "histogram",
        "From the arrival of a text to its embedding or score.",
        lambda s: s.now.requests.embedding,
    ),
    Entry(
        "cancelled_total",
        "counter",
        "Requests that were closed before they ended, embeddings included, by the phase they were in.",
        lambda s: s.now.requests.cancelled,
        "phase",
    ),
    Entry(
        "cancel_seconds",
        "histogram",
        "From the moment a request is closed until its slot is free, by the phase it was in.",
        lambda s: s.now.requests.cancel,
        "phase",
    ),
    Entry(
        "preempted_total",
        "counter",
        "How often a background request gave up its slot to an interactive one.",
        lambda s: s.now.scheduler.n_preemptions,
    ),
    Entry("batch_total", "counter", "Batches that were decoded.", lambda s: s.now.scheduler.n_batches),
    Entry(
        "batch_aborted_total",
        "counter",
        "Batches that were aborted because of a request that was closed.",
        lambda s: s.now.scheduler.n_aborted,
    ),
    Entry("image_encoded_total", "counter", "Images that were encoded.", lambda s: s.now.images_encoded),
    Entry(
        "image_found_total",
        "counter",
        "Images that were encoded already, or were being encoded for another request.",
        lambda s: s.now.images_found,
    ),
)
"""Ours. Each name comes with `PREFIX` before it, and each has the label `model_name`."""

LLAMA_SERVER_METRICS: Final = (
    Entry(
        "llamacpp:prompt_tokens_total",
        "counter",
        "Tokens of the prompts of generations, without those found in the prompt cache.",
        lambda s: s.now.scheduler.n_prompt_decoded,
    ),
    Entry(
        "llamacpp:prompt_seconds_total",
        "counter",
        "Seconds that these prompts took, the sum over all generations.",
        lambda s: s.now.scheduler.prompt_seconds,
    ),
    Entry(
        "llamacpp:tokens_predicted_total",
        "counter",
        "Tokens of generations that have finished.",
        lambda s: s.now.scheduler.n_generated,
    ),
    Entry(
        "llamacpp:tokens_predicted_seconds_total",
        "counter",
        "Seconds that these tokens took, the sum over all generations.",
        lambda s: s.now.scheduler.generation_seconds,
    ),
    Entry(
        "llamacpp:prompt_tokens_seconds",
        "gauge",
        "Tokens of prompts per second of one generation, since the last scrape.",
        lambda s: _share(
            s.now.scheduler.n_prompt_decoded - s.before.n_prompt_decoded,
            s.now.scheduler.prompt_seconds - s.before.prompt_seconds,
        ),
    ),
    Entry(
        "llamacpp:predicted_tokens_seconds",
        "gauge",
        "Generated tokens per second of one generation, since the last scrape.",
        lambda s: _share(
            s.now.scheduler.n_generated - s.before.n_generated,
            s.now.scheduler.generation_seconds - s.before.generation_seconds,
        ),
    ),
    Entry("llamacpp:requests_processing", "gauge", "Requests in a slot.", lambda s: s.now.scheduler.n_running),
    Entry("llamacpp:requests_deferred", "gauge", "Requests that wait for a slot.", lambda s: s.now.scheduler.n_waiting),
    Entry("llamacpp:n_decode_total", "counter", "Batches that were decoded.", lambda s: s.now.scheduler.n_batches),
    Entry(
        "llamacpp:n_busy_slots_per_decode",
        "gauge",
        "Slots that were in use while a batch was decoded, on average.",
        lambda s: _share(s.now.scheduler.n_slots_used, s.now.scheduler.n_batches),
    ),
)
"""Those of llama-server, without labels, as there."""


class Metrics:
    """The metrics of one engine. They are in a registry of their own, so two engines in a process do not collide."""

    def __init__(self, engine: EngineInterface, model_name: Callable[[], str]) -> None:
        """`model_name` says what the label of that name is at the moment."""
        self._engine = engine
        self._model_name = model_name
        self._before = SchedulerStatistics()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics and their content type: in OpenMetrics if the Accept header asks for it, and otherwise in the
        text format of Prometheus."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def add_to(self, app: QuartTrio) -> None:
        """Serve `/metrics`."""

        async def metrics() -> Response:
            body, content_type = self.text(request.headers.get("Accept", ""))
            return Response(body, content_type=content_type)

        app.add_url_rule("/metrics", "metrics", metrics, methods=["GET"])

    def collect(self) -> Iterator[Metric]:
        """What the registry calls for every scrape."""
        scrape = Scrape(self._engine.statistics(), self._before, self._n_positions())
        self._before = scrape.now.scheduler
        model = {"model_name": self._model_name()}
        yield from (_family(entry, scrape, PREFIX, model) for entry in METRICS)
        yield from (_family(entry, scrape, "", {}) for entry in LLAMA_SERVER_METRICS)

    def _n_positions(self) -> int:
        if self._engine.status != "ready":
            return 0
        capabilities = self._engine.capabilities
        return capabilities.n_slots * capabilities.n_ctx


def _family(entry: Entry, scrape: Scrape, prefix: str, labels: Mapping[str, str]) -> Metric:
    """The metric of an entry in the terms of prometheus-client. Every value has `labels`."""
    value = entry.read(scrape)
    names = (*labels, entry.label) if entry.label else (*labels,)
    values = value.items() if isinstance(value, Mapping) else ((None, value),)
    family = _FAMILIES[entry.kind](prefix + entry.name, entry.doc, labels=names)
    for key, one in values:
        of_value = (*labels.values(), key) if key is not None else (*labels.values(),)
        if isinstance(one, Histogram):
            family.add_metric(of_value, _buckets(one), one.total)
        else:
            family.add_metric(of_value, one)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Each upper bound, and how many values there were up to it."""
    bounds = (*map(floatToGoString, histogram.bounds), "+Inf")
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
