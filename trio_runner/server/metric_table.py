"""The table of all metrics: their names, what they mean, and where their values come from. Pure.

Ours have the suffixes of vLLM's names and mean what those mean, so that a dashboard needs another prefix and no more.
Those of llama-server have the names they have there, and mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from trio_runner.info import EngineStatistics, Histogram, SchedulerStatistics

PREFIX: Final = "trio_runner_"


@dataclass(frozen=True, slots=True)
class Scrape:
    """What is known when `/metrics` is asked for."""

    now: EngineStatistics
    before: SchedulerStatistics
    """The statistics of the scheduler when it was asked for last."""
    n_positions: int
    """Positions of the KV cache; 0 while the model loads."""
    model_name: str = ""


Value: TypeAlias = float | Histogram | Mapping[Any, float] | Mapping[Any, Histogram]
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
        "Tokens that free slots keep for later prompts. What slots share is counted in each.",
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
