from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_runner.config import CachePolicy
from trio_runner.core.batch import Batch, Chunk
from trio_runner.core.limits import Limits
from trio_runner.core.memory import Copy, Trim
from trio_runner.core.slots import Slot, SlotPool
from trio_runner.testing import ToyContext


def make_limits(n_slots: int = 2, *, can_trim: bool = True) -> Limits:
    return Limits(n_slots=n_slots, n_ctx=64, max_rows=64, can_trim=can_trim, can_shift=can_trim)


def naive_prefix(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class Lane:
    """What the oracle knows of a slot, besides what the context holds."""

    busy: bool = False
    last_used: int = 0


class PoolWorld:
    """A pool, a context that carries its edits out, and an oracle that predicts which slot is taken."""

    def __init__(self, limits: Limits, policy: CachePolicy) -> None:
        self.limits, self.policy = limits, policy
        self.pool = SlotPool(limits, policy)
        self.context = ToyContext(limits)
        self.lanes = [Lane() for _ in range(limits.n_slots)]
        self.now = 0

    def predict(self, prompt: list[int], cache_prompt: bool) -> tuple[int, int] | None:
        """(the slot taken, how many of its positions are reused)"""
        held = [self.context.held(slot) for slot in range(self.limits.n_slots)]
        free = [slot for slot, lane in enumerate(self.lanes) if not lane.busy]
        if not free:
            return None
        oldest = min(free, key=lambda slot: (self.lanes[slot].last_used, slot))
        if not cache_prompt:
            return oldest, 0
        forks = self.policy == "best" and self.limits.can_trim
        shared = [naive_prefix(tokens, prompt) for tokens in held]
        candidates = list(range(self.limits.n_slots)) if forks else free
        most = max(shared[slot] for slot in candidates)
        source = min((slot for slot in candidates if shared[slot] == most), key=lambda slot: (slot not in free, slot))
        slot = source if self.policy == "longest" or (source in free and most == len(held[source])) else oldest
        n_kept = min(most, len(prompt) - 1)
        if not self.limits.can_trim and n_kept < len(held[source]):
            n_kept = 0
        return slot, n_kept

    def acquire(self, prompt: list[int], cache_prompt: bool) -> Slot | None:
        predicted = self.predict(prompt, cache_prompt)
        others = {slot.id: list(slot.tokens) for slot in self.pool.slots}
        acquired = self.pool.acquire(tuple(prompt), cache_prompt=cache_prompt)
        if acquired is None or predicted is None:
            assert acquired is None
            assert predicted is None
            return None
        slot, ops = acquired
        assert (slot.id, len(slot.tokens)) == predicted
        for op in ops:
            if not self.limits.can_trim:
                assert op == Trim(slot.id, 0), "this memory can only be emptied"
            assert self.context.apply(op)
        assert len(slot.tokens) < len(prompt)
        assert slot.tokens == prompt[: len(slot.tokens)]
        del others[slot.id]
        assert all(self.pool.slots[other].tokens == tokens for other, tokens in others.items())
        assert slot.busy
        self.touch(slot, busy=True)
        return slot

    def decode(self, slot: Slot, tokens: list[int]) -> None:
        self.context.decode(Batch((Chunk(0, slot.id, len(slot.tokens), tuple(tokens), output=False),)), {})
        slot.tokens += tokens

    def release(self, slot: Slot) -> None:
        self.pool.release(slot)
        self.touch(slot, busy=False)

    def touch(self, slot: Slot, *, busy: bool) -> None:
        self.now += 1
        self.lanes[slot.id] = Lane(busy, self.now)

    def check(self) -> None:
        for slot in self.pool.slots:
            assert slot.tokens == self.context.held(slot.id)
            assert slot.busy == self.lanes[slot.id].busy
            # Every cell that really is shared lies below n_shared.
            for other in self.pool.slots:
                if other is not slot:
                    cells = {id(cell) for cell in self.context._cells[other.id]}
                    shared = [n for n, cell in enumerate(self.context._cells[slot.id], start=1) if id(cell) in cells]
                    assert max(shared, default=0) <= slot.n_shared
        assert self.pool.n_busy == sum(lane.busy for lane in self.lanes)


PROMPT = st.lists(st.integers(0, 1), min_size=1, max_size=10)
MOVE = st.one_of(
    st.tuples(st.just("acquire"), PROMPT, st.sampled_from([True, True, True, False])),
    st.tuples(st.just("release"), st.integers(0, 4), st.none()),
    st.tuples(st.just("go on"), st.integers(0, 4), PROMPT),
)


@settings(max_examples=300)
@given(
    st.sampled_from(["longest", "best"]),
    st.integers(1, 4),
    st.booleans(),
    st.lists(MOVE, max_size=30),
)
def test_the_right_slot_with_the_right_edits(
    policy: Literal["longest", "best"], n_slots: int, can_trim: bool, moves: list[tuple[str, object, object]]
) -> None:
    world = PoolWorld(make_limits(n_slots, can_trim=can_trim), policy)
    busy: list[Slot] = []
    for move in moves:
        match move:
            case ("acquire", list(prompt), bool(cache_prompt)):
                slot = world.acquire(prompt, cache_prompt)
                if slot is not None:
                    # Sometimes only part of the prompt is decoded before the sequence is cancelled.
                    rest = prompt[len(slot.tokens) :]
                    world.decode(slot, rest[: max(1, len(rest) - prompt[-1])])
                    busy.append(slot)
            case ("release", int(n), _):
                if busy:
                    world.release(busy.pop(n % len(busy)))
            case (_, int(n), list(tokens)):
                if busy and len(busy[n % len(busy)].tokens) + len(tokens) <= 64:
                    world.decode(busy[n % len(busy)], tokens)
        world.check()


def filled(policy: CachePolicy, contents: list[list[int]], *, can_trim: bool = True) -> PoolWorld:
    """A pool whose slots were used in this order."""
    world = PoolWorld(make_limits(len(contents), can_trim=can_trim), policy)
    slots = [world.acquire([*tokens, 0], False) for tokens in contents]
    for slot, tokens in zip(slots, contents, strict=True):
        assert slot is not None
        world.decode(slot, tokens)
        world.release(slot)
    return world


@pytest.mark.parametrize("policy", ["longest", "best"])
def test_the_last_item_is_always_left_to_decode(policy: CachePolicy) -> None:
    pool = filled(policy, [[1, 2, 3]]).pool
    acquired = pool.acquire([1, 2, 3], cache_prompt=True)
    assert acquired is not None
    assert acquired[0].tokens == [1, 2]
    assert acquired[1] == [Trim(0, 2)]


@pytest.mark.parametrize("policy", ["longest", "best"])
def test_a_slot_whose_whole_content_matches_goes_on_without_any_edit(policy: CachePolicy) -> None:
    pool = filled(policy, [[9], [1, 2, 3]]).pool
    acquired = pool.acquire([1, 2, 3, 4], cache_prompt=True)
    assert acquired is not None
    assert acquired[0].id == 1
    assert acquired[1] == []


def test_longest_cuts_a_slot_down() -> None:
    pool = filled("longest", [[9], [1, 2, 3]]).pool
    acquired = pool.acquire([1, 2, 5, 6], cache_prompt=True)
    assert acquired is not None
    assert acquired[1] == [Trim(1, 2)]


def test_best_forks_and_evicts_the_least_recently_used() -> None:
    pool = filled("best", [[9], [8], [1, 2, 3]]).pool
    acquired = pool.acquire([1, 2, 5, 6], cache_prompt=True)
    assert acquired is not None
    assert acquired[1] == [Trim(0, 0), Copy(2, 0, 2)]
    assert pool.slots[2].tokens == [1, 2, 3]


def test_best_forks_from_a_busy_slot() -> None:
    world = filled("best", [[9], [1, 2, 3]])
    assert world.acquire([1, 2, 3, 4], True) is world.pool.slots[1]
    acquired = world.pool.acquire([1, 2, 3, 5], cache_prompt=True)
    assert acquired is not None
    assert acquired[1] == [Trim(0, 0), Copy(1, 0, 3)]


def test_without_cache_prompt_the_least_recently_used_is_emptied() -> None:
    world = filled("longest", [[1, 2], [1, 2, 3]])
    acquired = world.pool.acquire([1, 2, 3, 4], cache_prompt=False)
    assert acquired is not None
    assert acquired[0].id == 0
    assert acquired[1] == [Trim(0, 0)]


@pytest.mark.parametrize("policy", ["longest", "best"])
def test_recurrent_state_is_used_whole_or_not_at_all(policy: CachePolicy) -> None:
    pool = filled(policy, [[1, 2, 3]], can_trim=False).pool
    acquired = pool.acquire([1, 2, 5], cache_prompt=True)
    assert acquired is not None
    assert acquired[1] == [Trim(0, 0)]
    assert acquired[0].tokens == []
