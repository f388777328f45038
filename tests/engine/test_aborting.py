"""Which batches are aborted for a cancelled sequence."""

from __future__ import annotations

import pytest

from tests.engine.decode_bench import Bench, Canceller, prompt_of
from trio_runner.core.batch import Batch
from trio_runner.core.sequence import SequenceSpec
from trio_runner.engine.decode_loop import MIN_ROWS_TO_ABORT
from trio_runner.engine.mailbox import Cancel, Close, Pause, Resume, Submit
from trio_runner.info import Capabilities
from trio_runner.testing import toy_text


@pytest.mark.parametrize(("n_rows", "aborts"), [(1, False), (MIN_ROWS_TO_ABORT - 1, False), (MIN_ROWS_TO_ABORT, True)])
def test_a_batch_that_others_want_is_aborted_only_for_many_rows(n_rows: int, aborts: bool) -> None:
    bench = Bench()
    bench.submit(1, prompt_of(n_rows))
    bench.submit(2, "x")
    bench.context.on_decode = canceller = Canceller(bench, 1)
    bench.loop.run()
    assert canceller.aborted[0] == aborts


@pytest.mark.parametrize(("n_mine", "n_others", "aborts"), [(20, 21, False), (21, 21, True), (30, 20, True)])
def test_a_batch_is_aborted_only_if_the_cancelled_rows_are_at_least_as_many_as_the_others(
    n_mine: int, n_others: int, aborts: bool
) -> None:
    bench = Bench()
    bench.submit(1, prompt_of(n_mine))
    bench.submit(2, "another" + prompt_of(n_others - 7))
    bench.context.on_decode = canceller = Canceller(bench, 1)
    bench.loop.run()
    assert [len(chunk.items) for chunk in bench.context.batches[0].chunks] == [n_mine, n_others]
    assert canceller.aborted[0] == aborts


@pytest.mark.parametrize(
    ("uids", "aborts"), [((1,), False), ((2,), False), ((1, 2), True), ((2, 1), True), ((1, 99), False)]
)
def test_a_sequence_that_follows_another_wants_its_batch(uids: tuple[int, ...], aborts: bool) -> None:
    bench = Bench()
    bench.submit(1, prompt_of(60) + "x")
    bench.submit(2, prompt_of(60) + "y")
    canceller = Canceller(bench, *uids)
    bench.context.on_decode = lambda batch: canceller(batch) if not canceller.aborted else None
    bench.loop.run()
    assert {chunk.uid for chunk in bench.context.batches[0].chunks} == {1}
    assert canceller.aborted == [aborts]


@pytest.mark.parametrize("can_trim", [True, False])
@pytest.mark.parametrize("uids", [(1, 2), (2, 1), (1, 2, 1), (99, 2, 1)])
def test_a_batch_that_no_sequence_wants_is_aborted(uids: tuple[int, ...], can_trim: bool) -> None:
    """Not with recurrent state: a retry could not continue from before the batch."""
    bench = Bench(Capabilities(n_slots=2, n_ctx=256, max_rows=64, can_trim=can_trim))
    bench.submit(1, "x")
    bench.submit(2, "y")
    canceller = Canceller(bench, *uids)

    def cancel_early(batch: Batch) -> None:
        if len(bench.context.batches) <= 3:
            canceller(batch)

    bench.context.on_decode = cancel_early
    bench.loop.run()
    assert canceller.aborted == ([True, True, True] if can_trim else [False])
    assert bench.text(1) == toy_text("x", 1)


def test_a_paused_sequence_does_not_want_a_batch() -> None:
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
    bench.context.on_decode = canceller = Canceller(bench, 1, 99)
    bench.loop.run()
    assert {chunk.uid for chunk in bench.context.batches[0].chunks} == {1, 2}
    assert canceller.aborted == [False]


def test_a_batch_is_not_aborted_for_a_sequence_outside_it() -> None:
    """One sequence waits for a slot, one has an embedding slot without rows in this batch."""
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


def test_between_batches_nothing_is_aborted() -> None:
    bench = Bench()
    bench.submit(1, prompt_of(40))
    bench.loop.abort_for(1)
    bench.loop.abort_running()
    assert bench.context.aborted_number is None
    bench.loop.run()
    bench.loop.abort_for(1)
    bench.loop.abort_running()
    assert bench.context.aborted_number is None


def test_an_abort_that_comes_too_late_aborts_no_later_batch() -> None:
    """The trio thread looks during one batch and calls during the next."""
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


def test_the_batch_after_an_aborted_one_is_not_aborted_for_one_sequence() -> None:
    """Otherwise a client that cancels in a loop would stop the others for ever."""
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

    bench.context.on_decode = come_and_go
    bench.on_deliver = lambda: bench.close_when_finished(1)
    bench.submit(2, prompt_of(20), max_tokens=50)
    bench.loop.run()
    assert bench.text(1) == toy_text("x", 8)
    assert aborted[:6] == [True, False, True, False, True, False]


def test_recurrent_state_is_not_aborted_for_one_of_many() -> None:
    """It could continue neither from the middle of the batch nor from before it."""
    bench = Bench(Capabilities(n_slots=2, n_ctx=256, max_rows=64, can_trim=False))
    bench.submit(1, prompt_of(40))
    bench.submit(2, "x")
    bench.context.on_decode = canceller = Canceller(bench, 1)
    bench.loop.run()
    assert not any(canceller.aborted)


def test_abort_running_aborts_every_batch() -> None:
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
