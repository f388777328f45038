"""The check of a scheduler's own state finds what is wrong with it, and says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypedDict, Unpack

import pytest

from tests.core.oracle import rows_of
from tests.core.world import A, B, C, World, endless, make_world
from trio_runner.core import integrity
from trio_runner.core.prompt import Item, Media
from trio_runner.core.slots import SlotPool
from trio_runner.core.snapshot import SchedulerState, SequenceState

IMAGE = rows_of(Media(b"image", 4, 2, shares_positions=True))
SHARED = tuple(A + n % 5 for n in range(40))
STREAM, BACKGROUND, FOLLOWED, FOLLOWER, EMBEDDING, QUEUED = range(6)


def busy_world() -> World:
    """One sequence of every sort: a stream, a preempted one, one that is followed by another, an embedding."""
    world = make_world(3, n_ctx=64, max_rows=12, n_spare_slots=2)
    world.submit(prompt=endless(0), max_tokens=None, n_keep=2)
    world.submit(prompt=(C,) * 20, background=True, max_tokens=4)
    world.step()
    world.submit(prompt=(*SHARED, B), max_tokens=4)
    world.submit(prompt=(*SHARED, C), max_tokens=4)
    world.submit(prompt=(A, B), embedding=True)
    world.submit(prompt=(B, A), max_tokens=4, background=True)
    world.step(discard=True)
    state = world.state
    assert list(state.running) == [STREAM, EMBEDDING, FOLLOWED, FOLLOWER]
    assert list(state.waiting) == [QUEUED, BACKGROUND]
    assert (state.running[FOLLOWER].follows, state.waiting[BACKGROUND].preempted) == (FOLLOWED, True)
    return world


class SlotFields(TypedDict, total=False):
    items: tuple[Item, ...]
    position_lag: int
    n_shared_cells: int
    busy: bool
    parked_for: int | None
    cache_key: str


class SequenceFields(TypedDict, total=False):
    slot: int
    pending: tuple[Item, ...]
    prompt_done: bool
    follows: int | None
    n_awaited: int
    n_cached: int


def change_slot(slot_id: int, **fields: Unpack[SlotFields]) -> Callable[[SchedulerState], SchedulerState]:
    def change(state: SchedulerState) -> SchedulerState:
        return replace(
            state, slots=tuple(replace(slot, **fields) if slot.id == slot_id else slot for slot in state.slots)
        )

    return change


def change_sequence(uid: int, **fields: Unpack[SequenceFields]) -> Callable[[SchedulerState], SchedulerState]:
    def change(state: SchedulerState) -> SchedulerState:
        def changed(sequences: dict[int, SequenceState]) -> dict[int, SequenceState]:
            return {other: replace(one, **fields) if other == uid else one for other, one in sequences.items()}

        return replace(state, running=changed(dict(state.running)), waiting=changed(dict(state.waiting)))

    return change


def without(uid: int) -> Callable[[SchedulerState], SchedulerState]:
    def change(state: SchedulerState) -> SchedulerState:
        return replace(
            state,
            running={other: one for other, one in state.running.items() if other != uid},
            waiting={other: one for other, one in state.waiting.items() if other != uid},
        )

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_slot(0, busy=False), "slot 0 is free, but a running sequence holds it"),
        (change_slot(4, busy=True), "slot 4 is busy, but no running sequence holds it"),
        (change_slot(0, items=(A,) * 65), "slot 0 holds 65 items, but only 64 fit"),
        (change_slot(0, position_lag=1), "the position lag of slot 0 is 1, where its items make 0"),
        (change_slot(4, items=IMAGE[:2], position_lag=2), "slot 4 holds part of an image that must stay whole"),
        (change_slot(4, n_shared_cells=9), "slot 4 shares 9 cells, but holds only 0 items"),
        (change_slot(0, cache_key="other"), "the rows of sequence 0 depend on another cache key than its own"),
        (change_slot(0, items=(C, *endless(0)[1:])), "sequence 0 does not begin with its prompt"),
        (change_slot(0, parked_for=BACKGROUND), "slot 0 is busy, and parked for sequence 1"),
        (change_slot(4, parked_for=BACKGROUND), "several slots are parked for sequence 1"),
        (change_slot(4, parked_for=QUEUED), "slot 4 is parked for sequence 5, which does not wait for it"),
        (without(BACKGROUND), "slot 1 is parked for sequence 1, which does not wait for it"),
        (without(STREAM), "slot 0 is busy, but no running sequence holds it"),
        (change_sequence(STREAM, slot=2), "slot 0 is busy, but no running sequence holds it"),
        (change_sequence(STREAM, pending=()), "sequence 0 has nothing left to decode"),
        (change_sequence(STREAM, pending=(A,) * 60), "sequence 0 has 66 items, more than fit its slot"),
        (change_sequence(STREAM, pending=(A,) * 9), "sequence 0 has 15 items, more than it was given and sampled"),
        (change_sequence(STREAM, prompt_done=False), "sequence 0 sampled 1 tokens, and its prompt is not done"),
        (change_sequence(QUEUED, slot=3), "sequence 5 waits and has slot 3"),
        (change_sequence(QUEUED, pending=(B,)), "sequence 5 does not begin with its prompt"),
        (change_sequence(QUEUED, pending=(B, A, A)), "sequence 5 has items after its prompt, but sampled none"),
        (change_sequence(QUEUED, n_cached=1), "sequence 5 never had a slot, and found 1 items in the cache"),
        (change_sequence(QUEUED, follows=STREAM), "sequence 5 waits for a slot and follows sequence 0"),
        (change_sequence(FOLLOWER, follows=QUEUED), "sequence 3 follows sequence 5, which does not run"),
        (change_sequence(FOLLOWER, n_awaited=41), "waits for 41 items, but they share only 40"),
        (change_sequence(FOLLOWER, n_awaited=0), "waits for items that its own slot holds already"),
        (change_sequence(FOLLOWED, follows=FOLLOWER, n_awaited=40), "follows itself"),
        (lambda state: replace(state, reserved={}), r"reserved rows are {}, where {5: 2} are needed"),
        (lambda state: replace(state, suspects=(17,)), r"the suspects \[17\] have ended"),
        (lambda state: replace(state, max_rows=0), "a batch may have 0 rows, where 12 are allowed"),
        (
            lambda state: replace(
                state,
                crowded=True,
                running={},
                reserved={},
                slots=tuple(replace(slot, busy=False) for slot in state.slots),
                embed_slots=tuple(replace(slot, busy=False) for slot in state.embed_slots),
            ),
            "the KV cache is called full, but no sequence holds it",
        ),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[SchedulerState], SchedulerState], message: str) -> None:
    world = busy_world()
    world.scheduler.check_integrity()
    with pytest.raises(AssertionError, match=message):
        integrity.check(change(world.state), world.capabilities)


def test_a_state_is_a_copy() -> None:
    world = busy_world()
    before = world.state
    world.cancel(STREAM)
    world.run()
    assert before.running[FOLLOWER].follows == FOLLOWED
    assert list(before.slots[0].items) == list(endless(0))
    assert world.state != before


def test_a_slot_that_is_forgotten_is_found_in_the_next_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: a pool that does not take slots back."""
    world = busy_world()
    monkeypatch.setattr(SlotPool, "release", lambda *args, **kwargs: [])
    with pytest.raises(AssertionError, match="slot 0 is busy, but no running sequence holds it"):
        world.cancel(STREAM)
