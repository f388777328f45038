"""Who runs next: sequences in, steps out, results in, events out.

The scheduler never sees a context. `next_step` returns a value, and the caller, who has a context, carries it out in
this order:

    step = scheduler.next_step()
    for op in step.memory_ops:      context.apply(op); after a False: scheduler.trim_failed(op), and start over
    result = context.decode(step.batch, ...)
    events = scheduler.commit(step.batch, result)

A sequence waits, runs in a slot, and ends. While it runs it is given rows in every batch, except while its reader is
behind (it is paused), while another sequence decodes the start of the same prompt (it follows that one), or while rows
of another kind have their turn. A background sequence is preempted when an interactive one needs its slot: it waits
again, with all it has.

Edits count as done once `next_step` returned them. Rows count only once they are committed: a batch may be thrown away
instead, and is then planned again.

Rule 1: `slot.items` is what the KV cache holds once the edits returned so far are done. Nothing else remembers that.
Rule 2: `slot.items + sequence.pending` is everything that the sequence's next token depends on.
Rule 3: whatever happens to one sequence, the others only ever lose time.

`check_integrity` checks what follows from these rules. Parts of the scheduler have files of their own: `slots` (which
slot), `cache_edits` (what it holds), `following` (who waits for whose prefix), `turns` (who goes first), `rows` (which
rows), `pace` (how many rows), `scoring` (how probable a prompt is), `fault_isolation` (who may share a batch after
failures).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from trio_runner.core import integrity
from trio_runner.core.batch import (
    MAX_SCORED_ROWS,
    Batch,
    BatchKind,
    DecodeOutcome,
    Sampled,
    StepResult,
    plan_batch,
)
from trio_runner.core.cache_edits import CacheEdits
from trio_runner.core.counters import Counters
from trio_runner.core.fault_isolation import FaultIsolation
from trio_runner.core.following import MIN_FOLLOW, Following
from trio_runner.core.memory import MemoryOp, Trim
from trio_runner.core.pace import Pace
from trio_runner.core.rows import next_chunk, next_kind
from trio_runner.core.scoring import keep_scores, scoring_of
from trio_runner.core.sequence import (
    FirstToken,
    Sequence,
    SequenceSpec,
    finish_reason,
    no_slot,
    takes_embed_slot,
)
from trio_runner.core.slots import Slot, SlotPool
from trio_runner.core.snapshot import SchedulerState, sequence_states, slot_states, statistics
from trio_runner.core.turns import Turns
from trio_runner.errors import DecodeFailed
from trio_runner.events import Embedded, Event, Finished, FinishReason, PromptProgress
from trio_runner.info import Capabilities, Phase, SchedulerStatistics

Emission: TypeAlias = tuple[int, Event | Embedded | FirstToken]
"""(uid, event for its reader, or for the one who hands the events out)"""

N_SHORT_STEPS: Final = 10
"""Steps without streams that are short after one that was aborted. A client that cancelled once will soon do so again,
as with every key that is pressed, and what was begun is lost."""


@dataclass(frozen=True, slots=True)
class Step:
    """Edits of the KV cache, then one batch. Either may be empty, but not both."""

    memory_ops: tuple[MemoryOp, ...]
    batch: Batch
    followers: tuple[int, ...] = ()
    """Uids of sequences that are not in the batch, but wait for what it decodes."""


class Scheduler:
    """Continuous batching over the slots of one context. Not thread-safe; knows no clock."""

    def __init__(
        self,
        capabilities: Capabilities,
        step_target: float | None = None,
        *,
        pace: Pace | None = None,
        min_follow: int = MIN_FOLLOW,
    ) -> None:
        """`step_target`: see `EngineConfig.step_target`. `pace` replaces the one made from it. `min_follow`: see
        `MIN_FOLLOW`."""
        self._capabilities = capabilities
        self._waiting: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}  # in the order in which they got their slots
        self._pool = SlotPool(capabilities)
        self._cache = CacheEdits(self._pool, capabilities)
        self._pace = pace or Pace(capabilities.max_rows, step_target)
        self._turns = Turns()
        self._faults = FaultIsolation(capabilities.max_rows, self._running)
        self._following = Following(
            self._running, self._pool, self._cache.edits, can_trim=capabilities.can_trim, min_follow=min_follow
        )
        self._crowded = False  # the KV cache was full: no sequence gets a slot before another one gives one up
        self._n_short_steps = self._n_planned = 0
        self._counters = Counters()

    def submit(self, spec: SequenceSpec) -> None:
        """Queue a sequence. Its uid must be higher than all before.

        Interactive sequences go before background ones, then first come, first served. Short texts that are to be
        embedded have slots of their own.
        """
        self._waiting[spec.uid] = Sequence(spec, takes_embed_slot(spec, self._capabilities))

    def cancel(self, uid: int) -> Phase | None:
        """End a sequence without another event. Its slot keeps what was decoded, so that the same prompt goes on from
        there. Returns the phase it was in; None for an unknown uid, such as that of a sequence that has ended."""
        if uid in self._running:
            sequence = self._running[uid]
            self._release(sequence)
            return "decode" if sequence.prompt_done else "prefill"
        if uid in self._waiting:
            self._remove_waiting(uid)
            return "waiting"
        return None

    def expire(self, uid: int) -> list[Emission]:
        """End a sequence whose deadline has passed, with the text that it has. An unknown uid is ignored."""
        sequence = self._running.get(uid) or self._waiting.get(uid)
        if sequence is None:
            return []
        if uid in self._waiting:
            self._remove_waiting(uid)
        rest = sequence.text.flush()
        return [*([] if rest is None else [(uid, rest)]), self._finish(sequence, "deadline")]

    def pause(self, uid: int) -> None:
        """Give a sequence no more rows. It keeps its slot. An unknown uid is ignored."""
        self._set_paused(uid, True)

    def resume(self, uid: int) -> None:
        """Undo `pause`. Others may have decoded meanwhile what the sequence needs: it goes on from there."""
        self._set_paused(uid, False)
        if uid in self._running:
            self._following.resumed(self._running[uid])

    def _set_paused(self, uid: int, paused: bool) -> None:
        sequence = self._running.get(uid) or self._waiting.get(uid)
        if sequence is not None:
            sequence.paused = paused

    def _remove_waiting(self, uid: int) -> None:
        sequence = self._waiting.pop(uid)
        self._cache.edits += self._pool.unpark(uid, forget=sequence.spec.embedding)
        self._faults.forget(uid)

    def statistics(self) -> SchedulerStatistics:
        """How full the scheduler is, and what it has done so far."""
        return statistics(self._waiting, self._running, self._pool.slots, self._counters, self._cache.n_prompt_rows)

    def state(self) -> SchedulerState:
        """A copy of what the scheduler knows."""
        return SchedulerState(
            slots=slot_states(self._pool.slots),
            embed_slots=slot_states(self._pool.embed_slots),
            reserved=dict(self._pool.reserved),
            running=sequence_states(self._running),
            waiting=sequence_states(self._waiting),
            suspects=self._faults.suspects,
            max_rows=self._faults.max_rows,
            crowded=self._crowded,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError, which names what is wrong, if the state contradicts itself. Changes nothing."""
        integrity.check(self.state(), self._capabilities)

    def next_step(self) -> Step | None:
        """What to do next; None when there is nothing to do before a sequence is submitted or resumed."""
        self._admit()
        batch = self._plan()
        edits = self._cache.take()
        return Step(edits, batch, self._following.followers(batch)) if edits or batch.chunks else None

    def trim_failed(self, op: MemoryOp) -> None:
        """This Trim was refused. Its slot is emptied instead, and what it should hold is decoded again. The edits of
        the step that come after the refused one must still be carried out."""
        assert isinstance(op, Trim)
        slot = self._pool[op.slot]
        for sequence in self._running.values():
            if sequence.slot is slot:
                self._cache.start_over(sequence)
                return
        self._cache.empty(slot)

    def commit(self, batch: Batch, result: StepResult) -> list[Emission]:
        """Take what came of a batch. The events are in the order in which readers should get them."""
        self._turns.count(batch, self._running)
        if result.outcome is DecodeOutcome.OK:
            self._counters.batch_done(len(self._running))
            self._n_short_steps = max(self._n_short_steps - 1, 0)
            self._faults.succeeded(batch)
            if result.scores is not None:
                keep_scores(result.scores, self._running)
            if not batch.kind.embedding and not batch.kind.scored:
                self._pace.measured(sum(chunk.decoding for chunk in batch.chunks), batch.n_rows, result.seconds)
            return list(self._commit_rows(batch, result))
        if result.outcome in (DecodeOutcome.ABORTED, DecodeOutcome.FATAL):
            for chunk in batch.chunks:
                if chunk.uid in self._running:
                    self._cache.keep_finished_rows(self._running[chunk.uid], chunk, batch, result)
        if result.outcome is DecodeOutcome.ABORTED:
            self._counters.n_aborted += 1
            self._n_short_steps = N_SHORT_STEPS
            return []
        if result.outcome is DecodeOutcome.NO_KV_SPACE and self._make_space(batch):
            return []
        return self._end_culprit(batch, result) if self._faults.failed(batch) else []

    # -- admission: from waiting to running and back ------------------------------------------------------------------

    def _admit(self) -> None:
        while (sequence := self._first_waiting(in_embed_slot=True)) is not None:
            embed_slot = self._pool.acquire_for_embedding(len(sequence.pending), sequence.spec.cache_key)
            if embed_slot is None:
                break
            self._start(sequence, embed_slot)
        while not self._crowded and (sequence := self._first_waiting(in_embed_slot=False)) is not None:
            acquired = self._acquire(sequence)
            while acquired is None and not sequence.spec.background and self._preempt_background():
                acquired = self._acquire(sequence)
            if acquired is None:
                return
            slot, edits = acquired
            self._cache.edits += edits
            self._start(sequence, slot)
            if sequence.spec.reuses:
                self._following.find(sequence)

    def _acquire(self, sequence: Sequence) -> tuple[Slot, list[MemoryOp]] | None:
        spec = sequence.spec
        return self._pool.acquire(
            sequence.pending,
            reuse=spec.reuses,
            uid=spec.uid,
            cache_key=spec.cache_key,
            n_encoder_tokens=len(spec.encoder_tokens),
            preferred=spec.preferred_slot,
        )

    def _first_waiting(self, *, in_embed_slot: bool) -> Sequence | None:
        candidates = (
            (sequence.spec.background, sequence.spec.uid)
            for sequence in self._waiting.values()
            if sequence.in_embed_slot == in_embed_slot and not sequence.paused
        )
        first = min(candidates, default=None)
        return None if first is None else self._waiting[first[1]]

    def _start(self, sequence: Sequence, slot: Slot) -> None:
        del self._waiting[sequence.spec.uid]
        self._running[sequence.spec.uid] = sequence
        sequence.slot, sequence.last_turn = slot, self._turns.now
        n_held = len(slot.items)
        del sequence.pending[:n_held]
        if not sequence.prompt_done:
            sequence.n_cached = min(sequence.n_cached, n_held) if sequence.preempted else n_held

    def _preempt_background(self) -> bool:
        """Take the slot of the background sequence that came last; False when there is none."""
        uids = [one.spec.uid for one in self._running.values() if one.spec.background and not one.in_embed_slot]
        if uids:
            self._preempt(self._running[max(uids)])
        return bool(uids)

    def _preempt(self, sequence: Sequence) -> None:
        """Let a running sequence wait, with all it has. What its slot holds stays while other slots are free."""
        self._counters.n_preemptions += 1
        if len(sequence.items) > self._capabilities.n_ctx:
            self._cache.shift(sequence)  # as it would have done in the next step
        sequence.pending[:0] = sequence.slot.items
        self._leave_slot(sequence, parked_for=sequence.spec.uid)
        sequence.slot, sequence.follows, sequence.preempted = no_slot(), None, True
        self._waiting[sequence.spec.uid] = sequence

    def _release(self, sequence: Sequence) -> None:
        """The sequence has ended. Give up its slot, if it has one."""
        if sequence.spec.uid in self._running:
            self._leave_slot(sequence)
            self._faults.forget(sequence.spec.uid)
            self._crowded = self._crowded and sequence.in_embed_slot

    def _leave_slot(self, sequence: Sequence, *, parked_for: int | None = None) -> None:
        del self._running[sequence.spec.uid]
        # No prompt goes on from a text that was embedded.
        forget = sequence.spec.embedding and parked_for is None
        self._cache.edits += self._pool.release(sequence.slot, parked_for=parked_for, forget=forget)
        self._following.stopped(sequence)

    # -- planning -----------------------------------------------------------------------------------------------------

    def _plan(self) -> Batch:
        ready = self._ready()
        if not ready:
            return Batch(())
        by_kind: dict[BatchKind, list[Sequence]] = {}
        for sequence in ready:
            if len(sequence.slot.items) + len(sequence.pending) > self._capabilities.n_ctx:
                self._cache.shift(sequence)
            by_kind.setdefault(next_kind(sequence, self._capabilities), []).append(sequence)
        kind = self._turns.next_kind(by_kind)
        # Every stream waits for this batch, whether it is in it or not.
        n_decoding = sum(sequence.decoding for sequence in ready)
        n_prompting = sum(not all(sequence.decoding for sequence in sequences) for sequences in by_kind.values())
        asked = (next_chunk(sequence, self._capabilities) for sequence in by_kind[kind])
        prompt_rows = self._capabilities.max_rows
        if n_decoding or not kind.embedding:
            prompt_rows = self._pace.prompt_rows(n_decoding, n_kinds=n_prompting, short=self._n_short_steps > 0)
        max_rows = min(self._faults.max_rows, MAX_SCORED_ROWS) if kind.scored else self._faults.max_rows
        chunks = plan_batch(asked, max_rows=max_rows, prompt_rows=prompt_rows)
        first_embed_slot = self._capabilities.first_embed_slot
        n_rows = sum(len(chunk.items) for chunk in chunks if chunk.slot < first_embed_slot)
        self._cache.edits += self._pool.make_room(n_rows)
        self._n_planned += 1
        return Batch(chunks, kind, self._n_planned, scoring_of(chunks, self._running) if kind.scored else None)

    def _ready(self) -> list[Sequence]:
        """The sequences that may share the next batch; those that waited longest come first."""
        # A paused sequence, too, takes over what it waited for: the one it follows may shift it away later.
        ready = [
            sequence
            for sequence in self._running.values()
            if not (sequence.follows is not None and self._following.still_waits(sequence)) and not sequence.paused
        ]
        ready.sort(key=lambda sequence: sequence.last_turn)
        return self._faults.choose(ready)

    # -- results ------------------------------------------------------------------------------------------------------

    def _commit_rows(self, batch: Batch, result: StepResult) -> Iterator[Emission]:
        for chunk in batch.chunks:
            sequence = self._running.get(chunk.uid)
            if sequence is None:
                continue
            was_prompt = not sequence.prompt_done
            if was_prompt:
                sequence.prompt_seconds += result.seconds
            else:
                sequence.completion_seconds += result.seconds
            self._cache.hold(sequence, chunk.items)
            if was_prompt and not sequence.pending:
                self._counters.prompt_done(sequence)
            if sequence.spec.progress and was_prompt:
                n_done = len(sequence.spec.prompt) - len(sequence.pending)
                yield chunk.uid, PromptProgress(n_done, len(sequence.spec.prompt), sequence.n_cached)
            if not chunk.output:
                if (failed := result.sampled.get(chunk.uid)) is not None:  # it could not be scored
                    yield self._finish(sequence, "error", error=failed.error)
                elif not sequence.pending:  # nothing is to be sampled
                    yield self._finish(sequence, "length")
                continue
            if chunk.uid in result.embeddings:
                yield chunk.uid, Embedded(result.embeddings[chunk.uid], sequence.usage)
                self._release(sequence)
            else:
                if was_prompt:
                    sequence.kind = sequence.kind._replace(scored=False)
                    if sequence.spec.tells_first_token:
                        yield chunk.uid, FirstToken()
                sequence.prompt_done = True
                yield from self._take(sequence, result.sampled[chunk.uid])

    def _take(self, sequence: Sequence, sampled: Sampled) -> Iterator[Emission]:
        """Take one sampled token: an end token ends the sequence, then stop strings, then the limit."""
        spec, text = sequence.spec, sequence.text
        if sampled.error is not None:
            yield self._finish(sequence, "error", error=sampled.error)
            return
        self._counters.n_sampled += 1
        piece = text.end(sampled) if sampled.is_end else text.push(sampled)
        if piece is not None:
            yield spec.uid, piece
        reason = finish_reason(text, sampled, spec)
        if reason is None and not spec.shift and len(sequence.slot.items) == self._capabilities.n_ctx:
            reason = "length"
        if reason is None:
            sequence.pending.append(sampled.token)
            return
        if reason == "length" and (rest := text.flush()) is not None:
            yield spec.uid, rest
        self._cache.trim_cut_text(sequence)
        yield self._finish(sequence, reason)

    def _make_space(self, batch: Batch) -> bool:
        """The KV cache is full, which slots of fixed size should prevent. Give up what idle slots hold; if there is
        nothing, let one sequence wait until another one ends; if there is only one, try with fewer rows. False when
        nothing of this is left."""
        if idle := [slot for slot in self._pool.slots if not slot.busy and slot.items]:
            for slot in idle:
                self._cache.empty(slot)
            return True
        generating = [sequence for sequence in self._running.values() if not sequence.in_embed_slot]
        if len(generating) > 1:
            victim = max(generating, key=lambda sequence: (sequence.spec.background, sequence.spec.uid))
            slot = victim.slot
            self._preempt(victim)
            self._cache.empty(slot)
            self._crowded = True
            return True
        return self._faults.found_no_space(batch)

    def _end_culprit(self, batch: Batch, result: StepResult) -> list[Emission]:
        """End the one sequence of a batch that failed, and empty its slot, which may hold anything now."""
        sequence = self._running.get(batch.chunks[0].uid)
        if sequence is None:
            return []
        self._cache.empty(sequence.slot)
        return [self._finish(sequence, "error", error=DecodeFailed(result.message or result.outcome.value))]

    def _finish(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> Emission:
        self._counters.finished(sequence)
        tokens = sequence.text.take_tokens()
        scores = tuple(score for _, score in sorted(sequence.scores.items()))
        finished = Finished(reason, sequence.usage, sequence.text.stop_matched, error, tokens, prompt_logprobs=scores)
        self._release(sequence)
        return sequence.spec.uid, finished
