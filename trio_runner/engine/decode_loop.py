"""The decode thread: it reads mail, asks the scheduler for a step, has the context run it, and delivers the events.

It alone owns the context, the samplers in use and the scheduler. The trio thread reaches it only through the mailbox,
`abort_for` and `abort_running`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from trio_runner.core.batch import Batch, DecodeOutcome, StepResult
from trio_runner.core.ports import Adapter, Context, EncodedMedia, Sampler
from trio_runner.core.prompt import Media
from trio_runner.core.scheduler import Emission, Scheduler, Step
from trio_runner.engine.mailbox import Cancel, Close, Expire, Mail, Mailbox, Pause, Resume, Retire, Submit
from trio_runner.engine.request_times import RequestTimes
from trio_runner.events import Embedded, Finished
from trio_runner.info import SchedulerStatistics

logger = logging.getLogger("trio_runner.engine")

MIN_ROWS_TO_ABORT = 16
"""Rows that a cancelled sequence must have in a batch that others want, for the batch to be aborted. It must also have
at least as many rows as all others together, because their rows must run again. The single row of a sequence that
decodes costs its neighbours next to nothing; a prompt costs them much."""


@dataclass(frozen=True, slots=True)
class _RunningBatch:
    """The batch that runs, as the trio thread sees it. Once it is published, only the trio thread changes it."""

    number: int
    rows: dict[int, int]
    """Rows of each sequence in the batch that is not cancelled, by uid."""
    followers: set[int]
    """Sequences that wait for rows of another sequence in the batch."""
    may_abort_for_one: bool
    """Whether it may be aborted for one cancelled sequence while others still want it."""


class DecodeLoop:
    """`run` is the whole life of the decode thread. It calls `deliver`, which must neither block nor raise."""

    def __init__(
        self,
        context: Context,
        mailbox: Mailbox,
        deliver: Callable[[list[Emission]], None],
        *,
        step_target: float | None = None,
        times: RequestTimes | None = None,
    ) -> None:
        self.statistics = SchedulerStatistics()
        """The statistics after the last mail or step. Replaced, never mutated, so that any thread may read them."""
        self._context = context
        self._mailbox = mailbox
        self._deliver = deliver
        self._scheduler = Scheduler(context.capabilities, step_target)
        self._times = RequestTimes() if times is None else times
        self._submitted: dict[int, Submit] = {}
        self._samplers: dict[int, Sampler] = {}
        self._retired: dict[int, Adapter] = {}
        self._running: _RunningBatch | None = None
        self._may_abort_for_one = True
        self._closing = False
        self._checks = os.environ.get("TRIO_RUNNER_CHECK") == "1"

    def abort_for(self, uid: int) -> None:
        """Abort the running batch if no other sequence wants it, or if enough of its rows are those of `uid`, which is
        being cancelled. Only on the trio thread, after the mail that cancels it.

        With recurrent state nothing is aborted: state that is caught half-way is lost, and a retry would have nothing
        to go on from. The batch is short enough to finish.

        The batch may end, and the next one start, between the look and the call. But a batch is aborted by its number,
        so a call that comes too late does nothing.
        """
        running = self._running
        if running is None or not self._context.capabilities.can_trim:
            return
        is_follower = uid in running.followers
        running.followers.discard(uid)
        n_rows = running.rows.pop(uid, 0)
        if running.followers or not (n_rows or is_follower):
            return
        n_others = sum(running.rows.values())
        if not n_others or (running.may_abort_for_one and n_rows >= max(MIN_ROWS_TO_ABORT, n_others)):
            self._context.abort(running.number)

    def abort_running(self) -> None:
        """Abort the running batch. Only on the trio thread, after the mail that closes the loop."""
        running = self._running
        if running is not None:
            self._context.abort(running.number)

    def run(self) -> None:
        """Run until a `Close` arrives. Raises what the context raises. Closes every sampler on the way out."""
        try:
            step: Step | None = None
            while True:
                for mail in self._mailbox.take(wait=step is None):
                    self._read(mail)
                if self._closing:
                    return
                step = self._scheduler.next_step()
                self.statistics = self._scheduler.statistics()
                if step is not None:
                    self._run(step)
                if self._checks:
                    self._scheduler.check_integrity()
        finally:
            self.refuse_mail()
            for sampler in self._samplers.values():
                sampler.close()
            for adapter in self._retired.values():
                adapter.close()

    def refuse_mail(self) -> None:
        """Close the samplers and adapters in mail that will never be read. Only after `run` has ended. From any
        thread."""
        for mail in self._mailbox.take():
            if isinstance(mail, Submit) and mail.sampler is not None:
                mail.sampler.close()
            elif isinstance(mail, Retire):
                mail.adapter.close()

    def _read(self, mail: Mail) -> None:
        match mail:
            case Submit(spec, sampler):
                self._submitted[spec.uid] = mail
                self._times.submitted(
                    spec.uid, arrived=mail.arrived, submitted=mail.submitted, embedding=spec.embedding
                )
                if sampler is not None:
                    self._samplers[spec.uid] = sampler
                self._scheduler.submit(spec)
            case Retire(uid, adapter):
                self._retired[uid] = adapter
                self._close_retired()
            case Cancel(uid, closed):
                phase = self._scheduler.cancel(uid)
                if phase is not None:
                    self._times.cancelled(uid, phase, closed=closed, now=perf_counter())
                self._drop(uid)
            case Expire(uid):
                self._hand_out(self._scheduler.expire(uid))
            case Pause(uid):
                self._scheduler.pause(uid)
            case Resume(uid):
                self._scheduler.resume(uid)
            case Close():
                self._closing = True

    def _run(self, step: Step) -> None:
        trims_held = True
        for op in step.memory_ops:
            if not self._context.apply(op):
                self._scheduler.trim_failed(op)
                trims_held = False
        if not trims_held or not step.batch.chunks:
            return
        batch = step.batch
        # Publish the batch, look for mail, and only then decode. A cancellation that comes later sees the batch and
        # aborts it. One that came earlier is found in the mailbox.
        rows = {chunk.uid: len(chunk.items) for chunk in batch.chunks}
        self._running = _RunningBatch(batch.number, rows, set(step.followers), self._may_abort_for_one)
        if self._mailbox:
            self._running = None
            return
        self._times.started(batch.chunks, perf_counter())
        result = self._decode(batch)
        self._running = None
        self._times.sampled({uid for uid, sampled in result.sampled.items() if sampled.error is None}, perf_counter())
        # The batch after an aborted one runs to its end if anybody wants it, so that a client that cancels in a loop
        # cannot stop the others.
        self._may_abort_for_one = result.outcome is not DecodeOutcome.ABORTED
        if result.outcome not in (DecodeOutcome.OK, DecodeOutcome.ABORTED):
            logger.warning("a batch of %d rows failed: %s", batch.n_rows, result.message or result.outcome.value)
        self._hand_out(self._scheduler.commit(batch, result))

    def _hand_out(self, emissions: list[Emission]) -> None:
        # Before the events are delivered, so that a reader of a last event finds the slot free.
        self.statistics = self._scheduler.statistics()
        for index, (uid, event) in enumerate(emissions):
            if isinstance(event, Finished):
                emissions[index] = uid, self._times.finished(uid, event, perf_counter())
                self._drop(uid)
            elif isinstance(event, Embedded):
                emissions[index] = uid, self._times.embedded(uid, event, perf_counter())
                self._drop(uid)
        if emissions:
            self._deliver(emissions)

    def _decode(self, batch: Batch) -> StepResult:
        if not batch.kind.of_media and not batch.kind.adapters:
            return self._context.decode(batch, self._samplers)
        media: dict[Media, EncodedMedia] = {}
        adapters: dict[int, Adapter] = {}
        for chunk in batch.chunks:
            mail = self._submitted[chunk.uid]
            media.update(mail.media)
            adapters.update(mail.adapters)
        return self._context.decode(batch, self._samplers, media=media, adapters=adapters)

    def _drop(self, uid: int) -> None:
        """Close what an ended sequence had."""
        self._submitted.pop(uid, None)
        sampler = self._samplers.pop(uid, None)
        if sampler is not None:
            sampler.close()
        if self._retired:
            self._close_retired()

    def _close_retired(self) -> None:
        used = {uid for mail in self._submitted.values() for uid in mail.adapters}
        for uid in self._retired.keys() - used:
            self._retired.pop(uid).close()
