"""Several answers to one prompt: with `share_prompt` it is decoded once, however short it is."""

from __future__ import annotations

import enum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.invariants import check_idle, check_survivors
from tests.core.world import A, C, World, make_world
from trio_runner.info import Capabilities

PROMPT = tuple(A + n % 5 for n in range(20))


@pytest.mark.parametrize("cache_prompt", [True, False])
@pytest.mark.parametrize("n_prompt", [1, 2, 3, 20])
@pytest.mark.parametrize("n_slots", [1, 2, 4])
def test_each_further_sequence_decodes_one_row(n_slots: int, n_prompt: int, cache_prompt: bool) -> None:
    """Also those that get a slot later."""
    world = make_world(n_slots, max_rows=6)
    for _ in range(4):
        world.submit(prompt=PROMPT[:n_prompt], max_tokens=3, share_prompt=True, cache_prompt=cache_prompt)
    world.run()
    check_survivors(world)
    check_idle(world)
    assert sorted(world.n_prefilled.values()) == [1, 1, 1, n_prompt]


def test_it_waits_for_a_sequence_that_does_not_share() -> None:
    world = make_world(2, max_rows=6)
    first = world.submit(prompt=(*PROMPT, C), max_tokens=3, cache_prompt=False)
    world.step()
    second = world.submit(prompt=(*PROMPT, A), max_tokens=3, share_prompt=True)
    world.run()
    check_survivors(world)
    assert (world.n_prefilled[first], world.n_prefilled[second]) == (21, 1)


@pytest.mark.parametrize("then", ["cancel", "pause"])
def test_a_sequence_that_was_overtaken_goes_on_from_what_the_others_have_decoded(then: str) -> None:
    world = make_world(4, max_rows=6)
    first, second, third, fourth = (world.submit(prompt=PROMPT, max_tokens=3, share_prompt=True) for _ in range(4))
    world.step()
    world.pause(first)
    world.step()
    world.resume(first)
    world.cancel(second) if then == "cancel" else world.pause(second)
    world.step()
    world.resume(second)
    world.run()
    check_survivors(world)
    check_idle(world)
    assert sum(world.n_prefilled.values()) <= len(PROMPT) + 3
    assert all(world.finished(uid) for uid in (first, third, fourth))


def test_recurrent_state_cannot_be_shared() -> None:
    world = make_world(2, max_rows=6, can_trim=False, can_shift=False)
    for _ in range(2):
        world.submit(prompt=PROMPT, max_tokens=3, share_prompt=True)
    world.run()
    check_survivors(world)
    assert sum(world.n_prefilled.values()) == 2 * len(PROMPT)


class Move(enum.Enum):
    SUBMIT = enum.auto()
    SUBMIT_BACKGROUND = enum.auto()
    CANCEL = enum.auto()
    EXPIRE = enum.auto()
    PAUSE = enum.auto()
    RESUME = enum.auto()
    STEP = enum.auto()
    THROW_BATCH_AWAY = enum.auto()


MOVES = st.lists(st.tuples(st.sampled_from(Move), st.integers(0, 9)), max_size=40)
"""With the number of a request, modulo how many there are."""


@settings(max_examples=300)
@given(st.integers(2, 6), st.integers(1, 20), st.integers(1, 5), st.integers(1, 8), MOVES)
def test_a_prompt_is_decoded_once_whatever_happens(
    n_requests: int, n_prompt: int, n_slots: int, max_rows: int, moves: list[tuple[Move, int]]
) -> None:
    """Each row but the last is decoded once, and the last row at most once for each sequence."""
    world = World(Capabilities(n_slots=n_slots, n_ctx=64, max_rows=max_rows, n_spare_slots=1))
    rows: list[int] = []
    world.on_batch = lambda batch: rows.extend(
        position for chunk in batch.chunks for position in range(chunk.start, chunk.stop) if position < n_prompt
    )
    prompt = PROMPT[:n_prompt]
    for move, number in moves:
        uid = number % max(len(world.specs), 1)
        is_new = len(world.specs) < n_requests
        match move:
            case Move.SUBMIT | Move.SUBMIT_BACKGROUND if is_new:
                background = move is Move.SUBMIT_BACKGROUND
                world.submit(prompt=prompt, max_tokens=3, share_prompt=True, background=background)
            case Move.CANCEL if uid in world.specs:
                world.cancel(uid)
            case Move.EXPIRE if uid in world.specs:
                world.expire(uid)
            case Move.PAUSE if uid in world.specs:
                world.pause(uid)
            case Move.RESUME if uid in world.specs:
                world.resume(uid)
            case Move.THROW_BATCH_AWAY:
                world.step(discard=True)
            case _:
                world.step()
    while len(world.specs) < n_requests:
        world.submit(prompt=prompt, max_tokens=3, share_prompt=True)
    for uid in world.specs:
        world.resume(uid)
    world.run()
    check_survivors(world)
    check_idle(world)
    before_last = [position for position in rows if position < n_prompt - 1]
    assert sorted(before_last) == list(range(len(before_last)))
    assert rows.count(n_prompt - 1) <= n_requests
