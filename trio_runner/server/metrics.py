"""What `/metrics` tells Prometheus about an engine: its statistics, under the names of `metric_table.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, Final

from prometheus_client import ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString
from quart import Response, request

from trio_runner.info import Histogram, SchedulerStatistics
from trio_runner.server.dialects.dialect import Operation, RouteContext
from trio_runner.server.dialects.json_out import whole_characters
from trio_runner.server.metric_table import LLAMA_SERVER_METRICS, METRICS, PREFIX, Entry, Scrape
from trio_runner.server.names import ANY_NAME

_FAMILIES: Final[Mapping[str, Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}
_PROCESS: Final = ProcessCollector(registry=None)
"""CPU time, memory and file descriptors of this process."""


class Metrics:
    """The metrics of one engine. Nothing is shared with other engines of the process, and what llama-server counts
    since the last scrape is counted for each `Metrics`."""

    def __init__(self, context: RouteContext) -> None:
        """The value of the label `model_name` is what the server calls its model. If it was not told, that is the name
        in the model's file, and empty until the model is loaded."""
        self._engine = context.engine
        self._threads = context.threads
        self._name = None if context.names is ANY_NAME else context.names.name
        self._before = SchedulerStatistics()

    def scrape(self) -> Scrape:
        """What there is to tell now. Never raises."""
        now, before, n_positions = self._engine.statistics(), self._before, 0
        self._before = now.scheduler
        if self._engine.status == "ready":
            capabilities = self._engine.capabilities
            n_positions = capabilities.n_slots * capabilities.n_ctx
            self._name = self._engine.info.name if self._name is None else self._name
        return Scrape(now, before, n_positions, whole_characters(self._name or ""))

    async def respond(self) -> Response:
        """The answer to the current request, which is for the metrics: in OpenMetrics if its Accept header asks for
        that, and otherwise in the text format of Prometheus."""
        encode, content_type = _encoder(request.headers.get("Accept", ""))
        # On another thread: it takes some milliseconds, in which no stream would get its tokens.
        body = await self._threads.write(partial(encode, Families(self.scrape())))
        return Response(body, content_type=content_type)

    def operation(self, path: str) -> Operation:
        """What serves the metrics at `path`."""
        return Operation(
            method="GET",
            path=path,
            handler=self.respond,
            summary="Tell Prometheus how busy the engine is, and how long requests took.",
            answer_type="text/plain",
        )


class Families:
    """A scrape in the terms of prometheus-client, which asks for it as it asks a registry."""

    def __init__(self, scrape: Scrape) -> None:
        self._scrape = scrape

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        scrape = self._scrape
        model = {"model_name": scrape.model_name}
        yield from (_family(entry, scrape, PREFIX, model) for entry in METRICS)
        yield from (_family(entry, scrape, "", {}) for entry in LLAMA_SERVER_METRICS)
        yield from _PROCESS.collect()


def _encoder(accept: str) -> tuple[Callable[[Families], bytes], str]:
    """How to write what this Accept header asks for, and its content type."""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # "version=x"
        encode, content_type = choose_encoder("")
    return encode, content_type


def _family(entry: Entry, scrape: Scrape, prefix: str, labels: Mapping[str, str]) -> Metric:
    """The metric of an entry in the terms of prometheus-client. Every value has `labels`."""
    value = entry.read(scrape)
    names = (*labels, entry.label) if entry.label else (*labels,)
    values = value.items() if isinstance(value, Mapping) else ((None, value),)
    family: Any = _FAMILIES[entry.kind](prefix + entry.name, entry.doc, labels=names)
    for key, one in values:
        of_value = (*labels.values(), key) if key is not None else (*labels.values(),)
        if isinstance(one, Histogram):
            family.add_metric(of_value, _buckets(one), one.total)
        else:
            family.add_metric(of_value, one)
    metric: Metric = family
    return metric


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Each upper bound, and how many values there were up to it."""
    bounds = (*map(floatToGoString, histogram.bounds), "+Inf")
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
