"""When requests arrive, get their first rows, sample tokens and end: histograms of how long all that took.

The decode thread tells what happens, with the time. Any thread may ask for the histograms. A token must cost next to
nothing here, so the tokens of a step are noted as one set: all sequences that sampled in the step before have waited
equally long.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, get_args

from trio_runner.core.batch import Chunk
from trio_runner.events import Embedded, Finished, FinishReason
from trio_runner.info import Histogram, Phase, RequestStatistics

STEP_SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Bounds for what takes about as long as a step: from token to token, and from closing to a free slot."""
REQUEST_SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0),
)
"""Bounds for a request and its phases, from an embedding on a GPU to a book on a laptop."""
TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
"""Bounds for the tokens of a request."""


class Recorder:
    """A histogram that grows. One thread writes it, and any thread may read it."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count `value`, so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def histogram(self) -> Histogram:
        """The values so far."""
        return Histogram(self._bounds, tuple(self._counts), self._total)


@dataclass(slots=True)
class _Times:
    """The times of a request that has not ended, in seconds of one clock."""

    arrived: float
    submitted: float
    embedding: bool
    started: float | None = None
    """When the first batch with rows of it began."""
    first_token: float | None = None


class RequestTimes:
    """Follows the requests that the decode thread knows. It alone calls the methods, except `statistics`."""

    def __init__(self) -> None:
        self._requests: dict[int, _Times] = {}
        self._unstarted: set[int] = set()
        # The uids that sampled in the last step that sampled, and when that was. Only for sequences that have sampled,
        # but not then, `_older` has the time of their last token.
        self._latest: set[int] = set()
        self._latest_time = 0.0
        self._older: dict[int, float] = {}
        self._finished: Counter[FinishReason] = Counter(dict.fromkeys(get_args(FinishReason), 0))
        self._n_aborted = 0
        self._cancel: dict[Phase, Recorder] = {
            "waiting": Recorder(STEP_SECONDS),
            "prefill": Recorder(STEP_SECONDS),
            "decode": Recorder(STEP_SECONDS),
        }
        self._first_token, self._between_tokens = Recorder(REQUEST_SECONDS), Recorder(STEP_SECONDS)
        self._latency, self._queue = Recorder(REQUEST_SECONDS), Recorder(REQUEST_SECONDS)
        self._prefill, self._decode = Recorder(REQUEST_SECONDS), Recorder(REQUEST_SECONDS)
        self._prompt_tokens, self._generated_tokens = Recorder(TOKENS), Recorder(TOKENS)
        self._embedding = Recorder(REQUEST_SECONDS)

    def submitted(self, uid: int, *, arrived: float, submitted: float, embedding: bool = False) -> None:
        """A request joined the queue. It arrived earlier, and was prepared in between."""
        self._requests[uid] = _Times(arrived, submitted, embedding)
        self._unstarted.add(uid)

    def started(self, chunks: Iterable[Chunk], now: float) -> None:
        """A batch with these chunks begins."""
        if not self._unstarted:
            return
        for chunk in chunks:
            if chunk.uid in self._unstarted:
                self._unstarted.discard(chunk.uid)
                self._requests[chunk.uid].started = now

    def sampled(self, uids: set[int], now: float) -> None:
        """A step has sampled a token for each of `uids`. The set is kept, and may not be changed any more."""
        if not uids:
            return
        again = uids & self._latest
        if again:
            self._between_tokens.add(now - self._latest_time, len(again))
        if len(again) < len(self._latest):
            for uid in self._latest - again:
                self._older[uid] = self._latest_time
        if len(again) < len(uids):
            for uid in uids - again:
                before = self._older.pop(uid, None)
                if before is not None:
                    self._between_tokens.add(now - before)
                elif (times := self._requests.get(uid)) is not None:
                    times.first_token = now
                    self._first_token.add(now - times.arrived)
        self._latest, self._latest_time = uids, now

    def finished(self, uid: int, event: Finished, now: float) -> Finished:
        """A request has finished. Returns `event` with the time that it waited in its usage. An embedding finishes like
        this only if it fails, and is not counted."""
        last_token = self._latest_time if uid in self._latest else self._older.get(uid)
        times = self._forget(uid)
        if times is None or times.embedding:
            return event
        queue_seconds = _queue_seconds(times, now)
        self._finished[event.reason] += 1
        self._queue.add(queue_seconds)
        self._latency.add(now - times.arrived)
        if times.started is not None and times.first_token is not None and last_token is not None:
            self._prefill.add(times.first_token - times.started)
            self._decode.add(last_token - times.first_token)
        self._prompt_tokens.add(event.usage.prompt_tokens)
        self._generated_tokens.add(event.usage.completion_tokens)
        return replace(event, usage=replace(event.usage, queue_seconds=queue_seconds))

    def embedded(self, uid: int, event: Embedded, now: float) -> Embedded:
        """A text was embedded. Returns `event` with the time that it waited in its usage."""
        times = self._forget(uid)
        if times is None:
            return event
        self._embedding.add(now - times.arrived)
        return Embedded(event.vector, replace(event.usage, queue_seconds=_queue_seconds(times, now)))

    def cancelled(self, uid: int, phase: Phase, *, closed: float, now: float) -> None:
        """The slot of a request, or its place in the queue, is free. Its reader has closed it in this phase."""
        times = self._forget(uid)
        self._n_aborted += times is not None and not times.embedding
        self._cancel[phase].add(now - closed)

    def statistics(self, *, n_refused: int, n_cancelled_preparing: int, ended: Counter[str]) -> RequestStatistics:
        """The histograms so far, and what was counted elsewhere: requests that were refused, requests that were
        cancelled before the decode thread knew them, and generations that ended without it, by reason. From any
        thread."""
        cancel = {phase: recorder.histogram() for phase, recorder in self._cancel.items()}
        return RequestStatistics(
            finished={
                "abort": self._n_aborted + ended["abort"],
                **{reason: n + ended[reason] for reason, n in self._finished.items()},
            },
            cancelled={"preparing": n_cancelled_preparing, **{phase: times.count for phase, times in cancel.items()}},
            n_refused=n_refused,
            cancel=cancel,
            first_token=self._first_token.histogram(),
            between_tokens=self._between_tokens.histogram(),
            latency=self._latency.histogram(),
            queue=self._queue.histogram(),
            prefill=self._prefill.histogram(),
            decode=self._decode.histogram(),
            prompt_tokens=self._prompt_tokens.histogram(),
            generated_tokens=self._generated_tokens.histogram(),
            embedding=self._embedding.histogram(),
        )

    def _forget(self, uid: int) -> _Times | None:
        self._unstarted.discard(uid)
        self._latest.discard(uid)
        self._older.pop(uid, None)
        return self._requests.pop(uid, None)


def _queue_seconds(times: _Times, now: float) -> float:
    return (now if times.started is None else times.started) - times.submitted
