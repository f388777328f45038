"""Who runs next: sequences in, steps out, results in, events out.

The scheduler never sees a context. `next_step` returns a value; whoever has a context carries it out in this order:

    step = scheduler.next_step()
    for op in step.memory_ops:      context.apply(op); after a False: scheduler.trim_failed(op), and start over
    result = context.decode(step.batch, ...)
    events = scheduler.commit(step.batch, result)

A sequence waits, runs in a slot, and ends. Running, it is given rows in every batch, except while its reader is behind
(paused), while another one decodes the start of the same prompt (it follows), or while work of another kind has its
turn. A background sequence may be put back to wait, with all it has, when an interactive one needs its slot.

Edits count as done once `next_step` returned them. Rows count only once they are committed: a batch may be thrown away
instead, and planned anew.

Rule 1: `slot.items` is what the KV cache holds once the edits returned so far are done. Nothing else remembers that.
Rule 2: `slot.items + sequence.pending` is everything the sequence's next token depends on.
Rule 3: whatever happens to one sequence, the others only ever lose time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

from trio_runner.core.batch import Batch, BatchKind, Chunk, DecodeOutcome, Sampled, StepResult, Wanting, plan_batch
from trio_runner.core.memory import MemoryOp, Trim
from trio_runner.core.pace import Pace
from trio_runner.core.prompt import Item, MediaRow, common_prefix, cut_after, cut_before
from trio_runner.core.sequence import Sequence, SequenceSpec, finish_reason
from trio_runner.core.shift import n_discard, shift_ops
from trio_runner.core.slots import Slot, SlotPool
from trio_runner.errors import DecodeFailed
from trio_runner.events import Embedded, Event, Finished, FinishReason, PromptProgress
from trio_runner.info import Capabilities, SchedulerStatistics

Emission: TypeAlias = tuple[int, Event | Embedded]
"""(uid, what its reader is told)"""


@dataclass(frozen=True, slots=True)
class Step:
    """Edits of the KV cache, then one batch; either may be empty, not both. `followers` are not in the batch, but wait
    for what it decodes."""

    memory_ops: tuple[MemoryOp, ...]
    batch: Batch
    followers: tuple[int, ...] = ()


MIN_FOLLOW = 32
"""Tokens that another sequence must spare a prompt to be worth waiting for."""
MAX_FAILED = 2
"""Batches that it shares with others may fail, with no culprit found, before a sequence is run alone. Each time it may
have to start over, and between two of them it may get no more than one batch: it would go on like that for ever."""
N_SHORT_STEPS = 10
"""Steps without streams, after one that was broken off, that are short: who has let go once, as with every key that is
pressed, will soon do so again, and what was begun is lost."""


class Scheduler:
    """Continuous batching over the slots of one context. Not thread-safe; knows no clock."""

    def __init__(self, capabilities: Capabilities, step_target: float | None = None) -> None:
        """`step_target`: see `EngineConfig.step_target`."""
        self._capabilities = capabilities
        self._pool = SlotPool(capabilities)
        self._pace = Pace(capabilities.max_rows, step_target)
        self._waiting: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}  # in the order in which they got their slots
        self._ops: list[MemoryOp] = []
        self._turn = 0
        self._kind: BatchKind | None = None  # of the last batch
        self._kind_turns: dict[BatchKind, int] = {}  # the last batch of each kind that there are rows of
        self._n_short_steps = 0
        # Rows that the next batch may have; fewer only while a batch that failed is being cut down.
        self._max_rows = capabilities.max_rows
        self._crowded = False  # the KV cache was full: nobody gets a slot before somebody gives one up
        self._suspects: list[int] = []
        self._n_batches = self._n_planned = self._n_aborted = self._n_prompt_rows = self._n_sampled = 0

    def submit(self, spec: SequenceSpec) -> None:
        """Queue a sequence. Interactive ones go before background ones, else first come, first served; embeddings
        have slots of their own. Uids must rise."""
        self._waiting[spec.uid] = Sequence(spec)

    def cancel(self, uid: int) -> None:
        """Forget a sequence, whatever it is doing; nothing more is said about it. Its slot keeps what was decoded,
        so that the same prompt goes on from there. A uid that is not known (any more) is ignored."""
        if uid in self._running:
            self._release(self._running[uid])
        elif uid in self._waiting:
            self._forget_waiting(uid)

    def expire(self, uid: int) -> list[Emission]:
        """End a sequence with what it has: its time is up. A uid that is not known (any more) is ignored."""
        sequence = self._running.get(uid) or self._waiting.get(uid)
        if sequence is None:
            return []
        if uid in self._waiting:
            self._forget_waiting(uid)
        rest = sequence.text.flush()
        return [*([] if rest is None else [(uid, rest)]), self._finish(sequence, "deadline")]

    def pause(self, uid: int) -> None:
        """Give a sequence no more rows; it keeps its slot. A uid that is not known is ignored."""
        self._set_paused(uid, True)

    def resume(self, uid: int) -> None:
        """Undo `pause`."""
        self._set_paused(uid, False)

    def _forget_waiting(self, uid: int) -> None:
        sequence = self._waiting.pop(uid)
        if sequence.left is not None:
            sequence.left.parked = False

    def _set_paused(self, uid: int, paused: bool) -> None:
        sequence = self._running.get(uid) or self._waiting.get(uid)
        if sequence is not None:
            sequence.paused = paused

    def statistics(self) -> SchedulerStatistics:
        return SchedulerStatistics(
            n_waiting=len(self._waiting),
            n_running=len(self._running),
            n_paused=sum(sequence.paused for sequence in self._running.values()),
            n_preempted=sum(sequence.left is not None for sequence in self._waiting.values()),
            n_cached_tokens=sum(len(slot.items) for slot in self._pool.slots),
            n_batches=self._n_batches,
            n_aborted=self._n_aborted,
            n_prompt_rows=self._n_prompt_rows,
            n_sampled=self._n_sampled,
        )

    def next_step(self) -> Step | None:
        """What to do next; None when there is nothing to do before something is submitted or resumed."""
        self._admit()
        batch = self._plan()
        ops, self._ops = tuple(self._ops), []
        return Step(ops, batch, self._followers(batch)) if ops or batch.chunks else None

    def trim_failed(self, op: MemoryOp) -> None:
        """This Trim was refused: the slot is emptied instead, and what it should hold is decoded again. The edits
        of the step that come after the refused one must still be carried out."""
        assert isinstance(op, Trim)
        slot = self._pool[op.slot]
        for sequence in self._running.values():
            if sequence.slot is slot:
                self._start_over(sequence)
                return
        self._ops.append(slot.trim(0))

    def commit(self, batch: Batch, result: StepResult) -> list[Emission]:
        """Take what came of a batch. The events are in the order in which readers should get them."""
        if result.outcome is DecodeOutcome.OK:
            self._n_batches += 1
            self._n_short_steps = max(self._n_short_steps - 1, 0)
            self._max_rows = self._capabilities.max_rows
            self._measure(batch, result.seconds)
            return list(self._commit_rows(batch, result))
        if result.outcome in (DecodeOutcome.ABORTED, DecodeOutcome.FATAL):
            self._keep_finished_rows(batch, result)
        if result.outcome is DecodeOutcome.ABORTED:
            self._n_aborted += 1
            self._n_short_steps = N_SHORT_STEPS
            return []
        if result.outcome is DecodeOutcome.NO_KV_SPACE and self._make_space(batch):
            return []
        return list(self._fail_or_suspect(batch, result))

    # -- admission --------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while (sequence := self._first_waiting(embedding=True)) is not None:
            embed_slot = self._pool.acquire_for_embedding(len(sequence.pending), sequence.spec.cache_key)
            if embed_slot is None:
                break
            self._start(sequence, embed_slot)
        while not self._crowded and (sequence := self._first_waiting(embedding=False)) is not None:
            acquired = self._acquire(sequence)
            while acquired is None and not sequence.spec.background and self._preempt_background():
                acquired = self._acquire(sequence)
            if acquired is None:
                return
            slot, ops = acquired
            self._ops += ops
            self._start(sequence, slot)
            if sequence.spec.cache_prompt:
                self._follow(sequence)

    def _acquire(self, sequence: Sequence) -> tuple[Slot, list[MemoryOp]] | None:
        spec = sequence.spec
        return self._pool.acquire(
            sequence.pending,
            reuse=spec.cache_prompt,
            own=sequence.left,
            cache_key=spec.cache_key,
            n_encoder_tokens=len(spec.encoder_tokens),
        )

    def _first_waiting(self, *, embedding: bool) -> Sequence | None:
        candidates = (
            (sequence.spec.background, sequence.spec.uid)
            for sequence in self._waiting.values()
            if self._takes_embed_slot(sequence) == embedding and not sequence.paused
        )
        first = min(candidates, default=None)
        return None if first is None else self._waiting[first[1]]

    def _takes_embed_slot(self, sequence: Sequence) -> bool:
        """Whether it runs in a slot for embeddings. Those slots together hold no more rows than one batch. A longer
        text, whose last row is its embedding, takes a slot like a generation."""
        spec = sequence.spec
        return spec.embedding and not (
            self._capabilities.embeds_last_row and len(spec.prompt) > self._capabilities.max_rows
        )

    def _start(self, sequence: Sequence, slot: Slot) -> None:
        del self._waiting[sequence.spec.uid]
        self._running[sequence.spec.uid] = sequence
        sequence.slot, sequence.last_turn = slot, self._turn
        n_held = len(slot.items)
        del sequence.pending[:n_held]
        if not sequence.prompt_done:
            sequence.n_cached = n_held if sequence.left is None else min(sequence.n_cached, n_held)

    def _preempt_background(self) -> bool:
        """Take the slot of the background sequence that came last; False when there is none."""
        specs = (sequence.spec for sequence in self._running.values())
        uids = [spec.uid for spec in specs if spec.background and not spec.embedding]
        if uids:
            self._preempt(self._running[max(uids)])
        return bool(uids)

    def _preempt(self, sequence: Sequence) -> None:
        """Let a running sequence wait, with all it has; what its slot holds stays as long as nobody takes it."""
        if len(sequence.items) > self._capabilities.n_ctx:
            self._shift(sequence)  # as it would have done in the next step
        sequence.pending[:0] = sequence.slot.items
        sequence.left = sequence.slot
        sequence.left.parked = True
        self._leave_slot(sequence)
        sequence.slot, sequence.leader = Slot(-1), None
        self._waiting[sequence.spec.uid] = sequence

    def _leave_slot(self, sequence: Sequence) -> None:
        """Give up the slot. Those who wait for what it holds take over what there is, before somebody else does."""
        del self._running[sequence.spec.uid]
        self._ops += self._pool.release(sequence.slot)
        for other in self._running.values():
            if other.leader is sequence:
                self._waits_for_leader(other)

    def _follow(self, sequence: Sequence) -> None:
        """Find a running sequence that will soon hold more of the start of this prompt than its own slot does."""
        items = sequence.items
        n_best = len(sequence.slot.items) + MIN_FOLLOW - 1
        for other in self._running.values():
            if other is sequence:
                return  # the ones after it may follow it themselves
            if other.paused or other.spec.embedding or not self._capabilities.can_trim or len(other.pending) == 1:
                continue
            if other.spec.cache_key != sequence.spec.cache_key:
                continue
            n_common = cut_before(items, min(common_prefix(other.items, items), len(items) - 1))
            if n_common > n_best:
                n_best = n_common
                sequence.leader, sequence.n_follow = other, n_common

    def _followers(self, batch: Batch) -> tuple[int, ...]:
        decoded = {chunk.uid for chunk in batch.chunks}

        def waits(sequence: Sequence) -> bool:
            leader = sequence.leader
            return leader is not None and (leader.spec.uid in decoded or waits(leader))

        return tuple(uid for uid, sequence in self._running.items() if waits(sequence))

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        leader = sequence.leader
        if leader is None:
            return False
        runs = self._running.get(leader.spec.uid) is leader and not leader.paused
        if runs and len(leader.slot.items) < sequence.n_follow:
            return True
        sequence.leader = None
        items, n_held = sequence.items, len(sequence.slot.items)
        self._ops += self._pool.extend(sequence.slot, items)
        sequence.pending = items[len(sequence.slot.items) :]
        if not sequence.prompt_done:
            sequence.n_cached += len(sequence.slot.items) - n_held
        self._follow(sequence)
        return sequence.leader is not None

    # -- planning ---------------------------------------------------------------------------------------------------

    def _plan(self) -> Batch:
        ready = self._in_turn()
        if not ready:
            return Batch(())
        by_kind: dict[BatchKind, list[Sequence]] = {}
        for sequence in ready:
            if len(sequence.slot.items) + len(sequence.pending) > self._capabilities.n_ctx:
                self._shift(sequence)
            by_kind.setdefault(self._kind_of(sequence), []).append(sequence)
        kind = self._kind = self._whose_turn(by_kind)
        self._n_planned += 1
        # Who decodes waits for this batch, whether in it or not.
        n_decoding = sum(sequence.decoding for sequence in ready)
        n_prompting = sum(not all(sequence.decoding for sequence in sequences) for sequences in by_kind.values())
        chunks = self._plan_rows(kind, by_kind[kind], n_decoding, n_prompting)
        self._turn += 1
        self._kind_turns[kind] = self._turn
        for chunk in chunks:
            self._running[chunk.uid].last_turn = self._turn
        return Batch(chunks, kind, self._n_planned)

    def _whose_turn(self, by_kind: dict[BatchKind, list[Sequence]]) -> BatchKind:
        """The kind whose last batch is longest ago; before the first one, who waited longest for it counts."""
        last = self._kind_turns
        self._kind_turns = {
            kind: last[kind] if kind in last else min(sequence.last_turn for sequence in sequences)
            for kind, sequences in by_kind.items()
        }
        return min(by_kind, key=lambda kind: (self._kind_turns[kind], kind == self._kind))

    def _in_turn(self) -> list[Sequence]:
        """The sequences that want rows, who waited longest first; one alone while a failure is traced, or if too many
        of its batches have failed."""
        self._suspects = [uid for uid in self._suspects if uid in self._running]
        # A paused one, too, takes what it has waited for: its leader may shift it away later.
        ready = [
            sequence
            for sequence in self._running.values()
            if not self._waits_for_leader(sequence) and not sequence.paused
        ]
        suspects = [sequence for sequence in ready if sequence.spec.uid in self._suspects]
        if suspects:
            return suspects[:1]
        ready.sort(key=lambda sequence: sequence.last_turn)
        if ready and ready[0].n_failed >= MAX_FAILED:
            return ready[:1]
        return [sequence for sequence in ready if sequence.n_failed < MAX_FAILED]

    def _wants_vector(self, sequence: Sequence) -> bool:
        """The next rows of this sequence belong in an embeddings batch."""
        return sequence.spec.embedding and (not self._capabilities.embeds_last_row or len(sequence.pending) == 1)

    def _kind_of(self, sequence: Sequence) -> BatchKind:
        """Of the next rows of this sequence."""
        first = sequence.pending[0]
        if isinstance(first, MediaRow):
            return sequence.kind.for_media(first.media)
        return sequence.kind._replace(embedding=True) if self._wants_vector(sequence) else sequence.kind

    def _plan_rows(
        self, kind: BatchKind, sequences: list[Sequence], n_decoding: int, n_prompting: int
    ) -> tuple[Chunk, ...]:
        prompt_rows = self._capabilities.max_rows
        if n_decoding or not kind.embedding:
            prompt_rows = self._pace.prompt_rows(n_decoding, short=self._n_short_steps > 0)
        if n_decoding and n_prompting > 1:
            # Between two tokens of a stream comes a batch of each kind: those that have prompts share the time.
            prompt_rows = max(prompt_rows // n_prompting, 1)
        wanting = map(self._wanting, sequences)
        chunks = plan_batch(wanting, max_rows=self._max_rows, prompt_rows=prompt_rows)
        first_embed_slot = self._capabilities.first_embed_slot
        self._ops += self._pool.make_room(sum(len(chunk.items) for chunk in chunks if chunk.slot < first_embed_slot))
        return chunks

    def _wanting(self, sequence: Sequence) -> Wanting:
        """As many of the next rows as may go into one batch, were there room: tokens up to an image, or one image."""
        spec, slot, pending = sequence.spec, sequence.slot, sequence.pending
        start, offset = len(slot.items), -slot.position_lag
        if sequence.decoding:
            return Wanting(
                spec.uid, slot.id, start, pending, decoding=True, offset=offset, encoder_tokens=spec.encoder_tokens
            )
        wants_vector = self._wants_vector(sequence)
        if spec.embedding and not wants_vector:
            pending = pending[:-1]
        first = pending[0]
        if isinstance(first, MediaRow):
            rows = pending[: first.media.n_rows - first.row]
        else:
            rows = list(
                takewhile(lambda item: not isinstance(item, MediaRow), pending[: self._capabilities.max_rows + 1])
            )
        return Wanting(
            spec.uid,
            slot.id,
            start,
            rows,
            decoding=False,
            output=wants_vector or (not spec.embedding and len(rows) == len(pending)),
            whole=wants_vector or (isinstance(first, MediaRow) and first.media.whole),
            offset=offset,
            encoder_tokens=spec.encoder_tokens,
        )

    def _shift(self, sequence: Sequence) -> None:
        slot = sequence.slot
        n_held, n_keep = len(slot.items), sequence.spec.n_keep
        discard = n_discard(n_held, n_ctx=self._capabilities.n_ctx, n_keep=n_keep)
        discard = cut_after(slot.items, n_keep + discard) - n_keep  # no half of an image
        can_slide = self._capabilities.can_shift and self._capabilities.can_trim
        trims = self._pool.unshare(slot, n_keep + discard) if can_slide else None
        del slot.items[n_keep : n_keep + discard]
        if trims is None:
            self._start_over(sequence)
        else:
            self._ops += [*trims, *shift_ops(slot.id, n_held, n_keep=n_keep, discard=discard)]
            slot.n_shared_cells = min(slot.n_shared_cells, n_keep)

    def _start_over(self, sequence: Sequence) -> None:
        """Empty the slot and decode again all that it should hold."""
        if not sequence.prompt_done:
            sequence.n_cached = 0
        sequence.pending[:0] = sequence.slot.items
        self._ops.append(sequence.slot.trim(0))

    # -- results ----------------------------------------------------------------------------------------------------

    def _measure(self, batch: Batch, seconds: float) -> None:
        if not batch.kind.embedding:
            sequences = (self._running.get(chunk.uid) for chunk in batch.chunks)
            n_decoding = sum(sequence is not None and sequence.decoding for sequence in sequences)
            self._pace.measured(n_decoding, batch.n_rows, seconds)

    def _commit_rows(self, batch: Batch, result: StepResult) -> Iterator[Emission]:
        for chunk in batch.chunks:
            if chunk.uid in self._suspects:
                self._suspects.remove(chunk.uid)
            sequence = self._running.get(chunk.uid)
            if sequence is None:
                continue
            was_decoding = sequence.prompt_done
            if was_decoding:
                sequence.completion_seconds += result.seconds
            else:
                sequence.prompt_seconds += result.seconds
            self._hold(sequence, chunk.items)
            if sequence.spec.progress and not was_decoding:
                n_done = len(sequence.spec.prompt) - len(sequence.pending)
                yield chunk.uid, PromptProgress(n_done, len(sequence.spec.prompt), sequence.n_cached)
            if not chunk.output:
                continue
            if chunk.uid in result.embeddings:
                yield chunk.uid, Embedded(result.embeddings[chunk.uid], sequence.usage)
                self._release(sequence)
            else:
                sequence.prompt_done = True
                self._n_sampled += 1
                yield from self._take(sequence, result.sampled[chunk.uid])

    def _take(self, sequence: Sequence, sampled: Sampled) -> Iterator[Emission]:
        """One sampled token: end token, then stop strings, then the limit, then on."""
        spec, text = sequence.spec, sequence.text
        if sampled.error is not None:
            yield self._finish(sequence, "error", error=sampled.error)
            return
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
        self._forget_cut(sequence)
        yield self._finish(sequence, reason)

    def _hold(self, sequence: Sequence, items: tuple[Item, ...]) -> None:
        """`items`, which were pending, are in the KV cache now."""
        if self._capabilities.has_memory:
            sequence.slot.hold(items)
        if not sequence.prompt_done:
            self._n_prompt_rows += len(items)
        del sequence.pending[: len(items)]

    def _forget_cut(self, sequence: Sequence) -> None:
        """Drop tokens whose text a stop string cut off: the conversation will go on without them. The token sampled
        last was never decoded."""
        slot, n_cut = sequence.slot, sequence.text.n_cut() - 1
        if sequence.text.stop_matched is not None and n_cut > 0 and self._capabilities.can_trim:
            # After a context shift there may be fewer of them than were sampled.
            self._ops.append(slot.trim(cut_before(slot.items, max(len(slot.items) - n_cut, 0))))

    def _keep_finished_rows(self, batch: Batch, result: StepResult) -> None:
        """Whole micro-batches of a batch that was broken off are in the KV cache: keep them, they cost time. A last
        row that was decoded but not sampled goes again, for its logits are gone."""
        needs_all_rows = batch.kind.embedding and not self._capabilities.embeds_last_row
        for chunk in batch.chunks:
            sequence = self._running.get(chunk.uid)
            if sequence is None or not self._capabilities.has_memory:
                continue
            n_kept = _n_kept(sequence.slot, chunk, result.kept.get(chunk.uid, 0))
            if needs_all_rows or n_kept is None:
                self._start_over(sequence)
                continue
            n_useful = cut_before(chunk.items, n_kept - (chunk.output and n_kept == len(chunk.items)))
            if n_useful < n_kept:
                self._ops.append(Trim(chunk.slot, chunk.position + n_useful))
            self._hold(sequence, chunk.items[:n_useful])

    def _make_space(self, batch: Batch) -> bool:
        """The KV cache is full, which slots of fixed size should prevent: give up what idle slots hold; then let one
        sequence wait until another one ends; then try with fewer rows. False when none of it is left."""
        idle = [slot for slot in self._pool.slots if not slot.busy and slot.items]
        self._ops += [slot.trim(0) for slot in idle]
        if idle:
            return True
        generating = [sequence for sequence in self._running.values() if not sequence.spec.embedding]
        if len(generating) > 1:
            victim = max(generating, key=lambda sequence: (sequence.spec.background, sequence.spec.uid))
            slot = victim.slot
            self._preempt(victim)
            self._ops.append(slot.trim(0))
            self._crowded = True
            return True
        # Whoever is in this batch, one by one: that others find space, with another kind of rows, says nothing.
        self._suspects = [chunk.uid for chunk in batch.chunks]
        self._max_rows //= 2
        if self._max_rows:
            return True
        self._max_rows = self._capabilities.max_rows
        return False

    def _fail_or_suspect(self, batch: Batch, result: StepResult) -> Iterator[Emission]:
        """A batch of one sequence has found the culprit; the sequences of a larger one are tried one by one."""
        if len(batch.chunks) > 1:
            self._suspects = [chunk.uid for chunk in batch.chunks]
            for uid in self._suspects:
                if uid in self._running:
                    self._running[uid].n_failed += 1
            return
        for chunk in batch.chunks:
            if (sequence := self._running.get(chunk.uid)) is not None:
                for other in self._running.values():
                    other.n_failed = 0  # that explains it
                error = DecodeFailed(result.message or result.outcome.value)
                self._ops.append(sequence.slot.trim(0))
                yield self._finish(sequence, "error", error=error)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> Emission:
        tokens = sequence.text.take_tokens()
        finished = Finished(reason, sequence.usage, sequence.text.stop_matched, error, tokens)
        self._release(sequence)
        return sequence.spec.uid, finished

    def _release(self, sequence: Sequence) -> None:
        if sequence.spec.uid in self._running:
            self._leave_slot(sequence)
            self._crowded = self._crowded and self._takes_embed_slot(sequence)


def _n_kept(slot: Slot, chunk: Chunk, length: int) -> int | None:
    """How many rows of a chunk that `slot` did not hold before are in the KV cache, which has `length` positions of it
    now; None: not even those that it held."""
    if length == slot.length:
        return 0
    if chunk.media is not None and chunk.media.shares_positions:
        return len(chunk.items) if length > chunk.position else None
    n_kept = length - chunk.position
    return n_kept if 0 <= n_kept <= len(chunk.items) else None
