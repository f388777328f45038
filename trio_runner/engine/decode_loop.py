"""The decode thread: takes the mail, asks the scheduler what to do, has the context do it, hands the events over.

It is the only owner of the context, of the samplers in use, and of the scheduler. The trio thread reaches it through
the mailbox, `interrupt`, and nothing else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from trio_runner.core.batch import Batch, DecodeOutcome, StepResult
from trio_runner.core.ports import Adapter, Context, EncodedMedia, Sampler
from trio_runner.core.prompt import Media
from trio_runner.core.scheduler import Emission, Scheduler, Step
from trio_runner.engine.mailbox import Cancel, Close, Expire, Mail, Mailbox, Pause, Resume, Retire, Submit
from trio_runner.events import Embedded, Finished
from trio_runner.info import SchedulerStatistics

logger = logging.getLogger("trio_runner.engine")

MIN_ROWS_TO_INTERRUPT = 16
"""Rows of a cancelled sequence that may make it worth breaking off a batch, at the price of running it again for its
neighbours; if they are no more than its own, that is. One row of a sequence that decodes costs its neighbours next to
nothing, a prompt a lot."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    """The batch that runs, as the trio thread may know it. `rows` counts those of each sequence that still wants
    them, `followers` want what others have in it; once it is published, only the trio thread changes it."""

    number: int
    rows: dict[int, int]
    followers: set[int]
    is_breakable: bool
    """For the sake of one sequence, at the price of running the rest again."""


class DecodeLoop:
    """`run` is the whole life of the decode thread. `deliver` is called there, must not block and must not raise."""

    def __init__(
        self,
        context: Context,
        mailbox: Mailbox,
        deliver: Callable[[list[Emission]], None],
        *,
        step_target: float | None = None,
    ) -> None:
        self.statistics = SchedulerStatistics()
        """As of the last mail or step; replaced, never mutated, so that any thread may read it."""
        self._context = context
        self._mailbox = mailbox
        self._deliver = deliver
        self._scheduler = Scheduler(context.capabilities, step_target)
        self._submitted: dict[int, Submit] = {}
        self._samplers: dict[int, Sampler] = {}
        self._retired: dict[int, Adapter] = {}
        self._in_flight: _InFlight | None = None
        self._is_breakable = True
        self._closing = False
        self._checks = os.environ.get("TRIO_RUNNER_CHECK") == "1"

    def interrupt(self, uid: int) -> None:
        """Break off the running batch if nobody else wants it, or if `uid`, which is being let go, makes up enough of
        it. Only on the trio thread, after the mail that says so. Recurrent state that is caught half-way is lost, and
        with it what a retry could go on from: such a batch, which a step's length bounds, is left to finish.

        The batch may end, and another one start, between the look and the call; but a batch is broken off by its
        number, so that the call comes too late and does nothing.
        """
        running = self._in_flight
        if running is None or not self._context.capabilities.can_trim:
            return
        is_follower = uid in running.followers
        running.followers.discard(uid)
        n_rows = running.rows.pop(uid, 0)
        if running.followers or not (n_rows or is_follower):
            return
        n_others = sum(running.rows.values())
        if not n_others or (running.is_breakable and n_rows >= max(MIN_ROWS_TO_INTERRUPT, n_others)):
            self._context.abort(running.number)

    def interrupt_all(self) -> None:
        """Break off whatever runs. Only on the trio thread, after the mail that says so."""
        running = self._in_flight
        if running is not None:
            self._context.abort(running.number)

    def run(self) -> None:
        """Until a Close arrives. Raises what the context raises; every sampler is closed on the way out."""
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
        """Close the samplers of sequences that will never run, and adapters that nobody has any more. Only when `run`
        is over, on whichever thread."""
        for mail in self._mailbox.take():
            if isinstance(mail, Submit) and mail.sampler is not None:
                mail.sampler.close()
            elif isinstance(mail, Retire):
                mail.adapter.close()

    def _read(self, mail: Mail) -> None:
        match mail:
            case Submit(spec, sampler):
                self._submitted[spec.uid] = mail
                if sampler is not None:
                    self._samplers[spec.uid] = sampler
                self._scheduler.submit(spec)
            case Retire(uid, adapter):
                self._retired[uid] = adapter
                self._close_retired()
            case Cancel(uid):
                self._scheduler.cancel(uid)
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
        # Say what is in flight, look for mail, and only then decode: whoever lets go later than that sees the sequence
        # in flight and breaks it off, whoever let go earlier is found in the mailbox.
        rows = {chunk.uid: len(chunk.items) for chunk in batch.chunks}
        self._in_flight = _InFlight(batch.number, rows, set(step.followers), self._is_breakable)
        if self._mailbox:
            self._in_flight = None
            return
        result = self._decode(batch)
        self._in_flight = None
        # The batch after one that was broken off runs to its end, for whoever wants it: cancelling in a loop cannot
        # stop the others.
        self._is_breakable = result.outcome is not DecodeOutcome.ABORTED
        if result.outcome not in (DecodeOutcome.OK, DecodeOutcome.ABORTED):
            logger.warning("a batch of %d rows failed: %s", batch.n_rows, result.message or result.outcome.value)
        self._hand_out(self._scheduler.commit(batch, result))

    def _hand_out(self, emissions: list[Emission]) -> None:
        # Before the readers hear of it: who has read the last event finds the slot free.
        self.statistics = self._scheduler.statistics()
        for uid, event in emissions:
            if isinstance(event, (Finished, Embedded)):
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
        """What a sequence had that is gone."""
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
