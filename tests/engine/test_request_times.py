"""What the histograms of requests say, when the clock is in the hands of the test."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from trio_runner.core.batch import Chunk
from trio_runner.engine.request_times import REQUEST_SECONDS, STEP_SECONDS, Recorder, RequestTimes
from trio_runner.events import Embedded, Finished, Usage
from trio_runner.info import Histogram, RequestStatistics


def statistics(times: RequestTimes) -> RequestStatistics:
    return times.statistics(n_refused=0, n_cancelled_preparing=0, ended=Counter())


def histogram(values: list[float], bounds: tuple[float, ...]) -> Histogram:
    """Counted as the documentation says: a value on a bound is in the range below it."""
    lows, highs = (float("-inf"), *bounds), (*bounds, float("inf"))
    counts = (sum(low < value <= high for value in values) for low, high in zip(lows, highs, strict=True))
    return Histogram(bounds, tuple(counts), sum(values))


def start(times: RequestTimes, uid: int, now: float) -> None:
    times.started([Chunk(uid, 0, 0, (1, 2), True)], now)


def finish(times: RequestTimes, uid: int, now: float) -> Usage:
    return times.finished(uid, Finished("stop", Usage(5, 0, 2)), now).usage


@given(st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 4.0])), st.integers(1, 3))
def test_a_histogram_counts_each_value_in_its_range(values: list[float], times: int) -> None:
    recorder = Recorder((1.0, 2.0, 3.0))
    for value in values:
        recorder.add(value, times)
    assert recorder.histogram() == histogram(values * times, (1.0, 2.0, 3.0))
    assert recorder.histogram().count == len(values) * times


def test_the_phases_of_a_request() -> None:
    times = RequestTimes()
    times.submitted(1, arrived=10.0, submitted=11.0)
    start(times, 1, 13.0)
    start(times, 1, 14.0)  # a later batch of the same prompt
    times.sampled({1}, 17.0)
    times.sampled({1}, 18.0)
    times.sampled({1}, 20.0)
    usage = finish(times, 1, 21.0)
    assert usage == Usage(5, 0, 2, queue_seconds=2.0)
    told = statistics(times)
    assert told.queue == histogram([2.0], REQUEST_SECONDS)
    assert told.first_token == histogram([7.0], REQUEST_SECONDS)
    assert told.prefill == histogram([4.0], REQUEST_SECONDS)
    assert told.decode == histogram([3.0], REQUEST_SECONDS)
    assert told.latency == histogram([11.0], REQUEST_SECONDS)
    assert told.between_tokens == histogram([1.0, 2.0], STEP_SECONDS)
    assert (told.prompt_tokens.total, told.generated_tokens.total) == (5, 2)
    assert {reason: n for reason, n in told.finished.items() if n} == {"stop": 1}


def test_a_request_that_never_ran_has_waited_all_the_time() -> None:
    times = RequestTimes()
    times.submitted(1, arrived=1.0, submitted=2.0)
    assert finish(times, 1, 10.0).queue_seconds == 8.0
    told = statistics(times)
    assert (told.queue.total, told.latency.total) == (8.0, 9.0)
    assert told.first_token.count == told.prefill.count == told.decode.count == 0


def test_one_token_takes_no_time_to_decode() -> None:
    times = RequestTimes()
    times.submitted(1, arrived=1.0, submitted=1.0)
    start(times, 1, 1.0)
    times.sampled({1}, 3.0)
    finish(times, 1, 4.0)
    told = statistics(times)
    assert (told.decode.count, told.decode.total, told.between_tokens.count) == (1, 0.0, 0)


def test_a_cancelled_request_is_only_in_the_histogram_of_its_phase() -> None:
    times = RequestTimes()
    for uid in (1, 2):
        times.submitted(uid, arrived=1.0, submitted=1.0, embedding=uid == 2)
        times.cancelled(uid, "waiting", closed=2.0, now=2.25)
    told = statistics(times)
    assert told.cancel["waiting"] == histogram([0.25, 0.25], STEP_SECONDS)
    assert told.cancelled == {"preparing": 0, "waiting": 2, "prefill": 0, "decode": 0}
    assert told.finished["abort"] == 1, "embeddings are no generations"
    assert told.latency.count == told.queue.count == 0


def test_an_embedding_has_a_histogram_of_its_own() -> None:
    times = RequestTimes()
    times.submitted(1, arrived=1.0, submitted=2.0, embedding=True)
    start(times, 1, 2.5)
    assert times.embedded(1, Embedded(None, Usage(3)), 4.0).usage == Usage(3, queue_seconds=0.5)
    times.submitted(2, arrived=1.0, submitted=2.0, embedding=True)
    times.finished(2, Finished("error", Usage(), error=RuntimeError()), 9.0)
    told = statistics(times)
    assert told.embedding == histogram([3.0], REQUEST_SECONDS)
    assert told.latency.count == told.queue.count == sum(told.finished.values()) == 0


@dataclass
class Slowly:
    """The intervals between tokens, taken one by one."""

    last: dict[int, float] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    def sampled(self, uids: set[int], now: float) -> None:
        for uid in uids:
            if uid in self.last:
                self.between.append(now - self.last[uid])
            else:
                self.first.append(now)
            self.last[uid] = now


@given(
    st.lists(
        st.tuples(st.sampled_from([0.25, 1.0, 2.0]), st.frozensets(st.integers(1, 4)), st.frozensets(st.integers(1, 4)))
    )
)
def test_each_interval_between_tokens_is_counted_once(
    steps: list[tuple[float, frozenset[int], frozenset[int]]],
) -> None:
    """Requests sample in any steps and end after any step. A number that ended comes back as another request."""
    times, slowly, now = RequestTimes(), Slowly(), 0.0
    for uid in range(1, 5):
        times.submitted(uid, arrived=0.0, submitted=0.0)
    for seconds, sampled, ended in steps:
        now += seconds
        times.sampled(set(sampled), now)
        slowly.sampled(set(sampled), now)
        for uid in ended:
            times.cancelled(uid, "decode", closed=now, now=now)
            slowly.last.pop(uid, None)
            times.submitted(uid, arrived=0.0, submitted=0.0)
    told = statistics(times)
    assert told.between_tokens == histogram(slowly.between, STEP_SECONDS)
    assert told.first_token == histogram(slowly.first, REQUEST_SECONDS)
