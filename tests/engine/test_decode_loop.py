"""The decode loop: mail, pauses, statistics and samplers."""

from __future__ import annotations

import pytest

from tests.engine.decode_bench import Bench, LateMailbox, prompt_of
from trio_runner.core.batch import Batch
from trio_runner.engine.decode_loop import DecodeLoop
from trio_runner.engine.mailbox import Cancel, Close, Expire, Pause, Resume
from trio_runner.events import Finished
from trio_runner.testing import toy_text


def test_mail_that_comes_while_a_batch_is_prepared_is_read_before_it_runs() -> None:
    """A cancellation before the batch is published cannot abort it, so the batch must not start."""
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


def test_a_batch_that_is_dropped_for_mail_changes_no_text() -> None:
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
    bench.mailbox.put(Pause(99))  # no sequence has this uid
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


def test_the_sampler_of_a_cancelled_sequence_is_closed_at_once() -> None:
    bench = Bench()
    bench.submit(1, "one", max_tokens=50)
    bench.submit(2, "another", max_tokens=5)
    closed: list[bool] = []

    def cancel(batch: Batch) -> None:
        closed.append(bench.samplers[0].closed)
        if len(closed) == 2:
            bench.mailbox.put(Cancel(1))
            bench.mailbox.put(Cancel(1))

    bench.context.on_decode = cancel
    bench.on_deliver = lambda: bench.close_when_finished(2)
    bench.loop.run()
    assert closed == [False, False, True, True, True]
    assert bench.text(2) == toy_text("another", 5)


@pytest.mark.parametrize("max_tokens", [3, 50])
def test_an_expired_sequence_ends_with_the_text_it_has(max_tokens: int) -> None:
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


def test_the_slot_of_an_expired_sequence_is_free_before_its_last_event() -> None:
    bench = Bench()
    bench.submit(1, "one", max_tokens=50)
    running: list[int] = []

    def look() -> None:
        running.append(bench.loop.statistics.n_running)
        bench.close_when_finished(1)

    bench.on_deliver = look
    bench.context.on_decode = lambda batch: bench.mailbox.put(Expire(1))
    bench.loop.run()
    assert running[-1] == 0
