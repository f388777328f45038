"""Which slot a prompt takes, and by which edits: a pool against an oracle that predicts both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_runner.core.batch import Batch, Chunk
from trio_runner.core.memory import Copy, MemoryOp, Trim
from trio_runner.core.prompt import Item
from trio_runner.core.shift import shift_ops
from trio_runner.core.slots import Slot, SlotPool
from trio_runner.info import Capabilities
from trio_runner.testing import ToyContext


def make_capabilities(n_slots: int = 2, *, n_spare_slots: int = 0, can_trim: bool = True) -> Capabilities:
    return Capabilities(
        n_slots=n_slots,
        n_spare_slots=n_spare_slots,
        n_ctx=64,
        max_rows=64,
        can_trim=can_trim,
        can_shift=can_trim,
    )


def naive_prefix(a: Sequence[Item], b: Sequence[Item]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class SlotRecord:
    """What the oracle knows of a slot, besides what the context holds."""

    busy: bool = False
    last_used: int = 0


class PoolWorld:
    """A pool, a context that carries its edits out, and an oracle that predicts which slot is taken."""

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self.pool = SlotPool(capabilities)
        self.context = ToyContext(capabilities)
        self.records = [SlotRecord() for _ in range(capabilities.first_embed_slot)]
        self.now = 0

    def reusable(self, slot: int, prompt: list[int]) -> int:
        """How much of `prompt`, but its last item, could be taken from what `slot` holds."""
        held = self.context.held(slot)
        n_kept = min(naive_prefix(held, prompt), len(prompt) - 1)
        usable = self.capabilities.can_trim or (n_kept == len(held) and not self.records[slot].busy)
        return n_kept if usable else 0

    def predict(self, prompt: list[int], reuse: bool, preferred: int | None = None) -> tuple[int, int] | None:
        """(the slot that is taken, how many positions it starts with)"""
        slots = range(self.capabilities.first_embed_slot)
        free = [slot for slot in slots if not self.records[slot].busy]
        if len(slots) - len(free) == self.capabilities.n_slots:
            return None
        oldest = min(free, key=lambda slot: (self.records[slot].last_used, slot))
        kept = [self.reusable(slot, prompt) if reuse else 0 for slot in slots]
        most = max(kept)
        if preferred in free:
            return preferred, most if self.capabilities.can_trim else kept[preferred]
        holding = [slot for slot in free if kept[slot] == most]
        if most and holding:
            first = min(holding, key=lambda slot: self.records[slot].last_used)
            n_lost, n_lost_oldest = (len(self.context.held(slot)) - kept[slot] for slot in (first, oldest))
            if n_lost <= n_lost_oldest:
                return first, most
        return oldest, most

    def acquire(self, prompt: list[int], reuse: bool, preferred: int | None = None) -> Slot | None:
        predicted = self.predict(prompt, reuse, preferred)
        others = {slot.id: list(slot.items) for slot in self.pool.slots}
        acquired = self.pool.acquire(tuple(prompt), reuse=reuse, preferred=preferred)
        if acquired is None or predicted is None:
            assert acquired is None
            assert predicted is None
            return None
        slot, ops = acquired
        assert (slot.id, len(slot.items)) == predicted
        self.apply(slot, ops)
        assert len(slot.items) < len(prompt)
        assert slot.items == prompt[: len(slot.items)]
        del others[slot.id]
        assert all(self.pool.slots[other].items == tokens for other, tokens in others.items())
        assert slot.busy
        self.touch(slot, busy=True)
        return slot

    def apply(self, slot: Slot, ops: list[MemoryOp]) -> None:
        """No more edits than are needed, and none that the memory cannot do."""
        assert [type(op) for op in ops] in ([], [Trim], [Copy], [Trim, Copy])
        for op in ops:
            if not self.capabilities.can_trim:
                assert op == Trim(slot.id, 0), "this memory can only be emptied"
            if isinstance(op, Trim):
                assert op.slot == slot.id
                assert op.start < self.context.length(op.slot), "nothing to trim"
            assert self.context.apply(op)

    def extend(self, slot: Slot, tokens: list[int]) -> None:
        """Do what a follower does. `tokens` goes on from what the slot holds."""
        wanted = [*slot.items, *tokens]
        others = [other for other in range(self.capabilities.first_embed_slot) if other != slot.id]
        longest = max((min(naive_prefix(self.context.held(n), wanted), len(wanted) - 1) for n in others), default=0)
        longest = max(longest, len(slot.items))
        before = len(slot.items)
        ops = self.pool.extend(slot, wanted)
        assert bool(ops) == (longest > before)
        self.apply(slot, ops)
        assert slot.items == wanted[:longest]
        self.check()

    def slide(self, slot: Slot, n_keep: int, n_discard: int) -> None:
        """Do what a context shift does, or nothing if another slot in use has the same cells."""
        n_held = len(slot.items)
        if n_keep + n_discard > n_held:
            return
        others = {other.id: self.context.held(other.id) for other in self.pool.slots if other is not slot}
        ops = self.pool.unshare(slot, n_keep + n_discard)
        first = n_keep + n_discard
        sharing = {other for other in others if max(self.context.shared_rows(slot.id, other), default=-1) >= first}
        if ops is None:
            in_use = [other for other in others if self.records[other].busy]
            assert any(self.may_share(slot.id, other, n_keep + n_discard) for other in in_use)
            assert {other: self.pool.slots[other].items for other in others} == others
            return
        assert not any(self.records[other].busy for other in sharing)
        for op in ops:
            assert isinstance(op, Trim)
            assert not self.records[op.slot].busy
            assert (op.start, op.end) == (n_keep + n_discard, None)
        del slot.items[n_keep : n_keep + n_discard]
        for op in (*ops, *shift_ops(slot.id, n_held, n_keep=n_keep, discard=n_discard)):
            assert self.context.apply(op)
        slot.n_shared_cells = min(slot.n_shared_cells, n_keep)
        for other, tokens in others.items():
            assert self.context.held(other) in (tokens, tokens[: n_keep + n_discard])

    def may_share(self, slot: int, other: int, start: int) -> bool:
        """Whether they hold the same beyond `start`, without which they share no cell there."""
        return naive_prefix(self.context.held(slot), self.context.held(other)) > start

    def decode(self, slot: Slot, tokens: list[int]) -> None:
        for op in self.pool.make_room(len(tokens)):
            assert isinstance(op, Trim)
            assert not self.records[op.slot].busy
            assert self.context.apply(op)
        self.context.decode(Batch((Chunk(0, slot.id, len(slot.items), tuple(tokens), output=False),)), {})
        slot.items += tokens

    def release(self, slot: Slot) -> None:
        assert self.pool.release(slot) == []
        self.touch(slot, busy=False)

    def touch(self, slot: Slot, *, busy: bool) -> None:
        self.now += 1
        self.records[slot.id] = SlotRecord(busy, self.now)

    def check(self) -> None:
        for slot in self.pool.slots:
            assert slot.items == self.context.held(slot.id)
            assert slot.busy == self.records[slot.id].busy
            # Every cell that really is shared lies below n_shared_cells.
            for other in self.pool.slots:
                if other is not slot:
                    shared = self.context.shared_rows(slot.id, other.id)
                    assert max(shared, default=-1) < slot.n_shared_cells or not shared
                    assert slot.n_shared_cells <= len(slot.items)
        assert self.pool.n_busy == sum(record.busy for record in self.records)


@dataclass(frozen=True)
class Acquire:
    prompt: list[int]
    reuse: bool
    preferred: int | None = None


@dataclass(frozen=True)
class Release:
    """Give a slot back. `number` names one of those in use, here and below, modulo how many there are."""

    number: int


@dataclass(frozen=True)
class Decode:
    """Decode tokens after what a slot holds."""

    number: int
    tokens: list[int]


@dataclass(frozen=True)
class Extend:
    """Take over from other slots what continues a slot by these tokens."""

    number: int
    tokens: list[int]


@dataclass(frozen=True)
class Slide:
    """Shift the context of a slot."""

    number: int
    n_keep: int
    n_discard: int


@dataclass(frozen=True)
class TrimMove:
    number: int
    start: int


Move: TypeAlias = Acquire | Release | Decode | Extend | Slide | TrimMove

NUMBER = st.integers(0, 4)
PROMPT = st.lists(st.integers(0, 1), min_size=1, max_size=10)
MOVE: st.SearchStrategy[Move] = st.one_of(
    st.builds(Acquire, PROMPT, st.sampled_from([True, True, True, False])),
    st.builds(Acquire, PROMPT, st.just(True)),
    st.builds(Acquire, PROMPT, st.booleans(), st.integers(0, 2)),
    st.builds(Release, NUMBER),
    st.builds(Decode, NUMBER, PROMPT),
    st.builds(Extend, NUMBER, PROMPT),
    st.builds(Slide, NUMBER, st.integers(0, 6), st.integers(1, 6)),
    st.builds(TrimMove, NUMBER, st.integers(0, 10)),
)


def play(world: PoolWorld, move: Move, busy: list[Slot]) -> None:
    """Make one move. `busy` has the slots in use, and is changed."""
    if isinstance(move, Acquire):
        preferred = None if move.preferred is None else move.preferred % world.capabilities.n_slots
        slot = world.acquire(move.prompt, move.reuse, preferred)
        if slot is not None:
            # Sometimes only part of the prompt is decoded before the sequence is cancelled.
            rest = move.prompt[len(slot.items) :]
            world.decode(slot, rest[: max(1, len(rest) - move.prompt[-1])])
            busy.append(slot)
        return
    if not busy:
        return
    slot, can_trim = busy[move.number % len(busy)], world.capabilities.can_trim
    match move:
        case Release():
            busy.remove(slot)
            world.release(slot)
        case Decode(tokens=tokens) if len(slot.items) + len(tokens) <= world.capabilities.n_ctx:
            world.decode(slot, tokens)
        case Extend(tokens=tokens) if can_trim:
            world.extend(slot, tokens)
        case Slide(n_keep=n_keep, n_discard=n_discard) if can_trim:
            world.slide(slot, n_keep, n_discard)
        case TrimMove(start=start) if can_trim or start == 0:
            assert world.context.apply(slot.trim(min(start, len(slot.items))))


@settings(max_examples=300)
@given(
    st.integers(1, 4), st.integers(0, 3), st.sampled_from([True, True, False]), st.lists(MOVE, min_size=15, max_size=50)
)
def test_the_right_slot_with_the_right_edits(
    n_slots: int, n_spare_slots: int, can_trim: bool, moves: list[Move]
) -> None:
    world = PoolWorld(make_capabilities(n_slots, n_spare_slots=n_spare_slots, can_trim=can_trim))
    busy: list[Slot] = []
    for move in moves:
        play(world, move, busy)
        world.check()


@pytest.mark.parametrize(
    ("can_trim", "n_rows", "left"),
    [
        (True, 0, [64, 40, 24]),
        (True, 10, [64, 30, 24]),
        (True, 50, [64, 0, 14]),
        (False, 10, [64, 0, 24]),
        (False, 50, [64, 0, 0]),
    ],
)
def test_slots_that_are_not_in_use_make_room_the_oldest_first(can_trim: bool, n_rows: int, left: list[int]) -> None:
    pool = SlotPool(make_capabilities(2, n_spare_slots=1, can_trim=can_trim))
    for slot, n_held, last_used in zip(pool.slots, (64, 40, 24), (1, 2, 3), strict=True):
        slot.items, slot.last_used = list(range(n_held)), last_used
    pool.slots[0].busy = True  # however old
    ops = pool.make_room(n_rows)
    assert [len(slot.items) for slot in pool.slots] == left
    assert len(ops) == sum(n != n_held for n, n_held in zip(left, (64, 40, 24), strict=True))


@given(st.integers(1, 4), st.integers(1, 20), st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=30))
def test_embeddings_share_the_rows_of_one_batch(n_slots: int, max_rows: int, moves: list[tuple[bool, int]]) -> None:
    pool = SlotPool(Capabilities(n_slots=2, n_ctx=64, max_rows=max_rows, n_embed_slots=n_slots))
    taken: dict[int, int] = {}
    for arrives, n in moves:
        if arrives:
            n_tokens = 1 + n % max_rows
            slot = pool.acquire_for_embedding(n_tokens)
            assert (slot is None) == (len(taken) == n_slots or sum(taken.values()) + n_tokens > max_rows)
            if slot is not None:
                assert slot.id in range(2, 2 + n_slots)
                assert slot.id not in taken
                assert pool[slot.id] is slot
                assert slot.items == []
                taken[slot.id] = n_tokens
        elif taken:
            slot = pool[sorted(taken)[n % len(taken)]]
            # What was decoded of it, if anything, is of no use to other prompts.
            slot.items += [1] * (n % (taken.pop(slot.id) + 1))
            expected = [Trim(slot.id, 0)] if slot.items else []
            assert pool.release(slot) == expected
            assert slot.items == []
        assert pool.n_busy == len(taken)
    assert not any(slot.busy for slot in pool.slots)


def filled(contents: list[list[int]], *, can_trim: bool = True) -> PoolWorld:
    """A pool whose slots were used in this order."""
    world = PoolWorld(make_capabilities(len(contents), can_trim=can_trim))
    slots = [world.acquire([*tokens, 0], False) for tokens in contents]
    for slot, tokens in zip(slots, contents, strict=True):
        assert slot is not None
        if tokens:
            world.decode(slot, tokens)
        world.release(slot)
    return world


@pytest.mark.parametrize("can_trim", [True, False])
@pytest.mark.parametrize(
    ("contents", "prompt", "slot", "edits"),
    [
        pytest.param([[1, 2, 3]], [1, 2, 3], 0, [Trim(0, 2)], id="the last item is always left to decode"),
        pytest.param([[9], [1, 2, 3]], [1, 2, 3, 4], 1, [], id="a slot that matches as a whole goes on"),
        pytest.param([[1], [1, 2, 3]], [1, 2, 3, 4], 1, [], id="the longest of two that match"),
        pytest.param([[9], [8], [1, 2, 3]], [1, 2, 5, 6], 2, [Trim(2, 2)], id="a cut that forgets no more than others"),
        pytest.param(
            [[9], [8], [1, 2, 3, 4]], [1, 2, 5, 6], 0, [Trim(0, 0), Copy(2, 0, 2)], id="a copy, which forgets less"
        ),
        pytest.param([[], [1, 2, 3]], [1, 2, 5, 6], 0, [Copy(1, 0, 2)], id="a copy into an empty slot"),
        pytest.param([[9, 9], [8]], [1, 2], 0, [Trim(0, 0)], id="nothing matches: the one left unused for longest"),
        pytest.param([[1, 2], [1, 2]], [1, 2, 3], 0, [], id="the same twice: the one left unused for longest"),
    ],
)
def test_which_slot(
    contents: list[list[int]], prompt: list[int], slot: int, edits: list[MemoryOp], can_trim: bool
) -> None:
    pool = filled(contents, can_trim=can_trim).pool
    acquired = pool.acquire(prompt, reuse=True)
    assert acquired is not None
    if can_trim or not edits:
        assert (acquired[0].id, acquired[1]) == (slot, edits)
    else:  # recurrent state is used whole or not at all
        assert acquired[0].id == 0
        assert acquired[1] == ([Trim(0, 0)] if contents[0] else [])
        assert acquired[0].items == []


def test_a_prefix_is_copied_from_a_slot_in_use() -> None:
    world = filled([[9], [1, 2, 3]])
    assert world.acquire([1, 2, 3, 4], True) is world.pool.slots[1]
    acquired = world.pool.acquire([1, 2, 3, 5], reuse=True)
    assert acquired is not None
    assert acquired[1] == [Trim(0, 0), Copy(1, 0, 3)]


def test_without_reuse_the_least_recently_used_is_emptied() -> None:
    world = filled([[1, 2], [1, 2, 3]])
    acquired = world.pool.acquire([1, 2, 3, 4], reuse=False)
    assert acquired is not None
    assert acquired[0].id == 0
    assert acquired[1] == [Trim(0, 0)]


def test_a_preferred_slot_is_taken_though_another_one_holds_more_of_the_prompt() -> None:
    world = PoolWorld(make_capabilities(3))
    first = world.acquire([0, 1, 0, 1], reuse=True)
    assert first is not None
    assert first.id == 0
    world.decode(first, [0, 1, 0, 1])
    world.release(first)
    second = world.acquire([0, 1, 0, 1], reuse=True, preferred=2)
    assert second is not None
    assert (second.id, second.items) == (2, [0, 1, 0])
    third = world.acquire([0, 1, 0, 1], reuse=True, preferred=2)
    assert third is not None
    assert (third.id, third.items) == (1, [0, 1, 0])
