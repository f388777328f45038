"""A scheduler and a toy context without an engine, for tests of the scheduler.

A `World` does what the decode loop does, in one thread and without clocks, and writes down all that happens. A test
submits requests, makes steps, and looks at what readers were told:

    world = make_world(n_slots=2)
    first = world.submit(prompt=(A, B), max_tokens=5)       # returns the uid: 0, 1, 2, ...
    world.step()                                            # one batch
    world.step(Interruption(DecodeOutcome.ABORTED, 1))      # one batch that is aborted after its first row
    world.run()                                             # until nothing is left to do
    assert world.outcome(first) == world.alone(first)       # the same text as alone

The toy's next token depends on every item that the KV cache really holds for a sequence, so that every mistake of the
scheduler makes another text than `alone` (tests/core/oracle.py). After each move the world also checks what must always
hold (tests/core/invariants.py, and `Scheduler.check_integrity`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Required, TypedDict, Unpack

import numpy as np

from tests.core import invariants
from tests.core.oracle import Alone, alone
from trio_runner.core.batch import AdapterSet, Batch, DecodeOutcome, StepResult
from trio_runner.core.following import MIN_FOLLOW
from trio_runner.core.memory import MemoryOp
from trio_runner.core.pace import Pace
from trio_runner.core.ports import Adapter, EncodedMedia, Sampler
from trio_runner.core.prompt import Item, Media, MediaRow, cut_before
from trio_runner.core.scheduler import Scheduler
from trio_runner.core.sequence import FirstToken, SequenceSpec
from trio_runner.core.snapshot import SchedulerState
from trio_runner.events import Embedded, Event, Finished, TextPiece
from trio_runner.info import Capabilities
from trio_runner.sampling import SamplingParams
from trio_runner.testing import N_EMBD, Interruption, ToyAdapter, ToyContext, ToySampler

A, B, C = 97, 98, 99
"""Tokens of prompts."""


class Fields(TypedDict, total=False):
    """The fields of a SequenceSpec, without its uid."""

    prompt: Required[tuple[Item, ...]]
    encoder_tokens: tuple[int, ...]
    adapters: AdapterSet
    n_keep: int
    max_tokens: int | None
    stop: tuple[str, ...]
    cache_prompt: bool
    share_prompt: bool
    preferred_slot: int | None
    shift: bool
    embedding: bool
    background: bool
    progress: bool
    logprobs: bool
    prompt_logprobs: int
    tells_first_token: bool


@dataclass
class World:
    """See above. All sets and keys are of uids."""

    capabilities: Capabilities
    slowness: float = 1.0
    """Milliseconds that one row of a batch takes."""
    min_follow: int = MIN_FOLLOW
    pace: Pace | None = None
    """Used by the scheduler instead of its own."""
    poison: dict[int, DecodeOutcome] = field(default_factory=dict)
    """What becomes of every batch with rows of this sequence."""
    on_batch: Callable[[Batch], None] | None = None
    """Called before each batch is decoded."""
    specs: dict[int, SequenceSpec] = field(default_factory=dict)
    """All requests that were submitted."""
    events: dict[int, list[Event | Embedded | FirstToken]] = field(default_factory=dict)
    """What readers were told."""
    cancelled: set[int] = field(default_factory=set)
    expired: set[int] = field(default_factory=set)
    paused: set[int] = field(default_factory=set)
    may_fail: set[int] = field(default_factory=set)
    """Sequences that were alone in a batch that failed."""
    preempted: set[int] = field(default_factory=set)
    """Sequences that had to give up a slot."""
    overtaken: set[int] = field(default_factory=set)
    """Sequences that were paused while they waited: others may go before them."""
    n_prefilled: dict[int, int] = field(default_factory=dict)
    """Rows of prompts that were decoded."""
    n_passed_over: dict[int, int] = field(default_factory=dict)
    """Batches since a sequence that needs rows had some."""
    ops: list[MemoryOp] = field(default_factory=list)
    """All edits of the KV cache so far."""
    numbers: set[int] = field(default_factory=set)
    """The numbers of all batches so far."""
    n_steps: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.capabilities, pace=self.pace, min_follow=self.min_follow)
        self.context = ToyContext(self.capabilities, on_decode=lambda batch: self._interruption)
        self.samplers: dict[int, Sampler] = {}
        self.media: dict[Media, EncodedMedia] = {}
        self.adapters: dict[int, Adapter] = {}
        self.sampled: set[int] = set()
        self._interruption: Interruption | None = None

    # -- moves --------------------------------------------------------------------------------------------------------

    def submit(self, sampling: SamplingParams | None = None, **fields: Unpack[Fields]) -> int:
        """Returns the uid."""
        return self.add(SequenceSpec(uid=0, **fields), sampling)

    def add(self, spec: SequenceSpec, sampling: SamplingParams | None = None) -> int:
        """Submit this request under the next uid, which is returned."""
        uid = len(self.specs)
        spec = self.specs[uid] = replace(spec, uid=uid)
        self.events[uid] = []
        self.n_prefilled[uid] = 0
        if spec.samples:
            self.samplers[uid] = ToySampler(sampling or SamplingParams())
        for item in spec.prompt:
            if isinstance(item, MediaRow):
                self.media[item.media] = EncodedMedia(np.zeros((item.media.n_rows, N_EMBD), np.float32))
        for adapter, _ in spec.adapters:
            self.adapters[adapter] = ToyAdapter(str(adapter))
        self.scheduler.submit(spec)
        self.scheduler.check_integrity()
        return uid

    def cancel(self, uid: int) -> None:
        if not self.finished(uid):
            self.cancelled.add(uid)
        self.scheduler.cancel(uid)
        self.scheduler.check_integrity()

    def expire(self, uid: int) -> None:
        is_live = uid in self.running or uid in self.waiting
        emissions = self.scheduler.expire(uid)
        self.scheduler.check_integrity()
        assert bool(emissions) == is_live
        for told, event in emissions:
            assert told == uid
            self.events[uid].append(event)
        if is_live:
            assert self.last(uid).reason == "deadline"
            assert uid not in self.running
            assert uid not in self.waiting
            self.expired.add(uid)

    def pause(self, uid: int) -> None:
        if uid in self.running or uid in self.waiting:
            self.paused.add(uid)
        if uid in self.waiting:
            self.overtaken.add(uid)
        self.scheduler.pause(uid)
        self.scheduler.check_integrity()

    def resume(self, uid: int) -> None:
        self.paused.discard(uid)
        self.scheduler.resume(uid)
        self.scheduler.check_integrity()

    def step(self, interruption: Interruption | None = None, *, discard: bool = False) -> bool:
        """One step. False when there is nothing to do. `discard`: throw the batch away after the edits, as the decode
        loop does when mail has come."""
        before = self.state
        step = self.scheduler.next_step()
        self.scheduler.check_integrity()
        after = self.state
        self.preempted |= before.running.keys() - after.running.keys()
        self.overtaken |= after.waiting.keys() & self.paused
        invariants.check_admission(self, before, after)
        invariants.check_following(self, after)
        invariants.check_waiting(self, after)
        if step is None:
            invariants.check_held(self, after)
            assert not after.running.keys() - self.paused, "a sequence could go on"
            return False
        self.n_steps += 1
        assert step.memory_ops or step.batch.chunks, "an empty step"
        if not self._apply(step.memory_ops):
            return True
        invariants.check_held(self, after)
        invariants.check_batch(self, after, step.batch)
        if step.batch.chunks and not discard:
            self._decode(step.batch, interruption)
            self.scheduler.check_integrity()
        return True

    def run(self, max_steps: int | None = None) -> None:
        """Until nothing is left to do."""
        most = self.n_steps + (self._step_bound() if max_steps is None else max_steps)
        while self.step():
            assert self.n_steps <= most, "no end in sight"

    def _apply(self, ops: tuple[MemoryOp, ...]) -> bool:
        """False: a trim was refused, and the batch must be planned again."""
        trims_held = True
        for op in ops:
            self.ops.append(op)
            if not self.context.apply(op):
                self.scheduler.trim_failed(op)
                self.scheduler.check_integrity()
                trims_held = False
        return trims_held

    def _decode(self, batch: Batch, interruption: Interruption | None) -> None:
        uids = [chunk.uid for chunk in batch.chunks]
        for uid in uids:
            if uid in self.poison:
                outcome = self.poison[uid]
                interruption = Interruption(outcome, 3 if outcome is DecodeOutcome.FATAL else 0)
        if interruption is not None and len(uids) == 1 and interruption.outcome is not DecodeOutcome.ABORTED:
            self.may_fail.update(uids)
        invariants.check_every_sequence_is_served(self, batch, failed=interruption is not None)
        if self.on_batch is not None:
            self.on_batch(batch)
        self._interruption = interruption
        result = self.context.decode(batch, self.samplers, media=self.media, adapters=self.adapters)
        self._count_prefilled(batch, result)
        result = replace(result, seconds=result.seconds * self.slowness)
        for uid, event in self.scheduler.commit(batch, result):
            assert uid in uids, "an event of a sequence that was not in the batch"
            assert uid not in self.cancelled, "an event after the cancellation"
            assert not self.finished(uid), "an event after the last one"
            self.events[uid].append(event)
        if result.outcome is DecodeOutcome.NO_KV_SPACE:
            self.preempted |= set(self.waiting)

    def _count_prefilled(self, batch: Batch, result: StepResult) -> None:
        running = self.state.running
        last_rows = {
            chunk.uid
            for chunk in batch.chunks
            if chunk.uid in running and len(chunk.items) == len(running[chunk.uid].pending)  # else it was cancelled
        }
        is_lost = batch.kind.scored or (batch.kind.embedding and not self.capabilities.embeds_last_row)
        for chunk in batch.chunks:
            n_rows = len(chunk.items)
            if result.outcome is not DecodeOutcome.OK:
                # What an aborted batch has left counts, except the last row that the sequence needs.
                n_rows = max(len(self.context.held(chunk.slot)) - chunk.start, 0)
                n_rows = cut_before(chunk.items, n_rows - (chunk.uid in last_rows and n_rows == len(chunk.items)))
                if is_lost or result.outcome not in (DecodeOutcome.ABORTED, DecodeOutcome.FATAL):
                    n_rows = 0
            if chunk.uid not in self.sampled:
                self.n_prefilled[chunk.uid] += n_rows
            if chunk.output and result.outcome is DecodeOutcome.OK:
                self.sampled.add(chunk.uid)

    def _step_bound(self) -> int:
        """Steps that all sequences take one row after the other, even if each token shifts and decodes all again."""
        n_ctx = self.capabilities.n_ctx
        live = [spec for uid, spec in self.specs.items() if not self.finished(uid)]
        lengths = [0 if spec.embedding else alone(spec, n_ctx).n_sampled for spec in live]
        return 100 + 2 * sum(n_ctx + n_sampled * n_ctx for n_sampled in lengths)

    # -- what came of it ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> SchedulerState:
        return self.scheduler.state()

    @property
    def running(self) -> list[int]:
        return list(self.state.running)

    @property
    def waiting(self) -> list[int]:
        return list(self.state.waiting)

    def finished(self, uid: int) -> bool:
        """Whether its reader was told the last event."""
        return bool(self.events[uid]) and isinstance(self.events[uid][-1], (Finished, Embedded))

    def last(self, uid: int) -> Finished:
        event = self.events[uid][-1]
        assert isinstance(event, Finished)
        return event

    def text(self, uid: int) -> str:
        return "".join(event.text for event in self.events[uid] if isinstance(event, TextPiece))

    def outcome(self, uid: int) -> Alone:
        """What it produced."""
        last = self.last(uid)
        return Alone(self.text(uid), last.reason, last.stop, last.usage.completion_tokens)

    def alone(self, uid: int) -> Alone:
        """What it must produce: what it would have produced alone, up to its deadline if that has passed."""
        spec, n_ctx = self.specs[uid], self.capabilities.n_ctx
        if uid not in self.expired:
            return alone(spec, n_ctx)
        n_sampled = self.last(uid).usage.completion_tokens
        if n_sampled == 0:
            return Alone("", "deadline", None, 0)
        said = alone(replace(spec, max_tokens=n_sampled), n_ctx)
        assert said.n_sampled == n_sampled, "its text had ended before its deadline"
        return replace(said, reason="deadline" if said.reason == "length" else said.reason)


def make_world(n_slots: int = 2, *, n_ctx: int = 32, max_rows: int = 8, slowness: float = 1.0, **fields: Any) -> World:
    """A small world. `fields` are further fields of its Capabilities."""
    return World(Capabilities(n_slots=n_slots, n_ctx=n_ctx, max_rows=max_rows, **fields), slowness)


def endless(n: int, *, shift: bool = True, at_least: int = 60) -> tuple[int, ...]:
    """The n-th prompt after which the toy goes on for at least so many tokens. Prompts have 6 tokens, and all begin
    with the same 4."""
    found = -1
    for number in range(10_000):
        prompt = (A, B, A, B, A + number % 8, A + number // 8 % 8)
        spec = SequenceSpec(uid=0, prompt=prompt, max_tokens=at_least, n_keep=2, shift=shift)
        found += alone(spec, 16).n_sampled == at_least
        if found == n:
            return prompt
    raise AssertionError("no such prompt")
