"""Background sequences, which give up their slots to interactive ones and go on later."""

from __future__ import annotations

import pytest

from tests.core.invariants import check_idle, check_survivors
from tests.core.world import A, B, C, endless, make_world


def test_an_interactive_sequence_takes_the_slot_of_the_background_one_that_came_last() -> None:
    world = make_world(2)
    first, second = (world.submit(prompt=endless(n), max_tokens=20, background=True) for n in range(2))
    for _ in range(5):
        world.step()
    waits = world.submit(prompt=endless(3), max_tokens=20, background=True)
    urgent = world.submit(prompt=endless(2), max_tokens=4)
    world.step()
    assert sorted(world.running) == [first, urgent]
    assert world.scheduler.statistics().n_preempted == 1
    world.run()
    check_survivors(world)
    # What it had said before is said once, and it is back before those who came later.
    assert world.preempted == {second}
    order = [uid for uid in world.events if world.finished(uid)]
    assert {first, second, waits, urgent} == set(order)
    check_idle(world)


@pytest.mark.parametrize("can_shift", [True, False])
@pytest.mark.parametrize("max_rows", [5, 8])
def test_a_sequence_whose_slot_is_full_gives_way_without_losing_its_text(max_rows: int, can_shift: bool) -> None:
    """It has a token that does not fit any more: it must shift just as it would have alone."""
    for n_said in range(1, 30):
        world = make_world(1, n_ctx=16, max_rows=max_rows, can_shift=can_shift)
        background = world.submit(prompt=endless(0), n_keep=2, max_tokens=40, background=True)
        for _ in range(n_said):
            world.step()
        world.submit(prompt=(C, C, B), max_tokens=2)
        world.run()
        assert world.preempted == {background}
        check_survivors(world)


def test_a_preempted_prompt_counts_as_cached_only_what_is_not_decoded_again() -> None:
    prompt = tuple(A + n % 5 for n in range(20))
    world = make_world(1, max_rows=6)
    world.submit(prompt=prompt[:8], max_tokens=1)
    world.run()
    background = world.submit(prompt=prompt, max_tokens=4, background=True, progress=True)
    world.step()
    world.submit(prompt=(C, C, B), max_tokens=2)
    world.run()
    assert world.last(background).usage.cached_tokens == 0
    check_survivors(world)


def test_an_embedding_in_the_background_gives_up_no_slot_for_a_generation() -> None:
    world = make_world(1, embeds_last_row=True)
    generation = world.submit(prompt=endless(0), max_tokens=20, background=True)
    world.step()
    world.submit(prompt=(A, B, C), embedding=True, background=True)
    urgent = world.submit(prompt=endless(1), max_tokens=4)
    world.step()
    assert generation in world.waiting
    assert urgent in world.running
    world.run()
    check_survivors(world)


@pytest.mark.parametrize("cache_prompt", [True, False])
@pytest.mark.parametrize("n_slots", [1, 3])
def test_a_background_sequence_goes_on_from_where_it_was(n_slots: int, cache_prompt: bool) -> None:
    """However often it is preempted, and whatever the request says about the prompt cache."""
    world = make_world(n_slots, n_ctx=256, max_rows=8, n_spare_slots=n_slots)
    patient = [
        world.submit(prompt=(C + 1 + n,) * 150, max_tokens=3, background=True, cache_prompt=cache_prompt)
        for n in range(n_slots)
    ]
    n_taken = 0
    while not all(map(world.finished, patient)):
        for _ in range(n_slots):
            world.submit(prompt=(C, B, C), max_tokens=2)
        for _ in range(12):
            world.step()
        n_taken += 1
        assert n_taken < 100, "it never gets anywhere"
    world.run()
    assert all(world.n_prefilled[uid] == 150 for uid in patient)
    assert set(patient) <= world.preempted
    check_survivors(world)


def test_a_slot_is_not_parked_for_a_sequence_that_goes_on_in_another_one() -> None:
    """While it waited, an interactive sequence decoded more of the same prompt in another slot."""
    prompt = tuple(A + n % 5 for n in range(30))
    world = make_world(1, n_ctx=64, n_spare_slots=1)
    background = world.submit(prompt=prompt, max_tokens=2, background=True)
    world.step()
    urgent = world.submit(prompt=(*prompt[:25], C, C), max_tokens=2)
    world.step()
    assert [slot.parked_for for slot in world.state.slots] == [background, None]
    while not world.finished(urgent):
        world.step()
    world.step()
    assert (world.running, world.state.running[background].slot) == ([background], 1)
    assert [slot.parked_for for slot in world.state.slots] == [None, None]
    world.run()
    check_survivors(world)
    check_idle(world)


def test_a_slot_stays_parked_for_its_sequence_when_another_preempted_one_ends() -> None:
    """Two background sequences had the same slot one after the other, and the first of them is cancelled."""
    world = make_world(1, n_ctx=64)
    first = world.submit(prompt=(A,) * 20, max_tokens=2, background=True)
    world.step()
    urgent = world.submit(prompt=(B,) * 6, max_tokens=1)
    world.step()
    assert world.finished(urgent)
    world.pause(first)
    second = world.submit(prompt=(C,) * 20, max_tokens=2, background=True)
    world.step()
    world.submit(prompt=(B,) * 6, max_tokens=20)
    world.step()
    assert world.preempted == {first, second}
    world.cancel(first)
    assert not any(slot.parked_for == first for slot in world.state.slots)
    world.resume(second)
    world.run()
    check_survivors(world)
    check_idle(world)


def test_the_embedding_of_a_long_text_goes_on_from_where_it_was() -> None:
    world = make_world(1, n_ctx=64, max_rows=8, n_spare_slots=1, embeds_last_row=True)
    text = world.submit(prompt=(A, B, C) * 20, embedding=True, cache_prompt=False, background=True)
    n_taken = 0
    while not world.finished(text):
        world.submit(prompt=(C, B, C), max_tokens=2)
        for _ in range(4):
            world.step()
        n_taken += 1
        assert n_taken < 100, "it never gets anywhere"
    world.run()
    assert world.preempted == {text}
    assert world.n_prefilled[text] == 60
    check_survivors(world)
    check_idle(world)


def test_a_preferred_slot_that_is_kept_for_a_preempted_sequence_is_not_taken() -> None:
    world = make_world(1, n_spare_slots=1, n_ctx=64)
    preempted = world.submit(prompt=(A,) * 20, max_tokens=3, background=True)
    world.step()
    interactive = world.submit(prompt=(C,) * 3, max_tokens=3, preferred_slot=0)
    world.run()
    check_survivors(world)
    assert world.preempted == {preempted}
    assert world.n_prefilled[preempted] == 20
    assert world.finished(interactive)
