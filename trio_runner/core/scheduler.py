"""Who runs next: sequences in, steps out, results in, events out.

The scheduler never sees a context. `next_step` returns a value; whoever has a context carries it out in this order:

    step = scheduler.next_step()
    for op in step.memory_ops:      context.apply(op); after a False: scheduler.trim_failed(op), and start over
    result = context.decode(step.batch, ...)
    events = scheduler.commit(step.batch, result)

Edits count as done once `next_step` returned them. Rows count only once they are committed: a batch may be thrown away
instead, and planned anew.

Rule 1: `slot.tokens` is what the KV cache holds once the edits returned so far are done. Nothing else remembers that.
Rule 2: `slot.tokens + sequence.pending` is everything the sequence's next token depends on.
Rule 3: whatever happens to one sequence, the others only ever lose time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from trio_runner.config import CachePolicy
from trio_runner.core.batch import Batch, Chunk, DecodeOutcome, Sampled, StepResult, Wanting, plan_batch
from trio_runner.core.limits import Limits
from trio_runner.core.memory import MemoryOp, Trim
from trio_runner.core.sequence import Sequence, SequenceSpec, finish_reason
from trio_runner.core.shift import n_discard, shift_ops
from trio_runner.core.slots import SlotPool
from trio_runner.errors import NativeError
from trio_runner.events import Embedded, Event, Finished, FinishReason, PromptProgress

Emission: TypeAlias = tuple[int, Event | Embedded]
"""(uid, what its reader is told)"""


@dataclass(frozen=True, slots=True)
class Step:
    """Edits of the KV cache, then one batch; either may be empty, not both."""

    memory_ops: tuple[MemoryOp, ...]
    batch: Batch


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    """How full the scheduler is, for people and metrics."""

    n_waiting: int = 0
    n_running: int = 0
    n_paused: int = 0
    n_cached_tokens: int = 0
    """Positions of all slots that hold something, in use or kept for the next prompt."""


class Scheduler:
    """Continuous batching over the slots of one context. Not thread-safe; knows no clock."""

    def __init__(self, limits: Limits, *, cache_policy: CachePolicy = "longest") -> None:
        self._limits = limits
        self._pool = SlotPool(limits, cache_policy)
        self._waiting: dict[int, SequenceSpec] = {}  # in the order they came
        self._running: dict[int, Sequence] = {}
        self._ops: list[MemoryOp] = []
        self._turn = 0
        self._embeddings_turn = False
        # Rows and sequences that the next batch may have; fewer only while a batch that failed is being cut down.
        self._max_rows = limits.max_rows
        self._suspects: list[int] = []

    def submit(self, spec: SequenceSpec) -> None:
        """Queue a sequence: first come, first served."""
        self._waiting[spec.uid] = spec

    def cancel(self, uid: int) -> None:
        """Forget a sequence, whatever it is doing; nothing more is said about it. Its slot keeps what was decoded,
        so that the same prompt goes on from there. A uid that is not known (any more) is ignored."""
        if uid in self._running:
            self._release(self._running[uid])
        else:
            self._waiting.pop(uid, None)

    def pause(self, uid: int) -> None:
        """Give a sequence no more rows; it keeps its slot. A uid that is not running is ignored."""
        if uid in self._running:
            self._running[uid].paused = True

    def resume(self, uid: int) -> None:
        """Undo `pause`."""
        if uid in self._running:
            self._running[uid].paused = False

    def statistics(self) -> SchedulerStatistics:
        return SchedulerStatistics(
            n_waiting=len(self._waiting),
            n_running=len(self._running),
            n_paused=sum(sequence.paused for sequence in self._running.values()),
            n_cached_tokens=sum(len(slot.tokens) for slot in self._pool.slots),
        )

    def next_step(self) -> Step | None:
        """What to do next; None when there is nothing to do before something is submitted or resumed."""
        self._admit()
        batch = self._plan()
        ops, self._ops = tuple(self._ops), []
        return Step(ops, batch) if ops or batch.chunks else None

    def trim_failed(self, op: MemoryOp) -> None:
        """This Trim was refused: the slot is emptied instead, and what it should hold is decoded again. The edits
        of the step that come after the refused one must still be carried out."""
        assert isinstance(op, Trim)
        slot = self._pool.slots[op.slot]
        for sequence in self._running.values():
            if sequence.slot is slot:
                self._start_over(sequence)
                return
        self._ops.append(slot.trim(0))

    def commit(self, batch: Batch, result: StepResult) -> list[Emission]:
        """Take what came of a batch. The events are in the order in which readers should get them."""
        if result.outcome is DecodeOutcome.OK:
            self._max_rows = self._limits.max_rows
            return list(self._commit_rows(batch, result))
        if result.outcome in (DecodeOutcome.ABORTED, DecodeOutcome.FATAL):
            self._keep_finished_rows(batch, result)
        if result.outcome is DecodeOutcome.ABORTED:
            return []
        if result.outcome is DecodeOutcome.NO_KV_SPACE and self._make_space():
            return []
        return list(self._fail_or_suspect(batch, result))

    # -- planning ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting:
            spec = next(iter(self._waiting.values()))
            acquired = self._pool.acquire(spec.prompt, cache_prompt=spec.cache_prompt and not spec.embedding)
            if acquired is None:
                return
            del self._waiting[spec.uid]
            slot, ops = acquired
            self._ops += ops
            n_cached = len(slot.tokens)
            self._running[spec.uid] = Sequence(spec, slot, list(spec.prompt[n_cached:]), n_cached)

    def _plan(self) -> Batch:
        ready = self._in_turn()
        if not ready:
            return Batch(())
        embed = [sequence for sequence in ready if sequence.spec.embedding]
        generate = [sequence for sequence in ready if not sequence.spec.embedding]
        # One batch computes either logits or vectors: where both are wanted they take turns.
        self._embeddings_turn = bool(embed) and (not generate or not self._embeddings_turn)
        return self._plan_embeddings(embed) if self._embeddings_turn else self._plan_tokens(generate)

    def _in_turn(self) -> list[Sequence]:
        """The sequences that want rows, starting with another one each time; one alone while a failure is traced."""
        self._suspects = [uid for uid in self._suspects if uid in self._running]
        ready = [sequence for sequence in self._running.values() if not sequence.paused]
        suspects = [sequence for sequence in ready if sequence.spec.uid in self._suspects]
        if suspects:
            return suspects[:1]
        if ready:
            self._turn = (self._turn + 1) % len(ready)
        return ready[self._turn :] + ready[: self._turn]

    def _plan_tokens(self, sequences: list[Sequence]) -> Batch:
        for sequence in sequences:
            if len(sequence.slot.tokens) + len(sequence.pending) > self._limits.n_ctx:
                self._shift(sequence)
        return plan_batch(
            (
                Wanting(
                    sequence.spec.uid,
                    sequence.slot.id,
                    len(sequence.slot.tokens),
                    sequence.pending,
                    sequence.decoding,
                )
                for sequence in sequences
            ),
            self._max_rows,
        )

    def _plan_embeddings(self, sequences: list[Sequence]) -> Batch:
        """Whole prompts only: pooling needs all rows of a sequence in one micro-batch."""
        chunks: list[Chunk] = []
        remain = self._limits.max_rows
        for sequence in sequences:
            if len(sequence.pending) <= remain:
                remain -= len(sequence.pending)
                chunks.append(
                    Chunk(sequence.spec.uid, sequence.slot.id, 0, tuple(sequence.pending), output=True),
                )
        return Batch(tuple(chunks), embeddings=True)

    def _shift(self, sequence: Sequence) -> None:
        slot = sequence.slot
        n_held, n_keep = len(slot.tokens), sequence.spec.n_keep
        discard = n_discard(n_held, n_ctx=self._limits.n_ctx, n_keep=n_keep)
        del slot.tokens[n_keep : n_keep + discard]
        if self._limits.can_shift and self._limits.can_trim and slot.n_shared <= n_keep + discard:
            self._ops += shift_ops(slot.id, n_held, n_keep=n_keep, discard=discard)
            slot.n_shared = min(slot.n_shared, n_keep)
        else:
            self._start_over(sequence)

    def _start_over(self, sequence: Sequence) -> None:
        """Empty the slot and decode again all that it should hold."""
        if not sequence.prompt_done:
            sequence.n_cached = 0
        sequence.pending[:0] = sequence.slot.tokens
        self._ops.append(sequence.slot.trim(0))

    # -- results ----------------------------------------------------------------------------------------------------

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
            self._hold(sequence, chunk.tokens)
            if sequence.spec.progress and not was_decoding:
                n_done = len(sequence.spec.prompt) - len(sequence.pending)
                yield chunk.uid, PromptProgress(n_done, len(sequence.spec.prompt), sequence.n_cached)
            if not chunk.output:
                continue
            if chunk.uid in result.vectors:
                yield chunk.uid, Embedded(result.vectors[chunk.uid], sequence.usage)
                self._release(sequence)
            else:
                sequence.prompt_done = True
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
        if reason is None and not spec.shift and len(sequence.slot.tokens) == self._limits.n_ctx:
            reason = "length"
        if reason is None:
            sequence.pending.append(sampled.token)
            return
        if reason == "length" and (rest := text.flush()) is not None:
            yield spec.uid, rest
        self._forget_cut(sequence)
        yield self._finish(sequence, reason)

    def _hold(self, sequence: Sequence, tokens: tuple[int, ...]) -> None:
        """`tokens`, which were pending, are in the KV cache now."""
        if self._limits.has_memory:
            sequence.slot.tokens += tokens
        del sequence.pending[: len(tokens)]

    def _forget_cut(self, sequence: Sequence) -> None:
        """Drop tokens whose text a stop string cut off: the conversation will go on without them. The token sampled
        last was never decoded."""
        n_cut = min(sequence.text.n_cut() - 1, len(sequence.slot.tokens))
        if sequence.text.stop_matched is not None and n_cut > 0 and self._limits.can_trim:
            self._ops.append(sequence.slot.trim(len(sequence.slot.tokens) - n_cut))

    def _keep_finished_rows(self, batch: Batch, result: StepResult) -> None:
        """Whole micro-batches of a batch that was broken off are in the KV cache: keep them, they cost time. A last
        row that was decoded but not sampled goes again, for its logits are gone."""
        for chunk in batch.chunks:
            sequence = self._running.get(chunk.uid)
            if sequence is None or not self._limits.has_memory:
                continue
            n_held = result.kept.get(chunk.uid, 0)
            if sequence.spec.embedding or not chunk.start <= n_held <= chunk.stop:
                self._start_over(sequence)
                continue
            self._hold(sequence, chunk.tokens[: n_held - chunk.start])
            if chunk.output and n_held == chunk.stop:
                sequence.pending.insert(0, chunk.tokens[-1])
                self._ops.append(sequence.slot.trim(n_held - 1))

    def _make_space(self) -> bool:
        """The KV cache is full, which slots of fixed size should prevent: give up what idle slots hold, then try with
        fewer rows. False when neither is left."""
        idle = [slot for slot in self._pool.slots if not slot.busy and slot.tokens]
        self._ops += [slot.trim(0) for slot in idle]
        if idle:
            return True
        self._max_rows //= 2
        if self._max_rows:
            return True
        self._max_rows = self._limits.max_rows
        return False

    def _fail_or_suspect(self, batch: Batch, result: StepResult) -> Iterator[Emission]:
        """A batch of one sequence has found the culprit; the sequences of a larger one are tried one by one."""
        if len(batch.chunks) > 1:
            self._suspects = [chunk.uid for chunk in batch.chunks]
            return
        for chunk in batch.chunks:
            if (sequence := self._running.get(chunk.uid)) is not None:
                error = NativeError("decode", 0, result.message or result.outcome.value)
                self._ops.append(sequence.slot.trim(0))
                yield self._finish(sequence, "error", error=error)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: Exception | None = None) -> Emission:
        tokens = sequence.text.take_tokens()
        finished = Finished(reason, sequence.usage, sequence.text.stop_matched, error, tokens)
        self._release(sequence)
        return sequence.spec.uid, finished

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.spec.uid]
        self._pool.release(sequence.slot)
