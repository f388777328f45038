"""The decode thread's work, done in the test's own thread: hooks of the context play the trio thread."""

from __future__ import annotations

import pytest

from trio_runner.core.batch import Batch, DecodeOutcome
from trio_runner.core.limits import Limits
from trio_runner.core.scheduler import Emission
from trio_runner.core.sequence import SequenceSpec
from trio_runner.engine.decode_loop import MIN_ROWS_TO_INTERRUPT, DecodeLoop
from trio_runner.engine.mailbox import Cancel, Close, Mailbox, Pause, Resume, Submit
from trio_runner.events import Finished
from trio_runner.request import SamplingParams
from trio_runner.testing import Interruption, ToyContext, ToySampler, toy_text

LIMITS = Limits(n_slots=2, n_ctx=256, max_rows=64)


class Bench:
    """A decode loop with everything it needs, within reach."""

    def __init__(self, limits: Limits = LIMITS, context: ToyContext | None = None) -> None:
        self.context = context or ToyContext(limits)
        self.mailbox = Mailbox()
        self.emissions: list[Emission] = []
        self.samplers: list[ToySampler] = []
        self.loop = DecodeLoop(self.context, self.mailbox, self.deliver, cache_policy="longest")

    def deliver(self, emissions: list[Emission]) -> None:
        self.emissions += emissions
        n_finished = sum(isinstance(event, Finished) for _, event in self.emissions)
        if n_finished == len(self.samplers):
            self.mailbox.put(Close())

    def submit(self, uid: int, prompt: str, max_tokens: int = 1) -> None:
        self.samplers.append(ToySampler(SamplingParams()))
        spec = SequenceSpec(uid=uid, prompt=tuple(prompt.encode()), max_tokens=max_tokens)
        self.mailbox.put(Submit(spec, self.samplers[-1]))

    def text(self, uid: int) -> str:
        return "".join(event.text for who, event in self.emissions if who == uid and hasattr(event, "text"))


def prompt_of(n_rows: int) -> str:
    return ("a prompt to cut " * 8)[:n_rows]


@pytest.mark.parametrize(
    ("n_rows", "aborts"), [(1, False), (MIN_ROWS_TO_INTERRUPT - 1, False), (MIN_ROWS_TO_INTERRUPT, True)]
)
def test_a_batch_is_broken_off_only_for_many_rows(n_rows: int, aborts: bool) -> None:
    bench = Bench()
    bench.submit(1, prompt_of(n_rows))
    raised: list[bool] = []

    def interrupt(batch: Batch) -> None:
        bench.loop.interrupt(1)
        raised.append(bench.context.aborting.is_set())

    bench.context.on_decode = interrupt
    bench.loop.run()
    assert raised == [aborts]


def test_only_rows_of_the_cancelled_sequence_count() -> None:
    bench = Bench()
    bench.submit(1, "x")
    bench.submit(2, prompt_of(40))
    raised: list[bool] = []

    def interrupt(batch: Batch) -> None:
        assert {chunk.uid for chunk in batch.chunks} == {1, 2}
        bench.loop.interrupt(1)
        bench.loop.interrupt(99)
        raised.append(bench.context.aborting.is_set())

    bench.context.on_decode = interrupt
    bench.loop.run()
    assert raised == [False]


def test_nothing_is_in_flight_between_two_batches() -> None:
    bench = Bench()
    bench.submit(1, prompt_of(40))
    bench.loop.interrupt(1)
    assert not bench.context.aborting.is_set()
    bench.loop.run()
    bench.loop.interrupt(1)
    assert not bench.context.aborting.is_set()


def test_the_batch_after_one_that_was_broken_off_is_not() -> None:
    bench = Bench()
    bench.submit(1, prompt_of(40))
    raised: list[bool] = []

    def interrupt_always(batch: Batch) -> Interruption | None:
        bench.loop.interrupt(1)
        raised.append(bench.context.aborting.is_set())
        # The third time the prompt is run it may go through, so that the fourth batch is not about it any more.
        return Interruption(DecodeOutcome.ABORTED) if raised[-1] else Interruption(DecodeOutcome.NO_KV_SPACE)

    bench.context.on_decode = interrupt_always
    bench.mailbox.put(Cancel(99))
    n_batches = 4

    def stop_after(batch: Batch) -> Interruption | None:
        if len(raised) == n_batches:
            bench.mailbox.put(Close())
        return interrupt_always(batch)

    bench.context.on_decode = stop_after
    bench.loop.run()
    assert raised[:4] == [True, False, True, False]


def test_a_flag_raised_too_late_breaks_off_no_later_batch() -> None:
    bench = Bench()
    bench.context.raise_abort()
    bench.submit(1, prompt_of(40))
    raised: list[bool] = []
    bench.context.on_decode = lambda _: raised.append(bench.context.aborting.is_set())
    bench.loop.run()
    assert raised == [False]


def test_recurrent_state_is_never_broken_off() -> None:
    """It could not go on from the middle of a batch."""
    bench = Bench(Limits(n_slots=2, n_ctx=256, max_rows=64, can_trim=False))
    bench.submit(1, prompt_of(40))
    raised: list[bool] = []

    def interrupt(batch: Batch) -> None:
        bench.loop.interrupt(1)
        raised.append(bench.context.aborting.is_set())

    bench.context.on_decode = interrupt
    bench.loop.run()
    assert raised == [False]


def test_mail_that_comes_while_a_batch_is_prepared_is_read_before_it_runs() -> None:
    """Whoever cancels before the rows are in flight cannot break them off, so they must not start."""

    class CancelledJustBefore(ToyContext):
        def lower_abort(self) -> None:
            super().lower_abort()
            bench.mailbox.put(Cancel(1))
            bench.loop.interrupt(1)
            bench.mailbox.put(Close())

    bench = Bench(context=CancelledJustBefore(LIMITS))
    bench.submit(1, prompt_of(40))
    bench.loop.run()
    assert bench.context.batches == []
    assert bench.emissions == []
    assert bench.samplers[0].closed


def test_a_batch_thrown_away_for_mail_changes_no_text() -> None:
    class MailBeforeEverySecondBatch(ToyContext):
        n_prepared = 0

        def lower_abort(self) -> None:
            super().lower_abort()
            self.n_prepared += 1
            if self.n_prepared % 2:
                bench.mailbox.put(Cancel(99))

    bench = Bench(context=MailBeforeEverySecondBatch(LIMITS))
    bench.submit(1, "one", max_tokens=20)
    bench.submit(2, "another", max_tokens=20)
    bench.loop.run()
    assert bench.text(1) == toy_text("one", 20)
    assert bench.text(2) == toy_text("another", 20)


def test_pause_takes_the_rows_and_resume_gives_them_back() -> None:
    bench = Bench()
    bench.submit(1, "one", max_tokens=10)
    bench.submit(2, "another", max_tokens=20)
    bench.mailbox.put(Pause(1))  # not running yet, so this one means nothing
    seen: list[set[int]] = []

    def hook(batch: Batch) -> None:
        seen.append({chunk.uid for chunk in batch.chunks})
        if len(seen) == 2:
            bench.mailbox.put(Pause(1))
        if len(seen) == 5:
            bench.mailbox.put(Resume(1))

    bench.context.on_decode = hook
    bench.loop.run()
    assert seen[:6] == [{1, 2}, {1, 2}, {2}, {2}, {2}, {1, 2}]
    assert bench.text(1) == toy_text("one", 10)
    assert bench.text(2) == toy_text("another", 20)


def test_statistics_are_of_the_last_step() -> None:
    bench = Bench()
    for uid in range(1, 5):
        bench.submit(uid, f"prompt {uid}", max_tokens=3)
    seen: list[tuple[int, int]] = []
    bench.context.on_decode = lambda _: seen.append((bench.loop.statistics.n_running, bench.loop.statistics.n_waiting))
    bench.loop.run()
    assert seen[1] == (2, 2)


def test_every_sampler_is_closed_when_the_loop_ends() -> None:
    bench = Bench()
    for uid in range(1, 6):
        bench.submit(uid, f"prompt {uid}", max_tokens=50)

    def close_after_a_few(batch: Batch) -> None:
        if len(bench.context.batches) == 3:
            bench.mailbox.put(Close())
            bench.submit(6, "behind the Close")

    bench.context.on_decode = close_after_a_few
    bench.loop.run()
    assert len(bench.samplers) == 6
    assert all(sampler.closed for sampler in bench.samplers)


def test_every_sampler_is_closed_when_the_context_fails() -> None:
    bench = Bench()
    for uid in range(1, 4):
        bench.submit(uid, f"prompt {uid}")

    def fail(batch: Batch) -> None:
        bench.submit(4, "came too late")
        raise OSError("no more memory")

    bench.context.on_decode = fail
    with pytest.raises(OSError, match="no more memory"):
        bench.loop.run()
    assert len(bench.samplers) == 4
    assert all(sampler.closed for sampler in bench.samplers)


def test_a_cancelled_sequence_loses_its_sampler_at_once() -> None:
    bench = Bench()
    bench.submit(1, "one", max_tokens=50)
    bench.submit(2, "another", max_tokens=5)
    closed: list[bool] = []

    def cancel(batch: Batch) -> None:
        closed.append(bench.samplers[0].closed)
        if len(closed) == 2:
            bench.mailbox.put(Cancel(1))
            bench.mailbox.put(Cancel(1))

    def deliver(emissions: list[Emission]) -> None:
        bench.emissions += emissions
        if any(uid == 2 and isinstance(event, Finished) for uid, event in emissions):
            bench.mailbox.put(Close())

    bench.context.on_decode = cancel
    bench.loop._deliver = deliver
    bench.loop.run()
    assert closed == [False, False, True, True, True]
    assert bench.text(2) == toy_text("another", 5)
