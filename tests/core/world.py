"""A scheduler and a toy context without an engine, and what one sequence alone must produce."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from trio_runner.core.batch import Batch, DecodeOutcome, StepResult
from trio_runner.core.memory import MemoryOp
from trio_runner.core.ports import Adapter, EncodedMedia, Sampler
from trio_runner.core.prompt import Item, Media, MediaRow, common_prefix, cut_after, cut_before
from trio_runner.core.scheduler import Scheduler
from trio_runner.core.sequence import SequenceSpec
from trio_runner.events import Embedded, Event, Finished, TextPiece
from trio_runner.info import Capabilities
from trio_runner.sampling import SamplingParams
from trio_runner.testing import END, N_EMBD, Interruption, ToyAdapter, ToyContext, ToySampler, toy_cache_key, toy_next

# --- the oracle ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """What a sequence must produce whatever happens to others."""

    text: str
    reason: str
    stop: str | None
    n_sampled: int


def alone(spec: SequenceSpec, n_ctx: int) -> Alone:
    """Recompute everything from the list of items, one token after the other, with nothing cached."""
    held = list(spec.prompt)
    cache_key = cache_key_of(spec)
    data = b""
    for n_sampled in count(1):
        token = toy_next(held, cache_key)
        if token == END:
            return Alone(whole_text(data), "stop", None, n_sampled)
        data += bytes([token])
        found = first_stop(whole_text(data), spec.stop)
        if found is not None:
            text, stop = found
            return Alone(text, "stop", stop, n_sampled)
        if n_sampled == spec.max_tokens:
            return Alone(whole_text(data), "length", None, n_sampled)
        if len(held) == n_ctx:
            if not spec.shift:
                return Alone(whole_text(data), "length", None, n_sampled)
            discardable = n_ctx - spec.n_keep
            held = held[: spec.n_keep] + held[cut_after(held, spec.n_keep + max(discardable // 2, 1)) :]
        held.append(token)
    raise AssertionError("unreachable")


def cache_key_of(spec: SequenceSpec) -> str:
    return toy_cache_key([(str(uid), scale) for uid, scale in spec.adapters], spec.encoder_tokens)


def rows_of(media: Media) -> tuple[Item, ...]:
    return tuple(MediaRow(media, row) for row in range(media.n_rows))


def whole_text(data: bytes) -> str:
    """`data` as text, without half a character at its end."""
    for n_missing in range(4):
        tail = data[len(data) - n_missing :]
        if starts_character(tail):
            return data[: len(data) - n_missing].decode(errors="replace")
    return data.decode(errors="replace")


def starts_character(tail: bytes) -> bool:
    """Whether `tail` is the start of a character and not a whole one: table 3-7 of the Unicode standard."""
    seconds = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}
    lead = tail[0] if tail else 0
    length = 2 if 0xC2 <= lead <= 0xDF else 3 if 0xE0 <= lead <= 0xEF else 4 if 0xF0 <= lead <= 0xF4 else 0
    if not len(tail) < length:
        return False
    low, high = seconds.get(lead, (0x80, 0xBF))
    return all(a <= byte <= b for byte, (a, b) in zip(tail[1:], [(low, high), (0x80, 0xBF)], strict=False))


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str] | None:
    """(the text before it, the stop string that ends first, the longest on a tie), by looking everywhere."""
    for end in range(1, len(text) + 1):
        here = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if here:
            longest = max(here, key=len)
            return text[: end - len(longest)], longest
    return None


# --- the driver ------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """Carries steps out as the decode loop does, and checks after each what must always hold.

    `uid` 0 and up in the order of submission. `poison`: batches with this uid never succeed. `slowness`: how many
    milliseconds a row takes.
    """

    capabilities: Capabilities
    slowness: float = 1.0
    poison: dict[int, DecodeOutcome] = field(default_factory=dict)
    on_batch: Callable[[Batch], None] | None = None
    specs: dict[int, SequenceSpec] = field(default_factory=dict)
    events: dict[int, list[Event | Embedded]] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    expired: set[int] = field(default_factory=set)
    may_fail: set[int] = field(default_factory=set)
    """Sequences that were alone in a batch that failed."""
    preempted: set[int] = field(default_factory=set)
    """Sequences that had to give up a slot."""
    overtaken: set[int] = field(default_factory=set)
    """Sequences that were paused while they waited: others may go before them."""
    n_prefilled: dict[int, int] = field(default_factory=dict)
    """Prompt rows that were decoded, by uid."""
    n_steps: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.capabilities)
        self.context = ToyContext(self.capabilities, on_decode=lambda batch: self._interruption)
        self.samplers: dict[int, Sampler] = {}
        self.media: dict[Media, EncodedMedia] = {}
        self.adapters: dict[int, Adapter] = {}
        self.ops: list[MemoryOp] = []
        self.paused: set[int] = set()
        self.sampled: set[int] = set()
        self.numbers: set[int] = set()
        self.n_passed_over: dict[int, int] = {}
        self._interruption: Interruption | None = None

    def submit(self, sampling: SamplingParams | None = None, **fields: object) -> int:
        uid = len(self.specs)
        spec = SequenceSpec(uid=uid, **fields)  # type: ignore[arg-type]
        self.specs[uid] = spec
        self.events[uid] = []
        self.n_prefilled[uid] = 0
        self.samplers[uid] = ToySampler(sampling or SamplingParams())
        for item in spec.prompt:
            if isinstance(item, MediaRow):
                self.media[item.media] = EncodedMedia(np.zeros((item.media.n_rows, N_EMBD), np.float32))
        for adapter, _ in spec.adapters:
            self.adapters[adapter] = ToyAdapter(str(adapter))
        self.scheduler.submit(spec)
        return uid

    def cancel(self, uid: int) -> None:
        if not self.finished(uid):
            self.cancelled.add(uid)
        self.scheduler.cancel(uid)

    def expire(self, uid: int) -> None:
        is_live = uid in self.running or uid in self.waiting
        emissions = self.scheduler.expire(uid)
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

    def resume(self, uid: int) -> None:
        self.paused.discard(uid)
        self.scheduler.resume(uid)

    def step(self, interruption: Interruption | None = None, *, discard: bool = False) -> bool:
        """One step; False when there is nothing to do. `discard`: throw the batch away after the edits, as when mail
        has come."""
        ran, held = set(self.running), self._held_for_prompts()
        step = self.scheduler.next_step()
        self.preempted |= ran - set(self.running)
        self.check_admission(ran, held)
        self.check_following()
        if step is None:
            self.check_held()
            self.check_waiting()
            assert not set(self.running) - self.paused, "somebody could go on"
            return False
        self.n_steps += 1
        assert step.memory_ops or step.batch.chunks, "an empty step"
        trims_held = True
        for op in step.memory_ops:
            self.ops.append(op)
            if not self.context.apply(op):
                self.scheduler.trim_failed(op)
                trims_held = False
        if not trims_held:
            return True
        self.check_held()
        self.check_waiting()
        self.check_batch(step.batch)
        if discard or not step.batch.chunks:
            return True
        self._decode(step.batch, interruption)
        return True

    def _decode(self, batch: Batch, interruption: Interruption | None) -> None:
        uids = [chunk.uid for chunk in batch.chunks]
        for uid in uids:
            if uid in self.poison:
                outcome = self.poison[uid]
                interruption = Interruption(outcome, 3 if outcome is DecodeOutcome.FATAL else 0)
        if interruption is not None and len(uids) == 1 and interruption.outcome is not DecodeOutcome.ABORTED:
            self.may_fail.update(uids)
        self.check_nobody_is_passed_over(batch, failed=interruption is not None)
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
        needs_all_rows = batch.kind.embedding and not self.capabilities.embeds_last_row
        for chunk in batch.chunks:
            n_rows = len(chunk.items)
            if result.outcome is not DecodeOutcome.OK:
                # What a batch that was broken off has left counts, except a last row whose logits are lost.
                n_rows = max(len(self.context.held(chunk.slot)) - chunk.start, 0)
                n_rows = cut_before(chunk.items, n_rows - (chunk.output and n_rows == len(chunk.items)))
                if needs_all_rows or result.outcome not in (DecodeOutcome.ABORTED, DecodeOutcome.FATAL):
                    n_rows = 0
            if chunk.uid not in self.sampled:
                self.n_prefilled[chunk.uid] += n_rows
            if chunk.output and result.outcome is DecodeOutcome.OK:
                self.sampled.add(chunk.uid)

    def run(self, max_steps: int | None = None) -> None:
        """Until nothing is left to do."""
        most = self.n_steps + (self.step_bound() if max_steps is None else max_steps)
        while self.step():
            assert self.n_steps <= most, "no end in sight"

    def step_bound(self) -> int:
        """Steps that all sequences take one row after the other, even if each token shifts and decodes all again."""
        n_ctx = self.capabilities.n_ctx
        live = [spec for uid, spec in self.specs.items() if not self.finished(uid)]
        lengths = [0 if spec.embedding else alone(spec, n_ctx).n_sampled for spec in live]
        return 100 + 2 * sum(n_ctx + n_sampled * n_ctx for n_sampled in lengths)

    @property
    def running(self) -> list[int]:
        return list(self.scheduler._running)

    @property
    def waiting(self) -> list[int]:
        return list(self.scheduler._waiting)

    def finished(self, uid: int) -> bool:
        return bool(self.events[uid]) and isinstance(self.events[uid][-1], (Finished, Embedded))

    def last(self, uid: int) -> Finished:
        event = self.events[uid][-1]
        assert isinstance(event, Finished)
        return event

    def text(self, uid: int) -> str:
        return "".join(event.text for event in self.events[uid] if isinstance(event, TextPiece))

    def outcome(self, uid: int) -> Alone:
        last = self.last(uid)
        return Alone(self.text(uid), last.reason, last.stop, last.usage.completion_tokens)

    def alone(self, uid: int) -> Alone:
        """What it says alone; up to where its deadline came, if it did."""
        spec, n_ctx = self.specs[uid], self.capabilities.n_ctx
        if uid not in self.expired:
            return alone(spec, n_ctx)
        n_sampled = self.last(uid).usage.completion_tokens
        if n_sampled == 0:
            return Alone("", "deadline", None, 0)
        said = alone(replace(spec, max_tokens=n_sampled), n_ctx)
        assert said.n_sampled == n_sampled, "its text had ended before its deadline"
        return replace(said, reason="deadline" if said.reason == "length" else said.reason)

    # -- what must always hold ----------------------------------------------------------------------------------------

    def check_held(self) -> None:
        """Rule 1, once all edits are done."""
        pool = self.scheduler._pool
        for slot in (*pool.slots, *pool.embed_slots):
            assert slot.items == self.context.held(slot.id), f"slot {slot.id} is not what the KV cache holds"

    def check_waiting(self) -> None:
        """First come, first served, interactive ones first; and nobody waits without need."""
        waiting = set(self.waiting)
        self.overtaken |= waiting & self.paused
        for embedding in (True, False):
            ahead = {uid for uid in waiting - self.paused if self.specs[uid].embedding == embedding}
            running = {uid for uid in self.running if self.specs[uid].embedding == embedding}
            for uid in ahead - self.overtaken:
                rivals = {other for other in running if self.specs[other].background == self.specs[uid].background}
                assert max(rivals, default=-1) < uid, "somebody jumped the queue"
            if not ahead:
                continue
            first = min(ahead, key=self._rank)
            if embedding:
                n_reserved = sum(len(self.specs[uid].prompt) for uid in running)
                has_room = n_reserved + len(self.specs[first].prompt) <= self.capabilities.max_rows
                assert len(running) == self.capabilities.n_embed_slots or not has_room, (
                    "an embedding waits without need"
                )
            elif not self.scheduler._crowded:
                n_reserved = sum(len(self.specs[uid].encoder_tokens) for uid in running)
                has_room = n_reserved + len(self.specs[first].encoder_tokens) <= self.capabilities.max_rows
                assert len(running) == self.capabilities.n_slots or not has_room, "a slot is free while somebody waits"
                is_outranked = any(self.specs[uid].background for uid in running)
                assert self.specs[first].background or not is_outranked, "an interactive one waits for a background one"

    def _rank(self, uid: int) -> tuple[bool, int]:
        return self.specs[uid].background, uid

    def _held_for_prompts(self) -> list[tuple[Hashable, list[Item]]]:
        return [(slot.cache_key, list(slot.items)) for slot in self.scheduler._pool.slots]

    def check_admission(self, ran: set[int], held: list[tuple[Hashable, list[Item]]]) -> None:
        """Who got a slot, if nobody else did in the same step, goes on from the longest prefix that anybody held."""
        started = [self.scheduler._running[uid] for uid in self.running if uid not in ran]
        assert all(sequence.spec.uid not in self.paused for sequence in started), "a slot for a paused sequence"
        started = [sequence for sequence in started if not sequence.spec.embedding]
        if len(started) != 1 or not self.capabilities.can_trim:
            return
        sequence = started[0]
        if sequence.spec.cache_prompt and sequence.leader is None and not sequence.prompt_done:
            prompt, cache_key = sequence.spec.prompt, sequence.spec.cache_key
            longest = max((common_prefix(items, prompt) for other, items in held if other == cache_key), default=0)
            longest = cut_before(prompt, min(longest, len(prompt) - 1))
            assert len(sequence.slot.items) >= longest, "a prefix was not used"

    def check_following(self) -> None:
        """Who waits for another's prefix waits for somebody who gets on."""
        running = self.scheduler._running
        for sequence in running.values():
            followed = [sequence]
            while sequence.spec.uid not in self.paused and (leader := followed[-1].leader) is not None:
                assert running.get(leader.spec.uid) is leader, "it waits for somebody who has left"
                assert leader.spec.uid not in self.paused, "it waits for somebody who is paused"
                assert leader not in followed, "they wait for each other"
                items = followed[-1].items
                n_common = cut_before(items, min(common_prefix(leader.items, items), len(items) - 1))
                assert leader.spec.cache_key == followed[-1].spec.cache_key, "what it waits for is of no use to it"
                assert len(leader.slot.items) < n_common, "it waits for what is there"
                followed.append(leader)

    def check_nobody_is_passed_over(self, batch: Batch, *, failed: bool) -> None:
        served = {chunk.uid for chunk in batch.chunks}
        most = 4 * (self.capabilities.n_slots + self.capabilities.n_embed_slots)
        for uid, sequence in self.scheduler._running.items():
            if uid in served or uid in self.paused or sequence.leader is not None:
                self.n_passed_over[uid] = 0
            elif not failed:
                self.n_passed_over[uid] = self.n_passed_over.get(uid, 0) + 1
                assert self.n_passed_over[uid] <= most, "somebody starves"

    def check_batch(self, batch: Batch) -> None:
        assert batch.n_rows <= self.capabilities.max_rows
        if batch.chunks:
            assert batch.number not in self.numbers, "two batches of the same number"
            self.numbers.add(batch.number)
        for chunk in batch.chunks:
            assert chunk.items, "a chunk without rows"
            assert chunk.uid in self.running
            assert chunk.uid not in self.paused, "rows for a paused sequence"
            if not self.specs[chunk.uid].embedding or not self.capabilities.embeds_last_row:
                assert self.specs[chunk.uid].embedding == batch.kind.embedding
            elif batch.kind.embedding:
                assert len(chunk.items) == 1, "rows of an embedding that tokens could have been beside"

    def check_idle(self) -> None:
        """All is done: every slot is free and nobody is remembered."""
        assert not self.running
        assert not self.scheduler._waiting
        assert not self.scheduler._crowded
        pool = self.scheduler._pool
        assert pool.n_busy == 0
        assert not pool._reserved
        assert not any(slot.items for slot in pool.embed_slots)
        statistics = self.scheduler.statistics()
        n_held = sum(len(self.context.held(slot)) for slot in range(self.capabilities.first_embed_slot))
        assert (statistics.n_waiting, statistics.n_running, statistics.n_paused) == (0, 0, 0)
        assert statistics.n_preempted == 0
        assert statistics.n_cached_tokens == n_held
        assert statistics.n_prompt_rows == sum(self.n_prefilled.values())
