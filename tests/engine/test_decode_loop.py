"""The decode thread's work, done in the test's own thread: hooks of the context play the trio thread."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from trio_runner.core.batch import Batch
from trio_runner.core.scheduler import Emission
from trio_runner.core.sequence import SequenceSpec
from trio_runner.engine.decode_loop import MIN_ROWS_TO_ABORT, DecodeLoop
from trio_runner.engine.mailbox import Cancel, Close, Expire, Mailbox, Pause, Resume, Submit
from trio_runner.events import Finished
from trio_runner.info import Capabilities
from trio_runner.sampling import SamplingParams
from trio_runner.testing import ToyContext, ToySampler, toy_text

CAPABILITIES = Capabilities(n_slots=2, n_ctx=256, max_rows=64)


class Bench:
    """A decode loop with everything it needs, within reach."""

    def __init__(self, capabilities: Capabilities = CAPABILITIES, context: ToyContext | None = None) -> None:
        self.context = context or ToyContext(capabilities)
        self.mailbox = Mailbox()
        self.emissions: list[Emission] = []
        self.samplers: list[ToySampler] = []
        self.loop = DecodeLoop(self.context, self.mailbox, self.deliver)

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


class Breaker:
    """For `on_decode`: in each batch somebody is let go, as if they were cancelled at that moment."""

    def __init__(self, bench: Bench, *uids: int) -> None:
        self.aborted: list[bool] = []
        """By batch: whether it was broken off for that."""
        self._bench = bench
        self._uids = uids

    def __call__(self, batch: Batch) -> None:
        for uid in self._uids:
            self._bench.loop.abort_for(uid)
        self.aborted.append(self._bench.context.aborted_number == batch.number)


@pytest.mark.parametrize(("n_rows", "aborts"), [(1, False), (MIN_ROWS_TO_ABORT - 1, False), (MIN_ROWS_TO_ABORT, True)])
def test_a_batch_that_others_want_is_broken_off_only_for_many_rows(n_rows: int, aborts: bool) -> None:
    bench = Bench()
    bench.submit(1, prompt_of(n_rows))
    bench.submit(2, "x")
    bench.context.on_decode = breaker = Breaker(bench, 1)
    bench.loop.run()
    assert breaker.aborted[0] == aborts


@pytest.mark.parametrize(("n_mine", "n_others", "aborts"), [(20, 21, False), (21, 21, True), (30, 20, True)])
def test_whoever_leaves_costs_others_no_more_rows_than_it_had(n_mine: int, n_others: int, aborts: bool) -> None:
    bench = Bench()
    bench.submit(1, prompt_of(n_mine))
    bench.submit(2, "another" + prompt_of(n_others - 7))
    bench.context.on_decode = breaker = Breaker(bench, 1)
    bench.loop.run()
    assert [len(chunk.items) for chunk in bench.context.batches[0].chunks] == [n_mine, n_others]
    assert breaker.aborted[0] == aborts


@pytest.mark.parametrize(
    ("uids", "aborts"), [((1,), False), ((2,), False), ((1, 2), True), ((2, 1), True), ((1, 99), False)]
)
def test_who_waits_for_the_same_prompt_wants_the_batch_too(uids: tuple[int, ...], aborts: bool) -> None:
    bench = Bench()
    bench.submit(1, prompt_of(60) + "x")
    bench.submit(2, prompt_of(60) + "y")
    breaker = Breaker(bench, *uids)
    bench.context.on_decode = lambda batch: breaker(batch) if not breaker.aborted else None
    bench.loop.run()
    assert {chunk.uid for chunk in bench.context.batches[0].chunks} == {1}
    assert breaker.aborted == [aborts]


@pytest.mark.parametrize("can_trim", [True, False])
@pytest.mark.parametrize("uids", [(1, 2), (2, 1), (1, 2, 1), (99, 2, 1)])
def test_a_batch_that_nobody_wants_is_broken_off(uids: tuple[int, ...], can_trim: bool) -> None:
    """Unless a retry could not go on from before it: recurrent state is interrupted between batches only."""
    bench = Bench(Capabilities(n_slots=2, n_ctx=256, max_rows=64, can_trim=can_trim))
    bench.submit(1, "x")
    bench.submit(2, "y")
    breaker = Breaker(bench, *uids)

    def let_go(batch: Batch) -> None:
        if len(bench.context.batches) <= 3:
            breaker(batch)

    bench.context.on_decode = let_go
    bench.loop.run()
    assert breaker.aborted == ([True, True, True] if can_trim else [False])
    assert bench.text(1) == toy_text("x", 1)


def test_a_paused_neighbour_does_not_want_the_batch() -> None:
    bench = Bench()
    bench.submit(1, "one", max_tokens=10)
    bench.submit(2, "another", max_tokens=10)
    aborted: list[bool] = []

    def hook(batch: Batch) -> None:
        uids = {chunk.uid for chunk in batch.chunks}
        if uids == {1, 2}:
            bench.mailbox.put(Pause(1))
        elif not aborted:
            assert uids == {2}
            bench.mailbox.put(Cancel(2))
            bench.loop.abort_for(2)
            aborted.append(bench.context.aborted_number == batch.number)
            bench.samplers.pop()
            bench.mailbox.put(Resume(1))

    bench.context.on_decode = hook
    bench.loop.run()
    assert aborted == [True]
    assert bench.text(1) == toy_text("one", 10)


def test_only_rows_of_the_cancelled_sequence_count() -> None:
    bench = Bench()
    bench.submit(1, "x")
    bench.submit(2, prompt_of(40))
    bench.context.on_decode = breaker = Breaker(bench, 1, 99)
    bench.loop.run()
    assert {chunk.uid for chunk in bench.context.batches[0].chunks} == {1, 2}
    assert breaker.aborted == [False]


def test_a_batch_is_not_broken_off_for_who_is_not_in_it() -> None:
    """One waits for a slot, one is in a lane that has no rows in this batch."""
    bench = Bench(Capabilities(n_slots=1, n_ctx=256, max_rows=64, n_embed_slots=1))
    bench.submit(1, prompt_of(40))
    bench.submit(2, prompt_of(30))
    bench.mailbox.put(Submit(SequenceSpec(uid=3, prompt=tuple(b"embedded"), embedding=True), None))
    aborted: list[bool] = []

    def interrupt(batch: Batch) -> None:
        present = {chunk.uid for chunk in batch.chunks}
        for uid in {1, 2, 3} - present:
            bench.loop.abort_for(uid)
        aborted.append(bench.context.aborted_number is not None)

    bench.context.on_decode = interrupt
    bench.loop.run()
    assert len(aborted) == 3
    assert not any(aborted)


def test_nothing_is_in_flight_between_two_batches() -> None:
    bench = Bench()
    bench.submit(1, prompt_of(40))
    bench.loop.abort_for(1)
    bench.loop.abort_running()
    assert bench.context.aborted_number is None
    bench.loop.run()
    bench.loop.abort_for(1)
    bench.loop.abort_running()
    assert bench.context.aborted_number is None


def test_a_call_that_comes_too_late_breaks_off_no_later_batch() -> None:
    """The trio thread has looked, and calls when the next batch runs already."""
    bench = Bench()
    bench.submit(1, prompt_of(40), max_tokens=5)
    bench.submit(2, "x", max_tokens=5)

    def abort_the_last_one(batch: Batch) -> None:
        if len(bench.context.batches) > 1:
            bench.context.abort(bench.context.batches[-2].number)

    bench.context.on_decode = abort_the_last_one
    bench.loop.run()
    numbers = [batch.number for batch in bench.context.batches]
    assert len(numbers) == 5
    assert sorted(set(numbers)) == numbers
    assert bench.text(1) == toy_text(prompt_of(40), 5)


def test_the_batch_after_one_that_was_broken_off_is_not() -> None:
    """Or who cancels in a loop stops the others for ever."""
    bench = Bench()
    bench.submit(1, "x", max_tokens=8)
    aborted: list[bool] = []

    def come_and_go(batch: Batch) -> None:
        uid = max(chunk.uid for chunk in batch.chunks)
        if uid > 1:
            bench.mailbox.put(Cancel(uid))
            bench.loop.abort_for(uid)
        aborted.append(bench.context.aborted_number == batch.number)
        bench.submit(uid + 1, str(uid) + prompt_of(20), max_tokens=50)

    def close_after_the_first(emissions: list[Emission]) -> None:
        bench.emissions += emissions
        if any(uid == 1 and isinstance(event, Finished) for uid, event in emissions):
            bench.mailbox.put(Close())

    bench.context.on_decode = come_and_go
    bench.loop._deliver = close_after_the_first
    bench.submit(2, prompt_of(20), max_tokens=50)
    bench.loop.run()
    assert bench.text(1) == toy_text("x", 8)
    assert aborted[:6] == [True, False, True, False, True, False]


def test_recurrent_state_is_not_broken_off_for_one_of_many() -> None:
    """It could not go on from the middle of a batch, nor from anywhere before."""
    bench = Bench(Capabilities(n_slots=2, n_ctx=256, max_rows=64, can_trim=False))
    bench.submit(1, prompt_of(40))
    bench.submit(2, "x")
    bench.context.on_decode = breaker = Breaker(bench, 1)
    bench.loop.run()
    assert not any(breaker.aborted)


def test_interrupting_all_breaks_off_whatever_runs() -> None:
    bench = Bench(Capabilities(n_slots=2, n_ctx=256, max_rows=64, can_trim=False))
    bench.submit(1, "x", max_tokens=10)
    bench.submit(2, "y", max_tokens=10)

    def close(batch: Batch) -> None:
        bench.mailbox.put(Close())
        bench.loop.abort_running()
        assert bench.context.aborted_number == batch.number

    bench.context.on_decode = close
    bench.loop.run()
    assert len(bench.context.batches) == 1


class LateMailbox(Mailbox):
    """Mail that arrives just when the decode thread looks for the last time before a batch."""

    on_last_look: Callable[[], None] | None = None

    def __bool__(self) -> bool:
        if self.on_last_look is not None:
            self.on_last_look()
        return super().__bool__()


def test_mail_that_comes_while_a_batch_is_prepared_is_read_before_it_runs() -> None:
    """Whoever cancels before the rows are in flight cannot break them off, so they must not start."""
    bench = Bench()
    bench.mailbox = mailbox = LateMailbox()
    bench.loop = DecodeLoop(bench.context, mailbox, bench.deliver)
    bench.submit(1, prompt_of(40))

    def cancel() -> None:
        mailbox.put(Cancel(1))
        bench.loop.abort_for(1)
        mailbox.put(Close())

    mailbox.on_last_look = cancel
    bench.loop.run()
    assert bench.context.batches == []
    assert bench.emissions == []
    assert bench.samplers[0].closed


def test_a_batch_thrown_away_for_mail_changes_no_text() -> None:
    bench = Bench()
    bench.mailbox = mailbox = LateMailbox()
    bench.loop = DecodeLoop(bench.context, mailbox, bench.deliver)
    n_looks = 0

    def send_every_second_time() -> None:
        nonlocal n_looks
        n_looks += 1
        if n_looks % 2:
            mailbox.put(Cancel(99))

    mailbox.on_last_look = send_every_second_time
    bench.submit(1, "one", max_tokens=20)
    bench.submit(2, "another", max_tokens=20)
    bench.loop.run()
    assert bench.text(1) == toy_text("one", 20)
    assert bench.text(2) == toy_text("another", 20)


def test_pause_takes_the_rows_and_resume_gives_them_back() -> None:
    bench = Bench()
    bench.submit(1, "one", max_tokens=10)
    bench.submit(2, "another", max_tokens=20)
    bench.mailbox.put(Pause(99))  # nobody
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


@pytest.mark.parametrize("max_tokens", [3, 50])
def test_a_sequence_that_expires_ends_with_what_it_has(max_tokens: int) -> None:
    bench = Bench()
    bench.submit(1, "one", max_tokens=max_tokens)
    bench.submit(2, "another", max_tokens=20)

    def expire(batch: Batch) -> None:
        if len(bench.context.batches) == 5:
            bench.mailbox.put(Expire(1))
            bench.mailbox.put(Expire(1))
            bench.mailbox.put(Expire(99))
            bench.loop.abort_for(1)

    bench.context.on_decode = expire
    bench.loop.run()
    n_tokens = min(max_tokens, 5)
    finished = [event for uid, event in bench.emissions if uid == 1 and isinstance(event, Finished)]
    assert [event.reason for event in finished] == ["length" if max_tokens == 3 else "deadline"]
    assert finished[0].usage.completion_tokens == n_tokens
    assert bench.text(1) == toy_text("one", n_tokens)
    assert bench.text(2) == toy_text("another", 20)
    assert bench.samplers[0].closed


def test_who_reads_of_an_expired_sequence_finds_the_slot_free() -> None:
    bench = Bench()
    bench.submit(1, "one", max_tokens=50)
    running: list[int] = []

    def deliver(emissions: list[Emission]) -> None:
        running.append(bench.loop.statistics.n_running)
        if any(isinstance(event, Finished) for _, event in emissions):
            bench.mailbox.put(Close())

    bench.loop._deliver = deliver
    bench.context.on_decode = lambda batch: bench.mailbox.put(Expire(1))
    bench.loop.run()
    assert running[-1] == 0
